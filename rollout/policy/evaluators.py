"""Leaf values: what a search is told of a state that it has just reached.

An evaluator has two halves. `request` goes along with the branch, into the guest; `evaluate` looks at what
came back, for a whole wave of leaves at once, so that one that calls a model can do so in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rollout.config import SearchConfig
from rollout.errors import ConfigError
from rollout.types import PlayoutRequest, PlayoutResult, Step, derive_seed

__all__ = ["Evaluation", "Evaluator", "Leaf", "PlayoutEvaluator", "ZeroEvaluator", "make_evaluator"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A state to be valued, which is not terminal.

    Attributes:
        step: What the environment said when it was reached.
        num_actions: Number of its legal actions.
        playout: What the playout returned; None when none was requested, or the episode was truncated here.
    """

    step: Step
    num_actions: int
    playout: PlayoutResult | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluator says of a leaf.

    Attributes:
        value: Estimate of the discounted return from there on.
        prior: One probability per legal action; None is uniform.
    """

    value: float
    prior: tuple[float, ...] | None = None


class Evaluator(Protocol):
    """Values leaves; holds no state of any one search, so one object serves all episodes."""

    @property
    def name(self) -> str:
        """As rows record it."""
        ...

    def request(self, seed: int) -> PlayoutRequest | None:
        """What the guest shall play at a leaf whose branch has `seed`; None for nothing."""
        ...

    async def evaluate(self, leaves: Sequence[Leaf]) -> list[Evaluation]:
        """One evaluation per leaf, in their order.

        Raises:
            PolicyError: A model failed.
        """
        ...


@dataclass(frozen=True, slots=True)
class PlayoutEvaluator:
    """The return of one uniformly random playout inside the guest.

    A truncated leaf has no playout, because the environment takes no further action; its value is 0, which
    makes the value of a state the return that is collected within the environment's time limit.
    """

    horizon: int
    discount: float
    name: str = "playout"

    def request(self, seed: int) -> PlayoutRequest | None:
        """At most `horizon` random actions."""
        return PlayoutRequest(self.horizon, derive_seed(seed, "playout"), self.discount)

    async def evaluate(self, leaves: Sequence[Leaf]) -> list[Evaluation]:
        """The playouts' discounted returns."""
        return [Evaluation(leaf.playout.value if leaf.playout is not None else 0.0) for leaf in leaves]


@dataclass(frozen=True, slots=True)
class ZeroEvaluator:
    """Values every leaf 0: the search sees only rewards that it reaches itself."""

    name: str = "zero"

    def request(self, seed: int) -> PlayoutRequest | None:
        """Nothing."""
        return None

    async def evaluate(self, leaves: Sequence[Leaf]) -> list[Evaluation]:
        """Zeros."""
        return [Evaluation(0.0)] * len(leaves)


def make_evaluator(config: SearchConfig) -> Evaluator:
    """The evaluator that a configuration names.

    Raises:
        ConfigError: There is none of that name.
    """
    if config.evaluator == "playout":
        return PlayoutEvaluator(config.playout_horizon, config.discount)
    if config.evaluator == "zero":
        return ZeroEvaluator()
    raise ConfigError(
        f"search.evaluator: unknown evaluator {config.evaluator!r}; there are 'playout' and 'zero'"
    )
