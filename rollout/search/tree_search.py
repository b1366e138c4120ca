"""The search as a state machine: ask for trials, be told their outcomes.

    plan a path → count it as in flight → ask for the branch at its end → be told → attach the node → backward

Which path comes next is an `Algorithm`'s business, and what it does to the values a `Backward`'s; this module
owns what is in flight.

Invariants:

- Each simulation asks for at most one branch; one that ends in a node that needs none is backed up in `ask`.
- A retried branch has the path and the seed of the first attempt, so a failure that passes leaves no trace.
  One that does not pass takes its in-flight counts back, uses up a simulation of the budget, and closes its
  action to further branches.
- Deterministic mode: a wave is planned as a whole before the first of its outcomes is taken in, and taken in
  as a whole, in the order of asking, once the last one is there. So a seed gives one tree for each size of
  the wave, whatever the number of workers and their timing.
- Free-running mode: an outcome is taken in at once, and the next path planned with it.

Not guaranteed: `wave` trials in every wave. In a small tree most actions wait for branches in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rollout.errors import SearchError
from rollout.search.algorithm import Algorithm
from rollout.search.attach import Attacher
from rollout.search.backward import Backward
from rollout.search.base import Commit, Outcome, Trial
from rollout.search.checks import check_outcome
from rollout.search.decide import tree_returns
from rollout.search.descend import Path
from rollout.search.reroot import reroot
from rollout.search.seeds import branch_seed
from rollout.search.tree import (
    GIVEN_UP,
    NONE,
    OPEN,
    PENDING,
    PROVEN,
    SETTLED,
    TERMINATED,
    UNTRIED,
    Tree,
)
from rollout.search.widening import Drawing, SingleOutcome
from rollout.types import Failure

__all__ = ["Limits", "TreeSearch"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a search does, and how much of it at once.

    Attributes:
        simulations: Simulations in all; a branch that was given up counts as one.
        wave: Trials in flight at once.
        deterministic: Take outcomes in a wave at a time, in the order of asking.
        max_retries: How often a failed branch is tried again.
        common_random_numbers: Siblings get equal seeds at equal draws.
    """

    simulations: int
    wave: int = 1
    deterministic: bool = True
    max_retries: int = 2
    common_random_numbers: bool = False


@dataclass(slots=True)
class _Slot:
    """A simulation whose branch is asked for, and what came of it."""

    path: Path
    source: int
    action: int
    seed: int
    attempts: int = 0
    trial_id: int = 0
    result: Outcome | Failure | None = None


