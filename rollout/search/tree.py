"""The search tree as a struct of arrays: states, actions that were tried in them, and what these led to.

Three tables, each a set of parallel columns; a row is an index, and rows are only appended:

    node      a state s            visits N(s), value V(s), raw value, ...        node 0 is the root
    edge      an action a in s     visits N(s,a), value Q(s,a), in flight O(s,a)  made when a is first tried
    outcome   a state reached by a draws n(s,a,s'), visits, reward R, discount    one per edge without chance

The actions of a node are `num_actions[s]` consecutive slots, from `first_slot[s]` on. `slots` has the edge of
each action, or `UNTRIED`, or `ILLEGAL`; `priors`, `slot_value` and `slot_begun` have the same layout, so that
what a tree policy compares lies side by side. An edge's outcomes are a linked list from `edge_outcome` on,
through `outcome_next`.

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
from collections.abc import Iterator, Sequence

from rollout.search.column import Column

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

NONE = -1
"""No row: an edge without outcome, a root without parent."""
UNTRIED = -1
"""In `slots`: a legal action without an edge."""
ILLEGAL = -2
"""In `slots`: an action that the mask forbids."""

TERMINATED, TRUNCATED, PROVEN = 1, 2, 4
"""Bits of `flags`; a node with any of them is never expanded."""

OPEN, SETTLED, PENDING, GIVEN_UP, LOST = 0, 1, 2, 3, 4
"""States of an edge in `edge_state`; up to `SETTLED` it can be selected.

