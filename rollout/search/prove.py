"""Proofs: final returns carried up the tree, where the environment says that they are final.

A node is proven when the best of its proven actions is as good as any return can be, or when all its actions
are proven; then V(s) is exact, and no simulation goes below it. An action that is proven to be as bad as any
return can be is lost, and never selected again while others are left (MCTS-Solver: Winands, Björnsson and
Saito, 2008, here for any bounds of the return and any discount).

Sound only where actions have one outcome. Not guaranteed: that values above a proof are exact at once; their
averages keep the estimates of earlier simulations.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from rollout.search.backward import Backward
from rollout.search.tree import ILLEGAL, LOST, PROVEN, UNTRIED, Tree

__all__ = ["ProvingBackward"]


class ProvingBackward:
    """Backs up, then proves what can be proven on the path.

    Args:
        inner: The backup.
        bounds: Lowest and highest return from any state; None if unknown.
    """

    def __init__(self, inner: Backward, bounds: tuple[float, float] | None) -> None:
        self._inner = inner
        self._low, self._high = bounds or (-inf, inf)

    def __call__(
        self, tree: Tree, edges: Sequence[int], outcomes: Sequence[int], leaf: int, value: float
    ) -> None:
        """Backs up; then goes up from a proven leaf for as long as parents become proven by it."""
        self._inner(tree, edges, outcomes, leaf, value)
        node = leaf
        for edge in reversed(edges):
            if not tree.flags[node] & PROVEN:
                return
            q = _proven_value(tree, edge)
            tree.slot_value[tree.edge_slot[edge]] = q
            if q <= self._low:
                tree.set_state(edge, LOST)
            node = tree.edge_node[edge]
            self._prove(tree, node)

    def _prove(self, tree: Tree, node: int) -> None:
        """Marks a node that its actions prove."""
        best, is_complete = -inf, True
        for edge in tree.edges(node):
            if edge == ILLEGAL:
                continue
            if edge == UNTRIED or not tree.is_proven(edge):
                is_complete = False
                continue
            best = max(best, _proven_value(tree, edge))
        if best >= self._high or (is_complete and not tree.open_ended[node]):
            tree.flags[node] |= PROVEN
            tree.value[node] = best


def _proven_value(tree: Tree, edge: int) -> float:
    outcome = tree.edge_outcome[edge]
    below = tree.value[tree.outcome_node[outcome]]
    return tree.outcome_reward[outcome] + tree.outcome_discount[outcome] * below
