"""A root-parallel ensemble: independent searches from one root, whose root statistics are added up.

Members differ in their seeds alone. Each is a search of its own, so an ensemble keeps every property of its
members; they never wait for each other.

Trials and nodes have ids of the ensemble's own. All roots are node 0, so the members' trees form one tree, in
which the root has up to one child per action and member.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from rollout.errors import SearchError
from rollout.search.base import ROOT_TRIAL, Commit, Outcome, TreeView, Trial
from rollout.search.column import Column
from rollout.search.decide import MoveRule, lost_actions, sample_action, unless_lost
from rollout.search.seeds import branch_seed
from rollout.search.tree import NONE, PROVEN, Tree
from rollout.search.tree_search import TreeSearch
from rollout.types import Failure, derive_seed

__all__ = ["Ensemble", "Forest"]

T = TypeVar("T")


class Ensemble:
    """Searches from one root as one search; see `rollout.search.base.Search` for the contract.

    Args:
        members: At least one, all from the same root.
        move: How the move is read off the sums at the root.
        seed: Breaks ties and draws tempered moves.
    """

    def __init__(self, members: Sequence[TreeSearch], move: MoveRule, seed: int) -> None:
        self._members = list(members)
        self._move = move
        self._seed = seed
        self._trials: list[tuple[int, int]] = []
        self._ids: dict[tuple[int, int], int] = {}
        self._forest = Forest([member.tree for member in members], self._ids)

    @property
    def done(self) -> bool:
        """All members are."""
        return all(member.done for member in self._members)

    @property
    def tree(self) -> TreeView:
        """The members' trees as one."""
        return self._forest

    def ask(self, n: int) -> list[Trial]:
        """At most n trials, one member after the other, one each in turn."""
        trials: list[Trial] = []
        asking = list(enumerate(self._members))
        while asking and len(trials) < n:
            for index, member in tuple(asking):
                if len(trials) == n:
                    break
                asked = member.ask(1)
                if not asked:
                    asking.remove((index, member))
                trials += [self._outer(trial, index) for trial in asked]
        return trials

    def tell(self, trial_id: int, outcome: Outcome | Failure) -> Sequence[Commit]:
        """Passes an outcome to the member that asked.

        Raises:
            SearchError: As its `tell`.
        """
        if not 1 <= trial_id <= len(self._trials):
            raise SearchError(f"told of trial {trial_id}, which was never asked for")
        index, inner = self._trials[trial_id - 1]
        return [
            Commit(
                self._ids[index, commit.trial_id],
                None if commit.node_id is None else self._forest.add(index, commit.node_id),
                commit.is_new,
            )
            for commit in self._members[index].tell(inner, outcome)
        ]

    def best(self) -> int:
        """The action with the most visits, or the largest mean value, in all members together.

        What one member has proven is so for all: the proven move is played, and a lost action is not.

        Raises:
            SearchError: No action at the root has an outcome.
        """
        for member in self._members:
            if member.tree.flags[0] & PROVEN:
                return member.best()
        lost = set[int]().union(*(lost_actions(member.tree) for member in self._members))
        visits = unless_lost(self.action_visits(), lost)
        if not any(visits):
            raise SearchError("no branch at the root has an outcome: all failed, or none was told yet")
        if self._move.temperature:
            rng = np.random.default_rng(derive_seed(self._seed, "move"))
            return sample_action(visits, self._move.temperature, rng)
        values = self._action_values()

        def rank(action: int) -> tuple[float, float, int]:
            tie = branch_seed(self._seed, 0, action, 0)
            if self._move.by == "value":
                return values[action], visits[action], tie
            return visits[action], values[action], tie

        return max((action for action, n in enumerate(visits) if n), key=rank)

    def action_visits(self) -> Sequence[int]:
        """Visits of each root action, added up."""
        return self._forest.action_visits(0)

    def policy_target(self, node: int = 0) -> Sequence[float]:
        """At the root the mean of the members' targets, below it that of the member whose node it is."""
        targets = [self._members[index].policy_target(row) for index, row in self._forest.members(node)]
        width = max(len(row) for row in targets)
        share = 1.0 / len(targets)
        return [share * sum(row[a] for row in targets if a < len(row)) for a in range(width)]

    def returns(self) -> Sequence[float]:
        """As the members'; at the root their mean, weighted by visits."""
        found = [member.returns() for member in self._members]
        visits = [member.tree.visits[0] for member in self._members]
        root = sum(n * row[0] for n, row in zip(visits, found, strict=True)) / sum(visits)
        rows = (self._forest.members(node)[0] for node in range(1, len(self._forest)))
        return [root, *(found[index][row] for index, row in rows)]

    def root_value(self) -> float:
        """The mean of the members' root values, weighted by visits."""
        total = sum(member.tree.visits[0] for member in self._members)
        return sum(member.tree.visits[0] * member.root_value() for member in self._members) / total

    def is_spent(self, node_id: int) -> bool:
        """As the member's whose node it is; the root is every member's."""
        return all(self._members[member].is_spent(node) for member, node in self._forest.members(node_id))

    def closes(self, node_id: int, *, advances: bool) -> bool:
        """As the member's whose node it is; the root is every member's."""
        return all(
            self._members[member].closes(node, advances=advances)
            for member, node in self._forest.members(node_id)
        )

    def advance(self, action: int, state_hash: str | None, seed: int) -> bool:
        """Moves every member's root, or none.

        Raises:
            SearchError: Trials are in flight.
        """
        if any(member.find(action, state_hash) is None for member in self._members):
            return False
        self._seed = seed
        for index, member in enumerate(self._members):
            member.advance(action, state_hash, derive_seed(seed, "member", index))
        self._forest.number()
        return True

    def stats(self) -> Mapping[str, float]:
        """The members' counters added up; depth is the largest."""
        rows = [member.stats() for member in self._members]
        total = {name: sum(row[name] for row in rows) for name in rows[0]}
        return {**total, "depth": max(row["depth"] for row in rows)}

    def _action_values(self) -> list[float]:
        totals, weights = [0.0] * len(self.action_visits()), [0] * len(self.action_visits())
        for member in self._members:
            tree = member.tree
            for action, edge in enumerate(tree.edges(0)):
                if edge >= 0:
                    totals[action] += tree.edge_visits[edge] * tree.edge_value[edge]
                    weights[action] += tree.edge_visits[edge]
        return [total / weight if weight else 0.0 for total, weight in zip(totals, weights, strict=True)]

    def _outer(self, trial: Trial, index: int) -> Trial:
        """A member's trial under the ensemble's ids."""
        self._trials.append((index, trial.trial_id))
        self._ids[index, trial.trial_id] = len(self._trials)
        source = trial.source if trial.source == ROOT_TRIAL else self._ids[index, trial.source]
        return Trial(len(self._trials), source, trial.action, trial.seed, trial.depth)


