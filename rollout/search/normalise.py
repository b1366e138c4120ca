"""Normalisation of action values: q̂ = (Q − low)·scale, so that exploration constants fit any scale of reward.

A normaliser gives (low, scale) for a node; it reads the tree and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rollout.search.tree import Tree

__all__ = ["Normaliser", "SiblingNormaliser", "TreeNormaliser", "no_normalisation"]

EPSILON = 1e-8
"""The smallest range that is stretched to 1, as in mctx."""


class Normaliser(Protocol):
    """How Q becomes q̂ at a node."""

    def __call__(self, node: int) -> tuple[float, float]:
        """`low` and `scale` of q̂ = (Q − low)·scale."""
        ...


def no_normalisation(node: int) -> tuple[float, float]:
    """q̂ = Q."""
    return 0.0, 1.0


class SiblingNormaliser:
    """By parent and siblings, as in mctx: low and high over V(s) and the Q(s,a) of visited actions."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def __call__(self, node: int) -> tuple[float, float]:
        """The range at the node itself; an unvisited action has q̂ = 0, which is its low end."""
        tree = self._tree
        low = high = tree.value[node]
        values: Sequence[float] = tree.action_values(node)
        if tree.num_unready[node]:
            values = [q for q, n in zip(values, tree.action_visits(node), strict=True) if n]
        for q in values:
            if q < low:
                low = q
            elif q > high:
                high = q
        return low, 1.0 / max(high - low, EPSILON)


class TreeNormaliser:
    """By the smallest and largest Q that was ever backed up in the tree, as in MuZero.

    What was freed when the root moved still counts: the range only widens.
    """

    def __init__(self) -> None:
        self.low = float("inf")
        self.high = float("-inf")

    def observe(self, q: float) -> None:
        """Widens the range to hold `q`."""
        self.low = min(self.low, q)
        self.high = max(self.high, q)

    def __call__(self, node: int) -> tuple[float, float]:
        """The range of the whole tree; q̂ = Q while it is empty or a point."""
        if self.high - self.low < EPSILON:
            return 0.0, 1.0
        return self.low, 1.0 / (self.high - self.low)
