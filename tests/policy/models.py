"""Evaluators as a user writes them, named by `tests/policy` configurations as `models:...`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rollout.policy.leaves import Evaluation, Leaf

calls: list[int] = []
"""Leaves of each call of `counted`."""


def heuristic(leaves: Sequence[Leaf], scale: float = 1.0) -> list[float]:
    """The nearer the last cell of FrozenLake, the better."""
    return [scale * float(leaf.step.observation) / 15 for leaf in leaves]  # type: ignore[arg-type]


def counted(leaves: Sequence[Leaf]) -> list[Evaluation]:
    """As `heuristic`, with a prior that prefers the first legal action."""
    calls.append(len(leaves))
    return [
        Evaluation(value, prior(len(leaf.actions)))
        for leaf, value in zip(leaves, heuristic(leaves), strict=True)
    ]


def prior(n: int) -> tuple[float, ...] | None:
    return (0.7, *[0.3 / (n - 1)] * (n - 1)) if n > 1 else None


async def later(leaves: Sequence[Leaf]) -> list[float]:
    return heuristic(leaves)


def bad(leaves: Sequence[Leaf], how: str) -> object:
    """Right for a root alone, wrong for a wave."""
    good: list[object] = [0.5] * len(leaves)
    if len(leaves) == 1:
        return good
    wrong: dict[str, object] = {
        "nan": math.nan,
        "infinite": math.inf,
        "text": "high",
        "none": None,
        "sum": (0.5, [0.5] * 4),
        "few": (0.5, [1.0]),
        "negative": (0.5, [1.5, -0.5, 0.0, 0.0]),
        "nan prior": (0.5, [math.nan, 0.5, 0.5, 0.0]),
        "triple": (0.5, None, 1),
    }
    if how == "raises":
        raise RuntimeError("out of memory")
    if how == "short":
        return good[1:]
    if how == "number":
        return 0.5
    return [*good[1:], wrong[how]]


not_a_function = 3
