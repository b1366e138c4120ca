"""The record of one search's trials, and the rows of its tree.

Invariant: a checkpoint that a trial made is held here until no later trial can name it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rollout.branch import BranchResult
from rollout.sandbox.base import Checkpoint
from rollout.search.base import ROOT_TRIAL, Commit, Search, Trial
from rollout.trajectory.digest import value_digest
from rollout.trajectory.rows import NodeRow
from rollout.types import RngPolicy, Step, Value

__all__ = ["Position", "Source", "TrialBook", "child_of"]


@dataclass(frozen=True, slots=True)
class Position:
    """Where an episode is: what the environment said last, and the checkpoint of that state."""

    step: Step
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class Source:
    """What a later trial may begin from: a saved state and its legal actions."""

    checkpoint: Checkpoint
    actions: Sequence[Value]


@dataclass(slots=True)
class TrialBook:
    """What is known of each trial of one search: where it led, and what became of it.

    Attributes:
        position: The root.
        root_actions: The legal actions there.
        sources: By trial id: what later trials may begin from. Its checkpoints are the ones held, but
            for those of the trials in `spent`.
        spent: Trials whose checkpoints were given back, because no later trial will begin there.
        results: By trial id: the trial and the result of its branch.
        node_trials: By node id: the trial that made the node.
        trial_nodes: By trial id: the node that it made.
    """

    position: Position
    root_actions: Sequence[Value]
    sources: dict[int, Source] = field(init=False)
    results: dict[int, tuple[Trial, BranchResult]] = field(
        default_factory=dict[int, tuple[Trial, BranchResult]]
    )
    node_trials: dict[int, int] = field(default_factory=dict[int, int])
    trial_nodes: dict[int, int] = field(default_factory=lambda: {ROOT_TRIAL: 0})

    spent: set[int] = field(default_factory=set[int])

    def __post_init__(self) -> None:
        self.sources = {ROOT_TRIAL: Source(self.position.checkpoint, self.root_actions)}

    def commit(self, commits: Sequence[Commit]) -> list[Checkpoint]:
        """Notes which node a trial became; returns checkpoints that no later trial can name."""
        useless: list[Checkpoint] = []
        for commit in commits:
            if commit.is_new and commit.node_id is not None:
                self.node_trials[commit.node_id] = commit.trial_id
                self.trial_nodes[commit.trial_id] = commit.node_id
            elif (source := self.sources.pop(commit.trial_id, None)) is not None:
                useless.append(source.checkpoint)
        return useless

    def reroot(self, search: Search, position: Position, actions: Sequence[Value]) -> list[Checkpoint]:
        """Goes on with a search that has advanced to the state of `position`, which has a hash.

        The root's checkpoint is now that of the position.

        Returns:
            Checkpoints that no later trial can name.
        """
        kept = {trial: node for node, trial in enumerate(search.tree.trial) if node}
        gone = [trial for trial in self.sources if trial != ROOT_TRIAL and trial not in kept]
        useless = [self.sources[trial].checkpoint for trial in gone if trial not in self.spent]
        for trial in gone:
            del self.sources[trial]
        self.spent.intersection_update(kept)
        self.position, self.root_actions = position, actions
        self.sources[ROOT_TRIAL] = Source(position.checkpoint, actions)
        self.results = {trial: self.results[trial] for trial in kept}
        self.node_trials = {node: trial for trial, node in kept.items()}
        self.trial_nodes = {ROOT_TRIAL: 0, **kept}
        return useless

    def last_of(self, search: Search, trials: Sequence[Trial], *, advances: bool) -> set[int]:
        """Trials in flight that are the last to begin where they do, retries apart.

        Never of the root: the move that is played in earnest begins there too.
        """
        last = {trial.source: trial.trial_id for trial in trials if trial.source != ROOT_TRIAL}
        return {
            trial_id
            for source, trial_id in last.items()
            if search.closes(self.trial_nodes[source], advances=advances)
        }

    def spend(self, search: Search, trials: Sequence[Trial]) -> list[Checkpoint]:
        """Notes which states the trials were the last branches of; returns their checkpoints."""
        useless: list[Checkpoint] = []
        for trial_id in sorted({trial.source for trial in trials} - self.spent - {ROOT_TRIAL}):
            if search.is_spent(self.trial_nodes[trial_id]):
                self.spent.add(trial_id)
                useless.append(self.sources[trial_id].checkpoint)
        return useless

    def held(self) -> list[Checkpoint]:
        """The checkpoints that the search has made and not released."""
        gone = self.spent | {ROOT_TRIAL}
        return [source.checkpoint for trial_id, source in self.sources.items() if trial_id not in gone]

    def rows(self, search: Search, t: int, policy: RngPolicy) -> list[NodeRow]:
        """Every node by ascending id, then every failed branch, with ids after the last node's."""
        root = NodeRow(
            t=t,
            node_id=0,
            parent_id=None,
            depth=0,
            action=None,
            visits=int(search.tree.visits[0]),
            value=float(search.tree.value[0]),
            checkpoint_id=self.position.checkpoint.id,
            private_bytes=self.position.checkpoint.private_bytes,
            observation_digest=value_digest(self.position.step.observation),
            state_hash=self.position.step.state_hash,
            action_visits=search.action_visits(),
            policy_target=search.policy_target(),
        )
        returns = search.returns()
        root = replace(root, n_step_return=returns[0])
        nodes = [
            self._node_row(search, t, policy, node_id, returns[node_id])
            for node_id in sorted(self.node_trials)
        ]
        failed = [trial_id for trial_id, (_, result) in self.results.items() if result.failure is not None]
        first_id = len(search.tree)
        failures = [
            self._failure_row(t, policy, first_id + k, trial_id) for k, trial_id in enumerate(sorted(failed))
        ]
        return [root, *nodes, *failures]

    def _node_row(
        self, search: Search, t: int, policy: RngPolicy, node_id: int, n_step_return: float
    ) -> NodeRow:
        trial, result = self.results[self.node_trials[node_id]]
        tree = search.tree
        # Not the trial's own source: that may be gone, where joined paths lead here and the root has moved.
        parent_id = int(tree.parent[node_id])
        source = self.sources[self.node_trials.get(parent_id, ROOT_TRIAL)]
        action_visits = tree.action_visits(node_id)
        step = result.steps[-1]
        checkpoint = result.checkpoint
        return NodeRow(
            t=t,
            node_id=node_id,
            parent_id=parent_id,
            depth=int(tree.depth[node_id]),
            action=source.actions[tree.action[node_id]],
            visits=int(search.tree.visits[node_id]),
            value=float(search.tree.value[node_id]),
            prior=float(search.tree.prior[node_id]),
            reward=step.reward,
            terminated=step.terminated,
            truncated=step.truncated,
            checkpoint_id=checkpoint.id if checkpoint is not None else None,
            state_hash=step.state_hash,
            rng_policy=policy.value,
            rng_seed=trial.seed if policy is RngPolicy.SEEDED else None,
            duration_s=result.duration_s,
            private_bytes=checkpoint.private_bytes if checkpoint is not None else None,
            action_visits=action_visits,
            policy_target=search.policy_target(node_id) if any(action_visits) else None,
            n_step_return=n_step_return,
            observation_digest=value_digest(step.observation),
        )

    def _failure_row(self, t: int, policy: RngPolicy, node_id: int, trial_id: int) -> NodeRow:
        trial, result = self.results[trial_id]
        return NodeRow(
            t=t,
            node_id=node_id,
            parent_id=self.trial_nodes[trial.source],
            depth=trial.depth,
            action=self.sources[trial.source].actions[trial.action],
            visits=0,
            value=None,
            rng_policy=policy.value,
            rng_seed=trial.seed if policy is RngPolicy.SEEDED else None,
            duration_s=result.duration_s,
            failure=result.failure,
        )


def child_of(search: Search, node_id: int, action: int) -> int | None:
    """The node that an action leads to; None when it was never tried."""
    child = int(search.tree.children[node_id][action])
    return child if child >= 0 else None
