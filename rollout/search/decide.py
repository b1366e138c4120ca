"""Decide: the move to play, and the policy to train towards, once a search is done.

Where the root is proven, an action that proves it is played; one that is proven lost only when all are, also
where the move is drawn. Ties
go by the seed, so that no action is preferred where nothing is known.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rollout.errors import SearchError
from rollout.search.seeds import branch_seed
from rollout.search.tree import LOST, NONE, PROVEN, TERMINATED, Tree
from rollout.types import derive_seed

__all__ = [
    "MoveRule",
    "best_action",
    "lost_actions",
    "sample_action",
    "tempered",
    "tree_returns",
    "unless_lost",
    "visit_distribution",
    "visit_target",
]


@dataclass(frozen=True, slots=True)
class MoveRule:
    """How a move is read off the root.

    Attributes:
        by: Most visits (then the larger value), or the largest value (then more visits).
        temperature: Above 0 the move is drawn in proportion to visits^(1/temperature) instead.
    """

    by: Literal["visits", "value"] = "visits"
    temperature: float = 0.0

    def choose(self, tree: Tree, seed: int) -> int:
        """The action to play at the root.

        Raises:
            SearchError: No action at the root has an outcome.
        """
        best = best_action(tree, self.by, seed)
        if self.temperature == 0.0 or tree.flags[0] & PROVEN:
            return best
        rng = np.random.default_rng(derive_seed(seed, "move"))
        return sample_action(unless_lost(tree.action_visits(0), lost_actions(tree)), self.temperature, rng)


def best_action(tree: Tree, by: Literal["visits", "value"], seed: int) -> int:
    """The best action at the root.

    Raises:
        SearchError: No action at the root has an outcome.
    """
    solved = bool(tree.flags[0] & PROVEN)
    by_value = by == "value" or solved
    scores: list[tuple[bool, bool, float, float, int, int]] = []
    for action, edge in enumerate(tree.edges(0)):
        if edge >= 0 and tree.edge_visits[edge]:
            visits, value = tree.edge_visits[edge], tree.edge_value[edge]
            first, second = (value, visits) if by_value else (visits, value)
            is_open = tree.edge_state[edge] != LOST
            is_sure = solved and tree.is_proven(edge)
            scores.append((is_sure, is_open, first, second, branch_seed(seed, 0, action, 0), action))
    if not scores:
        raise SearchError("no branch at the root has an outcome: all failed, or none was told yet")
    return max(scores)[-1]


def lost_actions(tree: Tree) -> set[int]:
    """The root's actions that are proven to be lost."""
    return {a for a, edge in enumerate(tree.edges(0)) if edge >= 0 and tree.edge_state[edge] == LOST}


def unless_lost(visits: Sequence[int], lost: Set[int]) -> list[int]:
    """Visits, with none for lost actions; all of them where no other was visited."""
    kept = [0 if action in lost else n for action, n in enumerate(visits)]
    return kept if any(kept) else list(visits)


def sample_action(visits: Sequence[int], temperature: float, rng: np.random.Generator) -> int:
    """Draws an action in proportion to visits^(1/temperature)."""
    return int(rng.choice(len(visits), p=tempered(visits, temperature)))


def tempered(visits: Sequence[int], temperature: float) -> list[float]:
    """visits^(1/temperature) as probabilities; a temperature of 0 is all on the most visited."""
    most = max(visits)
    if most == 0:
        return visit_distribution(visits)
    if temperature == 0.0:
        return visit_distribution([int(n == most) for n in visits])
    weights = [(n / most) ** (1.0 / temperature) for n in visits]
    total = sum(weights)
    return [w / total for w in weights]


def visit_target(tree: Tree, node: int = 0) -> list[float]:
    """A node's visits as a policy to train towards; its prior where nothing was visited."""
    visits = tree.action_visits(node)
    return visit_distribution(visits) if any(visits) else list(tree.node_priors(node))


def tree_returns(tree: Tree) -> list[float]:
    """By node: the return along the most visited actions, and there along the outcomes drawn most.

    A leaf's is its evaluation from outside, or its final value where that is known. Nodes are taken the
    deepest first: with transpositions a child may be older than its parent, but it is always deeper.
    """
    returns = [0.0] * len(tree)
    for node in sorted(range(len(tree)), key=tree.depth.__getitem__, reverse=True):
        best = max(
            (edge for edge in tree.edges(node) if edge >= 0 and tree.edge_outcome[edge] != NONE),
            key=tree.edge_visits.__getitem__,
            default=NONE,
        )
        if best == NONE:
            is_final = tree.flags[node] & (PROVEN | TERMINATED)
            returns[node] = tree.value[node] if is_final else tree.raw_value[node]
            continue
        outcome = max(tree.outcomes(best), key=tree.outcome_draws.__getitem__)
        after = returns[tree.outcome_node[outcome]]
        returns[node] = tree.outcome_reward[outcome] + tree.outcome_discount[outcome] * after
    return returns


def visit_distribution(visits: Sequence[int]) -> list[float]:
    """N(a) / Σ N; uniform where there are none."""
    total = sum(visits)
    if not total:
        return [1.0 / len(visits)] * len(visits)
    return [n / total for n in visits]
