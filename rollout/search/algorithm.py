"""What tells search algorithms apart: where simulations go, and what is read off the root.

Everything else (what is in flight, retries, waves, nodes, backups) is common and lives in `tree_search`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rollout.search.base import Outcome
from rollout.search.decide import MoveRule, visit_target
from rollout.search.descend import Path, descend
from rollout.search.select import Selector
from rollout.search.tree import ILLEGAL, Tree
from rollout.search.widening import Drawing
from rollout.types import derive_seed

__all__ = ["Algorithm", "TreePolicyAlgorithm", "add_root_noise"]


class Algorithm(Protocol):
    """One search algorithm over one tree."""

    @property
    def can_advance(self) -> bool:
        """Whether a search can go on from a child of the root, with what is known below it."""
        ...

    def begin(self, seed: int, simulations: int) -> None:
        """The tree has a new root, which `simulations` more are to be spent on."""
        ...

    def plan(self) -> Path | None:
        """Where the next simulation goes; None when all waits for branches in flight, or nothing is left."""
        ...

    def check(self, path: Path, told: Outcome) -> None:
        """Looks at an outcome before anything is changed by it; `path` ends in its edge.

        Raises:
            SearchError: This algorithm cannot take it in.
        """
        ...

    def best(self) -> int:
        """The action to play at the root.

        Raises:
            SearchError: No action at the root has an outcome.
        """
        ...

    def policy_target(self, node: int = 0) -> Sequence[float]:
        """The policy to train towards at a node that is not final: one probability per action."""
        ...


class TreePolicyAlgorithm:
    """UCT, PUCT and their like: the same selector everywhere, from the root down.

    Args:
        tree: The tree.
        select: The tree policy.
        drawing: Single outcomes or chance nodes.
        move: How the move is read off the root.
        noise: (alpha, fraction) of Dirichlet noise on the root's prior; a fraction of 0 is none.
    """

    can_advance = True

    def __init__(
        self, tree: Tree, select: Selector, drawing: Drawing, move: MoveRule, noise: tuple[float, float]
    ) -> None:
        self._tree = tree
        self._select = select
        self._drawing = drawing
        self._move = move
        self._noise = noise
        self._seed = 0

    def begin(self, seed: int, simulations: int) -> None:
        """Adds noise to the root's prior."""
        self._seed = seed
        alpha, fraction = self._noise
        if fraction:
            add_root_noise(self._tree, alpha, fraction, np.random.default_rng(derive_seed(seed, "noise")))

    def plan(self) -> Path | None:
        """Select, down to a leaf."""
        return descend(self._tree, self._select, self._drawing)

    def check(self, path: Path, told: Outcome) -> None:
        """Anything goes."""

    def best(self) -> int:
        """By the move rule."""
        return self._move.choose(self._tree, self._seed)

    def policy_target(self, node: int = 0) -> Sequence[float]:
        """The visit distribution."""
        return visit_target(self._tree, node)


def add_root_noise(tree: Tree, alpha: float, fraction: float, rng: np.random.Generator) -> None:
    """P(a) ← (1−ε)·P(a) + ε·η(a) with η ~ Dir(α) over the legal actions of the root (AlphaZero)."""
    legal = [action for action, edge in enumerate(tree.edges(0)) if edge != ILLEGAL]
    if not legal:
        return
    first = tree.expand(0)
    for action, noise in zip(legal, rng.dirichlet([alpha] * len(legal)), strict=True):
        slot = first + action
        tree.priors[slot] = (1.0 - fraction) * tree.priors[slot] + fraction * float(noise)
