"""What an evaluator is given, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rollout.branch import LookaheadResult
from rollout.types import PlayoutResult, Step, Value

__all__ = ["Evaluation", "Leaf"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A state to be valued, which is not terminal.

    Attributes:
        step: What the environment said when it was reached; its observation, above all.
        actions: Its legal actions, in the order that a prior has; none where the episode was truncated.
        playout: What the playout returned; None when none was requested, or the episode was truncated here.
    """

    step: Step
    actions: Sequence[Value]
    playout: PlayoutResult | LookaheadResult | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluator says of a leaf.

    Attributes:
        value: Estimate of the discounted return from there on.
        prior: One probability per legal action; None is uniform.
    """

    value: float
    prior: tuple[float, ...] | None = None