Settled: a branch failed for good, so the outcomes that it has are all that it will get. Pending: without an
outcome until a branch in flight is back. Given up: failed for good without any. Lost: proven to be a loss.
"""


class Tree:
    """A search tree; see the module for its layout.

    Attributes:
        visits: N(s): simulations that passed through or ended in s, by node.
        value: V(s), by node.
        raw_value: Mean of the evaluations of s from outside, by node.
        evaluations: Simulations that ended in s, by node.
        begun: N(s) + O(s): simulations backed up and in flight, by node.
        depth: Actions from the root, by node.
        num_actions: Legal and illegal actions that have a slot, by node.
        first_slot: Where these slots begin, by node.
        num_unready: Actions that a tree policy cannot compare by visits and value alone, by node: without
            an outcome, or in a state above SETTLED; where the node is open-ended one more, the next.
        flags: Bits `TERMINATED`, `TRUNCATED`, `PROVEN`, by node.
        state_hash: Digest of the state or None, by node.
        trial: The trial that made it (the one whose checkpoint later trials begin from), by node.
        entry: The outcome through which it was first reached, by node.
        slots: Edge of each action of each node, `UNTRIED` or `ILLEGAL`.
        priors: P(s,a), aligned with `slots`.
        open_ended: Whether new actions may be added at s, by node.
        slot_value: Q(s,a), aligned with `slots`; 0 without an edge.
        slot_begun: N(s,a) + O(s,a), aligned with `slots`; 0 without an edge.
        edge_node: s, by edge.
        edge_slot: Where its action is in `slots`, by edge.
        edge_visits: N(s,a), by edge.
        edge_draws: Branches asked for so far, by edge.
        edge_outcome: Its newest outcome or NONE, by edge.
        edge_state: OPEN, SETTLED, PENDING, GIVEN_UP or LOST, by edge.
        outcome_node: s', by outcome.
        outcome_edge: (s,a), by outcome.
        outcome_next: The next older outcome of the same edge or NONE, by outcome.
        outcome_draws: n(s,a,s'): fresh branches that came out here, by outcome.
        outcome_visits: Simulations that passed here, by outcome.
        outcome_reward: Mean reward R over its draws, by outcome.
        outcome_discount: Discount γ of the transition, by outcome.
    """

    def __init__(self) -> None:
        self.visits: list[int] = []
        self.begun: list[int] = []
        self.value = array("d")
        self.raw_value = array("d")
        self.evaluations = array("i")
        self.depth = array("i")
        self.num_actions = array("i")
        self.num_unready = array("i")
        self.first_slot = array("q")
        self.flags = bytearray()
        self.open_ended = bytearray()
        self.state_hash: list[str | None] = []
        self.trial = array("q")
        self.entry = array("i")
        self.slots = array("i")
        self.priors = array("d")
        self.slot_value = array("d")
        self.slot_begun = array("i")
        self.edge_visits: list[int] = []
        self.edge_outcome = array("i")
        self.edge_node = array("i")
        self.edge_slot = array("q")
        self.edge_draws = array("i")
        self.edge_state = bytearray()
        self.outcome_node = array("i")
        self.outcome_edge = array("i")
        self.outcome_next = array("i")
        self.outcome_draws = array("i")
        self.outcome_visits = array("i")
        self.outcome_reward = array("d")
        self.outcome_discount = array("d")

    def __len__(self) -> int:
        return len(self.visits)

    def add_node(
        self,
        num_actions: int,
        *,
        prior: Sequence[float] | None = None,
        mask: Sequence[bool] | None = None,
        open_ended: bool = False,
        depth: int = 0,
        flags: int = 0,
        state_hash: str | None = None,
        trial: int = 0,
    ) -> int:
        """Appends a state without visits; a prior of None is uniform over the legal actions."""
        node = len(self.visits)
        self.visits.append(0)
        self.begun.append(0)
        self.value.append(0.0)
        self.raw_value.append(0.0)
        self.evaluations.append(0)
        self.depth.append(depth)
        self.num_actions.append(num_actions)
        self.num_unready.append(num_actions + open_ended)
        self.first_slot.append(len(self.slots))
        self.flags.append(flags)
        self.open_ended.append(open_ended)
        self.state_hash.append(state_hash)
        self.trial.append(trial)
        self.entry.append(NONE)
        if mask is None:
            self.slots.extend([UNTRIED] * num_actions)
        else:
            self.slots.extend([UNTRIED if legal else ILLEGAL for legal in mask])
        if prior is not None:
            self.priors.extend(prior)
        elif mask is None:
            self.priors.extend([1.0 / num_actions] * num_actions if num_actions else ())
        else:
            share = 1.0 / sum(mask)
            self.priors.extend([share if legal else 0.0 for legal in mask])
        self.slot_value.frombytes(bytes(8 * num_actions))
        self.slot_begun.frombytes(bytes(4 * num_actions))
        return node

    def add_edge(self, node: int, action: int) -> int:
        """Appends the edge of an untried action."""
        edge, slot = len(self.edge_visits), self.first_slot[node] + action
        self.edge_visits.append(0)
        self.edge_outcome.append(NONE)
        self.edge_node.append(node)
        self.edge_slot.append(slot)
        self.edge_draws.append(0)
        self.edge_state.append(OPEN)
        self.slots[slot] = edge
        return edge

    def add_outcome(self, edge: int, node: int, reward: float, discount: float) -> int:
        """Appends an outcome of an edge, without draws or visits."""
        outcome, older = len(self.outcome_node), self.edge_outcome[edge]
        if older == NONE and self.edge_state[edge] <= SETTLED:
            self.num_unready[self.edge_node[edge]] -= 1
        self.outcome_node.append(node)
        self.outcome_edge.append(edge)
        self.outcome_next.append(older)
        self.outcome_draws.append(0)
        self.outcome_visits.append(0)
        self.outcome_reward.append(reward)
        self.outcome_discount.append(discount)
        self.edge_outcome[edge] = outcome
        if self.entry[node] == NONE and node != 0:
            self.entry[node] = outcome
        return outcome

    def add_action(self, node: int) -> int:
        """Adds an action to an open-ended state and returns its index; priors stay uniform.

        Its slots move to the end when they have no room to grow; their number doubles, so that an action
        costs O(1) on average.
        """
        count = self.num_actions[node]
        if count == self.room(node):
            self._move_slots(node, max(1, 2 * count))
        self.num_actions[node] = count + 1
        self.num_unready[node] += 1
        first = self.first_slot[node]
        self.priors[first : first + count + 1] = array("d", [1.0 / (count + 1)] * (count + 1))
        return count

    def _move_slots(self, node: int, room: int) -> None:
        """Moves a node's slots to the end, where there is room for more."""
        count, first, moved = self.num_actions[node], self.first_slot[node], len(self.slots)
        self.slots.extend([*self.slots[first : first + count], *[UNTRIED] * (room - count)])
        for column in (self.priors, self.slot_value, self.slot_begun):
            column.frombytes(column[first : first + count].tobytes())
            column.frombytes(bytes((room - count) * column.itemsize))
        for edge in self.slots[moved : moved + count]:
            if edge >= 0:
                self.edge_slot[edge] += moved - first
        self.first_slot[node] = moved

    def room(self, node: int) -> int:
        """Slots that a node holds: its actions, or in an open-ended state the next power of two."""
        count = self.num_actions[node]
        if not self.open_ended[node] or count == 0:
            return count
        return 1 << (count - 1).bit_length()

    def edge(self, node: int, action: int) -> int:
        """The edge of an action; UNTRIED or ILLEGAL when it has none."""
        return self.slots[self.first_slot[node] + action]

    def edges(self, node: int) -> array[int]:
        """The slots of a node: one edge, UNTRIED or ILLEGAL per action."""
        first = self.first_slot[node]
        return self.slots[first : first + self.num_actions[node]]

    def set_state(self, edge: int, state: int) -> None:
        """Sets the state of an edge."""
        if self.edge_outcome[edge] != NONE:
            was_barred, is_barred = self.edge_state[edge] > SETTLED, state > SETTLED
            self.num_unready[self.edge_node[edge]] += is_barred - was_barred
        self.edge_state[edge] = state

    def is_proven(self, edge: int) -> bool:
        """Whether the only outcome of an edge is proven (a search with proofs has single outcomes)."""
        outcome = self.edge_outcome[edge]
        return outcome != NONE and bool(self.flags[self.outcome_node[outcome]] & PROVEN)

    def outcomes(self, edge: int) -> Iterator[int]:
        """The outcomes of an edge, newest first."""
        outcome = self.edge_outcome[edge]
        while outcome != NONE:
            yield outcome
            outcome = self.outcome_next[outcome]

    def node_priors(self, node: int) -> array[float]:
        """P(s,·): one probability per action."""
        first = self.first_slot[node]
        return self.priors[first : first + self.num_actions[node]]

    def action_values(self, node: int) -> array[float]:
        """Q(s,·): one value per action; 0 where there is none yet."""
        first = self.first_slot[node]
        return self.slot_value[first : first + self.num_actions[node]]

    def action_begun(self, node: int) -> array[int]:
        """N(s,·) + O(s,·): one count per action."""
        first = self.first_slot[node]
        return self.slot_begun[first : first + self.num_actions[node]]

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