class Forest:
    """The members' trees as the columns of one tree, whose root has up to one child per action and member.

    Args:
        trees: At least one.
        trial_ids: The ensemble's id of each (member, its own trial).
    """

    def __init__(self, trees: Sequence[Tree], trial_ids: Mapping[tuple[int, int], int]) -> None:
        self._trees = trees
        self._trial_ids = trial_ids
        self._rows: list[tuple[int, int]] = []
        self._ids: dict[tuple[int, int], int] = {}
        self.number()

    def __len__(self) -> int:
        return len(self._rows)

    def number(self) -> None:
        """Numbers all nodes anew: the root, then member by member."""
        self._rows = [(0, 0)]
        self._ids = {(member, 0): 0 for member in range(len(self._trees))}
        for member, tree in enumerate(self._trees):
            for node in range(1, len(tree)):
                self.add(member, node)

    def add(self, member: int, node: int) -> int:
        """The id of a member's node, given to it when it is first named."""
        row = self._ids.setdefault((member, node), len(self._rows))
        if row == len(self._rows):
            self._rows.append((member, node))
        return row

    def members(self, row: int) -> list[tuple[int, int]]:
        """(member, its own node) behind an id: one, but for the root, which all have."""
        return [self._rows[row]] if row else [(member, 0) for member in range(len(self._trees))]

    @property
    def visits(self) -> Sequence[int]:
        """N(s); of the root the sum over members."""
        return self._column("visits", sum(tree.visits[0] for tree in self._trees))

    @property
    def value(self) -> Sequence[float]:
        """V(s); of the root the mean over members, weighted by visits."""
        total = sum(tree.visits[0] for tree in self._trees)
        return self._column("value", sum(tree.visits[0] * tree.value[0] for tree in self._trees) / total)

    @property
    def raw_value(self) -> Sequence[float]:
        """Mean of the evaluations from outside."""
        return self._column("raw_value", self._trees[0].raw_value[0])

    @property
    def depth(self) -> Sequence[int]:
        """Actions from the root."""
        return self._column("depth", 0)

    @property
    def parent(self) -> Sequence[int]:
        """The node from which it was first reached; -1 for the root."""

        def get(row: int) -> int:
            member, node = self._rows[row]
            return self._ids[member, self._trees[member].parent[node]] if row else NONE

        return Column(self, get)

    @property
    def action(self) -> Sequence[int]:
        """The action that first led to it; -1 for the root."""
        return self._column("action", NONE)

    @property
    def prior(self) -> Sequence[float]:
        """Prior of that action; 1 for the root."""
        return self._column("prior", 1.0)

    @property
    def reward(self) -> Sequence[float]:
        """Reward of that transition; 0 for the root."""
        return self._column("reward", 0.0)

    @property
    def discount(self) -> Sequence[float]:
        """Discount of that transition, 0 at a terminal node; 1 for the root."""
        return self._column("discount", 1.0)

    @property
    def trial(self) -> Sequence[int]:
        """The trial that made it."""

        def get(row: int) -> int:
            member, node = self._rows[row]
            return self._trial_ids[member, self._trees[member].trial[node]] if row else ROOT_TRIAL

        return Column(self, get)

    @property
    def state_hash(self) -> Sequence[str | None]:
        """Digest of the state, or None."""
        return self._column("state_hash", self._trees[0].state_hash[0])

    @property
    def children(self) -> Sequence[Sequence[int]]:
        """For each action the node that it led to, or -1; at the root, in the first member that has one."""

        def get(row: int) -> list[int]:
            found: list[int] = []
            for member, node in self.members(row):
                for action, child in enumerate(self._trees[member].children[node]):
                    found += [NONE] * (action == len(found))
                    if found[action] == NONE and child != NONE:
                        found[action] = self._ids[member, child]
            return found

        return Column(self, get)

    def action_visits(self, node: int) -> list[int]:
        """N(s,·): visits of each action of a node; of the root the sums over members."""
        if node:
            member, row = self._rows[node]
            return self._trees[member].action_visits(row)
        counts = [tree.action_visits(0) for tree in self._trees]
        width = max(len(row) for row in counts)  # open-ended roots may have had unequal numbers of proposals
        return [sum(row[action] for row in counts if action < len(row)) for action in range(width)]

    def _column(self, name: str, root: T) -> Column[T]:
        """A column of the members' trees under the forest's ids, with `root` for node 0."""

        def get(row: int) -> T:
            member, node = self._rows[row]
            return getattr(self._trees[member], name)[node] if row else root

        return Column(self, get)