class TreeSearch:
    """A search from one root; see `rollout.search.base.Search` for the contract.

    Args:
        tree: A tree whose root is evaluated.
        algorithm: Where simulations go, and what is read off the root.
        backward: What an outcome changes.
        attacher: Makes nodes of outcomes.
        drawing: Whether an action may have more than one outcome.
        limits: How much is done.
        seed: Seeds of branches derive from it.
    """

    def __init__(
        self,
        tree: Tree,
        algorithm: Algorithm,
        backward: Backward,
        attacher: Attacher,
        drawing: Drawing,
        limits: Limits,
        seed: int,
    ) -> None:
        self._tree = tree
        self._algorithm = algorithm
        self._backward = backward
        self._attacher = attacher
        self._drawing = drawing
        self._limits = limits
        self._seed = seed
        self._ready: deque[_Slot] = deque()
        self._in_flight: dict[int, _Slot] = {}
        self._wave: list[_Slot] = []
        self._num_unresolved = 0
        self._num_started = 0
        self._num_trials = 0
        self._exhausted = False
        self._counts = dict.fromkeys(("simulations", "failures", "retries", "given_up", "merged"), 0)
        algorithm.begin(seed, limits.simulations)

    @property
    def tree(self) -> Tree:
        """The tree so far."""
        return self._tree

    @property
    def done(self) -> bool:
        """The budget is spent, or nothing is left to try, and nothing is in flight."""
        spent = self._exhausted or self._num_started >= self._limits.simulations
        return spent and not self._num_unresolved

    def ask(self, n: int) -> list[Trial]:
        """At most n trials; none while all depends on trials in flight."""
        trials: list[Trial] = []
        while len(trials) < n:
            if not self._ready:
                self._fill()
                if not self._ready:
                    break
            trials.append(self._issue(self._ready.popleft()))
        return trials

    def tell(self, trial_id: int, outcome: Outcome | Failure) -> Sequence[Commit]:
        """Takes in what came of a trial; one that was told before changes nothing.

        Raises:
            SearchError: The trial is unknown, or the outcome cannot be accepted; the trial stays in flight.
        """
        slot = self._in_flight.get(trial_id)
        if slot is None:
            if 0 < trial_id <= self._num_trials:
                return ()
            raise SearchError(f"told of trial {trial_id}, which was never asked for")
        if isinstance(outcome, Failure):
            self._counts["failures"] += 1
            if outcome.retryable and slot.attempts <= self._limits.max_retries:
                self._counts["retries"] += 1
                del self._in_flight[trial_id]
                self._ready.appendleft(slot)
                return (Commit(trial_id, None, False),)
        else:
            check_outcome(outcome)
            self._algorithm.check(slot.path, outcome)
        del self._in_flight[trial_id]
        slot.result = outcome
        if not self._limits.deterministic:
            return (self._commit(slot),)
        if self._ready or self._in_flight:
            return ()
        wave, self._wave = self._wave, []
        return [self._commit(resolved) for resolved in wave]

    def best(self) -> int:
        """The action to play at the root.

        Raises:
            SearchError: Every branch at the root failed, or none has been told yet.
        """
        return self._algorithm.best()

    def action_visits(self) -> Sequence[int]:
        """Visits of each root action."""
        return self._tree.action_visits(0)

    def policy_target(self, node: int = 0) -> Sequence[float]:
        """The policy to train towards: one probability per action of a node."""
        return self._algorithm.policy_target(node)

    def returns(self) -> Sequence[float]:
        """By node: the discounted return of the most visited actions from there on."""
        return tree_returns(self._tree)

    def root_value(self) -> float:
        """V(root)."""
        return self._tree.value[0]

    def is_spent(self, node_id: int) -> bool:
        """Whether no later trial will begin from a node: it is final, or nothing of it can be drawn again."""
        tree = self._tree
        if tree.flags[node_id]:
            return True
        return not tree.open_ended[node_id] and not any(
            edge == UNTRIED or (edge >= 0 and self._can_be_drawn(edge)) for edge in tree.edges(node_id)
        )

    def closes(self, node_id: int, *, advances: bool) -> bool:
        """Whether no trial will begin from a node after those in flight, but for their retries."""
        tree = self._tree
        if any(slot.source == tree.trial[node_id] for slot in self._ready):
            return False
        if not advances and (self._exhausted or self._num_started >= self._limits.simulations):
            return True
        return (
            isinstance(self._drawing, SingleOutcome)
            and not tree.open_ended[node_id]
            and not any(edge == UNTRIED for edge in tree.edges(node_id))
        )

    def advance(self, action: int, state_hash: str | None, seed: int) -> bool:
        """Makes the state that a played action led to the root, if the tree has it.

        Raises:
            SearchError: Trials are in flight.
        """
        node = self.find(action, state_hash)
        if node is None:
            return False
        reroot(self._tree, node)
        self._attacher.index()
        self._seed = seed
        self._num_started = 0
        self._exhausted = False
        self._counts = dict.fromkeys(self._counts, 0)
        self._algorithm.begin(seed, self._limits.simulations)
        return True

    def find(self, action: int, state_hash: str | None) -> int | None:
        """The node that `advance` would make the root; None when there is none that can be searched.

        Raises:
            SearchError: Trials are in flight.
        """
        if self._num_unresolved:
            raise SearchError("cannot move the root while trials are in flight")
        tree = self._tree
        if not self._algorithm.can_advance or not 0 <= action < tree.num_actions[0]:
            return None
        edge = tree.edge(0, action)
        for outcome in tree.outcomes(edge) if edge >= 0 else ():
            node = tree.outcome_node[outcome]
            is_the_same = tree.state_hash[node] == state_hash
            if is_the_same and (state_hash is not None or isinstance(self._drawing, SingleOutcome)):
                goes_on = tree.num_actions[node] or tree.open_ended[node]
                return node if goes_on else None
        return None

    def stats(self) -> Mapping[str, float]:
        """Counters for the report."""
        return {
            **self._counts,
            "trials": self._num_trials,
            "nodes": len(self._tree),
            "depth": max(self._tree.depth),
        }

    def _fill(self) -> None:
        """Plans simulations until one is ready to be issued (deterministic mode: a whole wave)."""
        limits = self._limits
        if limits.deterministic and self._num_unresolved:
            return
        while self._num_started < limits.simulations and self._num_unresolved < limits.wave:
            path = self._algorithm.plan()
            if path is None:
                self._exhausted = not self._num_unresolved
                return
            self._num_started += 1
            self._begin(path, 1)
            if path.leaf != NONE:
                self._backup(path, self._leaf_value(path.leaf))
                continue
            slot = self._start(path)
            self._ready.append(slot)
            if not limits.deterministic:
                return
            self._wave.append(slot)

    def _begin(self, path: Path, count: int) -> None:
        """Counts simulations along a path as begun; -1 takes one back."""
        tree = self._tree
        begun, edge_node, slot_begun, edge_slot = tree.begun, tree.edge_node, tree.slot_begun, tree.edge_slot
        for edge in path.edges:
            slot_begun[edge_slot[edge]] += count
            begun[edge_node[edge]] += count

    def _start(self, path: Path) -> _Slot:
        """The branch at the end of a path."""
        tree, edge = self._tree, path.edges[-1]
        node, draw = tree.edge_node[edge], tree.edge_draws[edge]
        action = tree.edge_slot[edge] - tree.first_slot[node]
        tree.edge_draws[edge] = draw + 1
        if self._drawing.is_waiting(tree, edge):
            tree.set_state(edge, PENDING)
        self._num_unresolved += 1
        salt = 0 if self._limits.common_random_numbers else action
        return _Slot(path, tree.trial[node], action, branch_seed(self._seed, node, salt, draw))

    def _can_be_drawn(self, edge: int) -> bool:
        """Whether a branch of this edge, perhaps a retry, may still be asked for."""
        state = self._tree.edge_state[edge]
        if isinstance(self._drawing, SingleOutcome):
            return state == PENDING
        return state == OPEN or self._tree.edge_in_flight[edge] > 0

    def _issue(self, slot: _Slot) -> Trial:
        self._num_trials += 1
        slot.attempts += 1
        slot.trial_id = self._num_trials
        self._in_flight[slot.trial_id] = slot
        return Trial(slot.trial_id, slot.source, slot.action, slot.seed, len(slot.path.edges))

    def _commit(self, slot: _Slot) -> Commit:
        """Takes an outcome into the tree, or a path that failed back."""
        tree, path = self._tree, slot.path
        self._num_unresolved -= 1
        edge = path.edges[-1]
        if not isinstance(slot.result, Outcome):
            self._counts["given_up"] += 1
            self._begin(path, -1)
            tree.set_state(edge, GIVEN_UP if tree.edge_outcome[edge] == NONE else SETTLED)
            return Commit(slot.trial_id, None, False)
        attached = self._attacher.attach(edge, slot.result, slot.trial_id)
        tree.set_state(edge, SETTLED if tree.edge_state[edge] in (GIVEN_UP, SETTLED) else OPEN)
        path.outcomes.append(attached)
        path.leaf = tree.outcome_node[attached]
        is_new = tree.trial[path.leaf] == slot.trial_id
        self._counts["merged"] += not is_new
        is_final = tree.flags[path.leaf] & (TERMINATED | PROVEN)
        self._backup(path, self._leaf_value(path.leaf) if is_final else float(slot.result.node.value))
        return Commit(slot.trial_id, path.leaf, is_new)

    def _leaf_value(self, node: int) -> float:
        """The value of a node that needs no branch."""
        flags = self._tree.flags[node]
        if flags & PROVEN:
            return self._tree.value[node]
        return 0.0 if flags & TERMINATED else self._tree.raw_value[node]

    def _backup(self, path: Path, value: float) -> None:
        self._backward(self._tree, path.edges, path.outcomes, path.leaf, value)
        self._counts["simulations"] += 1
