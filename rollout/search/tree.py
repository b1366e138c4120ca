"""The search tree as a struct of arrays: states, actions that were tried in them, and what these led to.

Three tables, each a set of parallel columns; a row is an index, and rows are only appended:

    node      a state s            visits N(s), value V(s), raw value, ...        node 0 is the root
    edge      an action a in s     visits N(s,a), value Q(s,a), in flight O(s,a)  made when a is first tried
    outcome   a state reached by a draws n(s,a,s'), visits, reward R, discount    one per edge without chance

The actions of a node are `num_actions[s]` consecutive slots, from `first_slot[s]` on. `slots` has the edge of
each action, or `UNTRIED`, or `ILLEGAL`; `priors`, `slot_value` and `slot_begun` have the same layout, so that
what a tree policy compares lies side by side. A state whose actions are all legal and equally likely has no
slots before one of them is tried: most states of a tree never need any. An edge's outcomes are a linked list
from `edge_outcome` on, through `outcome_next`.

Invariants (at rest, that is with nothing in flight):

- N(s) = evaluations(s) + sum of N(s,a); a state without chance or transpositions is evaluated once, unless no
  action can be taken in it.
- N(s,a) = sum of the visits of its outcomes; every in-flight count is 0.
- An edge with an outcome has at least one visit.
- depth(s) is the number of actions on every path from the root to s, also where paths join.

In flight is kept as N + O, which is what a tree policy reads: it changes when a simulation begins, and not
when it is backed up.

Visits are lists (the fastest scalar access in CPython), other columns typed arrays: values in a list would be
objects all over the heap, and in a large tree each a cache miss. A node with 16 actions and its edge and
outcome take less than 600 bytes.

Not guaranteed: that values mean anything before the first `backward`, or that a caller who writes into a
column keeps the invariants.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from rollout.search.column import Column
from rollout.search.rows import (
    GIVEN_UP,
    ILLEGAL,
    LOST,
    NONE,
    OPEN,
    PENDING,
    PROVEN,
    SETTLED,
    TERMINATED,
    TRUNCATED,
    UNTRIED,
    Rows,
)

__all__ = [
    "GIVEN_UP",
    "ILLEGAL",
    "LOST",
    "NONE",
    "OPEN",
    "PENDING",
    "PROVEN",
    "SETTLED",
    "TERMINATED",
    "TRUNCATED",
    "UNTRIED",
    "Tree",
]


class Tree(Rows):
    """A search tree; see the module for its layout, and `Rows` for its stored columns."""

    def is_proven(self, edge: int) -> bool:
        """Whether the only outcome of an edge is proven (a search with proofs has single outcomes)."""
        outcome = self.edge_outcome[edge]
        return outcome != NONE and bool(self.flags[self.outcome_node[outcome]] & PROVEN)

    def edge(self, node: int, action: int) -> int:
        """The edge of an action; UNTRIED or ILLEGAL when it has none."""
        first = self.first_slot[node]
        return self.slots[first + action] if first != NONE else UNTRIED

    def edges(self, node: int) -> array[int]:
        """The slots of a node: one edge, UNTRIED or ILLEGAL per action."""
        first, count = self.first_slot[node], self.num_actions[node]
        return self.slots[first : first + count] if first != NONE else array("i", [UNTRIED]) * count

    def outcomes(self, edge: int) -> Iterator[int]:
        """The outcomes of an edge, newest first."""
        outcome = self.edge_outcome[edge]
        while outcome != NONE:
            yield outcome
            outcome = self.outcome_next[outcome]

    def node_priors(self, node: int) -> array[float]:
        """P(s,·): one probability per action."""
        first, count = self.first_slot[node], self.num_actions[node]
        return (
            self.priors[first : first + count] if first != NONE else array("d", [1.0 / (count or 1)]) * count
        )

    def action_values(self, node: int) -> array[float]:
        """Q(s,·): one value per action; 0 where there is none yet."""
        first, count = self.first_slot[node], self.num_actions[node]
        return self.slot_value[first : first + count] if first != NONE else array("d", [0.0]) * count

    def action_begun(self, node: int) -> array[int]:
        """N(s,·) + O(s,·): one count per action."""
        first, count = self.first_slot[node], self.num_actions[node]
        return self.slot_begun[first : first + count] if first != NONE else array("i", [0]) * count

    def action_visits(self, node: int) -> list[int]:
        """N(s,·): visits of each action."""
        return [self.edge_visits[edge] if edge >= 0 else 0 for edge in self.edges(node)]

    @property
    def in_flight(self) -> Column[int]:
        """O(s) by node: simulations through s that wait for their outcome."""
        return Column(self, lambda n: self.begun[n] - self.visits[n])

    @property
    def edge_in_flight(self) -> Column[int]:
        """O(s,a), by edge."""
        return Column(self.edge_slot, lambda e: self.slot_begun[self.edge_slot[e]] - self.edge_visits[e])

    @property
    def edge_value(self) -> Column[float]:
        """Q(s,a), by edge."""
        return Column(self.edge_slot, lambda e: self.slot_value[self.edge_slot[e]])

    @property
    def edge_action(self) -> Column[int]:
        """The action a, by edge."""
        return Column(self.edge_slot, lambda e: self.edge_slot[e] - self.first_slot[self.edge_node[e]])

    @property
    def parent(self) -> Column[int]:
        """By node: the state from which it was first reached; NONE for the root."""
        return Column(self, lambda n: self.edge_node[self._entry_edge(n)] if n else NONE)

    @property
    def action(self) -> Column[int]:
        """By node: the action that first led to it; NONE for the root."""
        return Column(self, lambda n: self.edge_action[self._entry_edge(n)] if n else NONE)

    @property
    def prior(self) -> Column[float]:
        """By node: prior of the action that first led to it; 1 for the root."""
        return Column(self, lambda n: self._entry_prior(n) if n else 1.0)

    @property
    def reward(self) -> Column[float]:
        """By node: reward of the transition that first led to it; 0 for the root."""
        return Column(self, lambda n: self.outcome_reward[self.entry[n]] if n else 0.0)

    @property
    def discount(self) -> Column[float]:
        """By node: discount of that transition, 0 at a terminal state; 1 for the root."""
        return Column(self, self._entry_discount)

    @property
    def children(self) -> Column[list[int]]:
        """By node: for each action the state that it last led to for the first time, or NONE."""
        return Column(self, lambda n: [self._newest(edge) for edge in self.edges(n)])

    def _entry_edge(self, node: int) -> int:
        return self.outcome_edge[self.entry[node]]

    def _entry_prior(self, node: int) -> float:
        edge = self._entry_edge(node)
        return self.priors[self.edge_slot[edge]]

    def _entry_discount(self, node: int) -> float:
        if node == 0:
            return 1.0
        return 0.0 if self.flags[node] & TERMINATED else self.outcome_discount[self.entry[node]]

    def _newest(self, edge: int) -> int:
        outcome = self.edge_outcome[edge] if edge >= 0 else NONE
        return self.outcome_node[outcome] if outcome != NONE else NONE
