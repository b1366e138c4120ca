"""Widening: how many actions of a state, and how many sampled outcomes of an action, a search considers.

- Progressive widening: another action is tried while |children(s)| < k·N(s)^α.
- Double progressive widening does the same over the next states of an action, which become chance nodes: a
  visit to (s,a) asks for a fresh branch while fewer than k·N(s,a)^α were drawn, and otherwise walks through a
  stored outcome, which costs no machine. What is counted is draws, not distinct states: in a domain with
  three outcomes an action would else be drawn for ever, and never searched below.

Stored outcomes are walked through in proportion to their numbers of draws, by the additive recurrence of the
golden ratio: after n visits each share is right to within O(log n / n), where independent draws would be off
by O(1/√n). The choice depends on the tree alone.

Not guaranteed: that rare outcomes are seen; an action with few draws has their frequencies, not the
environment's probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rollout.search.tree import NONE, SETTLED, Tree

__all__ = ["ActionWidening", "Drawing", "SingleOutcome", "WideningDraws"]

GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class ActionWidening:
    """Progressive widening over actions: |children| < k·N^α, and never less than one child.

    Attributes:
        k: 0 is no limit on listed actions; open-ended states, which need one, then get √N.
        alpha: Growth.
    """

    k: float = 0.0
    alpha: float = 0.5

    def has_room(self, tree: Tree, node: int) -> bool:
        """Whether another action may be tried at `node`."""
        k, alpha = self.k, self.alpha
        if not k:
            if not tree.open_ended[node]:
                return True
            k, alpha = 1.0, 0.5
        num_tried = sum(edge >= 0 for edge in tree.edges(node))
        return num_tried == 0 or num_tried < k * tree.begun[node] ** alpha


class Drawing(Protocol):
    """Whether a visit to an action draws a fresh outcome or walks through a stored one."""

    def choose(self, tree: Tree, edge: int) -> int:
        """The outcome to walk through; NONE asks for a fresh branch."""
        ...

    def is_waiting(self, tree: Tree, edge: int) -> bool:
        """Whether the edge can be neither drawn again nor walked through, until a branch is back."""
        ...


class SingleOutcome:
    """One branch per action: its outcome is what the action does. Right for deterministic environments."""

    def choose(self, tree: Tree, edge: int) -> int:
        """The outcome, once there is one."""
        return tree.edge_outcome[edge]

    def is_waiting(self, tree: Tree, edge: int) -> bool:
        """While the branch is in flight."""
        return tree.edge_outcome[edge] == NONE and tree.slot_begun[tree.edge_slot[edge]] > 0


@dataclass(frozen=True, slots=True)
class WideningDraws:
    """Double progressive widening: a fresh branch while draws < k·N^α, and never less than one draw."""

    k: float
    alpha: float

    def choose(self, tree: Tree, edge: int) -> int:
        """A stored outcome in proportion to its draws, unless a fresh branch is due."""
        n = tree.slot_begun[tree.edge_slot[edge]]
        if tree.edge_state[edge] != SETTLED and self._is_due(tree, edge, n):
            return NONE
        return _in_proportion(tree, edge, (n * GOLDEN) % 1.0)

    def is_waiting(self, tree: Tree, edge: int) -> bool:
        """While all its draws are in flight and no further one is due."""
        begun = tree.slot_begun[tree.edge_slot[edge]]
        return tree.edge_outcome[edge] == NONE and not self._is_due(tree, edge, begun)

    def _is_due(self, tree: Tree, edge: int, n: int) -> bool:
        draws = tree.edge_draws[edge]
        return draws == 0 or draws < self.k * (n + 1) ** self.alpha


def _in_proportion(tree: Tree, edge: int, u: float) -> int:
    """The outcome at the fraction `u` of the edge's draws."""
    draws, following = tree.outcome_draws, tree.outcome_next
    total, outcome = 0, tree.edge_outcome[edge]
    while outcome != NONE:
        total += draws[outcome]
        outcome = following[outcome]
    mark = u * total
    outcome = tree.edge_outcome[edge]
    while following[outcome] != NONE and mark >= draws[outcome]:
        mark -= draws[outcome]
        outcome = following[outcome]
    return outcome
