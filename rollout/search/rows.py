"""The rows of a search tree: its stored columns, and how rows are appended to them.

Not guaranteed: that a caller who writes into a column keeps the invariants that `rollout.search.tree` states.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

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
    "Rows",
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


_ONE_UNTRIED = array("i", [UNTRIED])


class Rows:
    """The stored columns of a search tree; see `rollout.search.tree` for their layout.

    Attributes:
        visits: N(s): simulations that passed through or ended in s, by node.
        value: V(s), by node.
        raw_value: Mean of the evaluations of s from outside, by node.
        evaluations: Simulations that ended in s, by node.
        begun: N(s) + O(s): simulations backed up and in flight, by node.
        depth: Actions from the root, by node.
        num_actions: Legal and illegal actions, by node.
        first_slot: Where their slots begin, or NONE, by node.
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
        self.first_slot.append(NONE)
        self.flags.append(flags)
        self.open_ended.append(open_ended)
        self.state_hash.append(state_hash)
        self.trial.append(trial)
        self.entry.append(NONE)
        if num_actions and (prior is not None or mask is not None):
            self._add_slots(node, prior, mask)
        return node

    def _add_slots(self, node: int, prior: Sequence[float] | None, mask: Sequence[bool] | None) -> None:
        count = self.num_actions[node]
        self.first_slot[node] = len(self.slots)
        if mask is None:
            self.slots.extend(_ONE_UNTRIED * count)
            self.priors.extend(array("d", (1.0 / count,)) * count if prior is None else prior)
        else:
            share = 1.0 / sum(mask)
            self.slots.extend([UNTRIED if legal else ILLEGAL for legal in mask])
            self.priors.extend([share if legal else 0.0 for legal in mask] if prior is None else prior)
        self.slot_value.frombytes(bytes(8 * count))
        self.slot_begun.frombytes(bytes(4 * count))

    def expand(self, node: int) -> int:
        """The first slot of a state that has actions; it gets its slots if it has none yet."""
        if self.first_slot[node] == NONE:
            self._add_slots(node, None, None)
        return self.first_slot[node]

    def add_edge(self, node: int, action: int) -> int:
        """Appends the edge of an untried action."""
        edge, slot = len(self.edge_visits), self.expand(node) + action
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

    def set_state(self, edge: int, state: int) -> None:
        """Sets the state of an edge."""
        if self.edge_outcome[edge] != NONE:
            was_barred, is_barred = self.edge_state[edge] > SETTLED, state > SETTLED
            self.num_unready[self.edge_node[edge]] += is_barred - was_barred
        self.edge_state[edge] = state
