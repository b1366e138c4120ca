"""The rows of the three tables as Python values, and the identity of an episode.

A row holds no run id, episode id, tree id or schema version: the sink adds those, so the rows of one
trajectory can never disagree about where they belong.

Time in an episode: row `t` of `steps` holds the observation *before* action `t`, the action, and what the
action brought. An episode of T actions therefore has T + 1 rows, and the last one holds the final
observation with no action, no reward and no flags. Join `steps` to `nodes` by (episode_id, t) and node_id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rollout.types import Failure, Value

__all__ = ["EpisodeRow", "NodeRow", "StepRow", "Trajectory", "make_episode_id", "make_tree_id"]


@dataclass(frozen=True, slots=True)
class EpisodeRow:
    """One episode, finished or given up.

    Attributes:
        episode_id: See `make_episode_id`; an episode commits once, whatever retries and restarts there were.
        task_id: The task; splits of a dataset go by it.
        group_id: Episodes that are compared with each other (group-relative advantages).
        env_id: Name of the environment.
        engine: Name of the engine ("inline", "process", "microvm").
        search: Name of the search algorithm.
        policy: Who played or evaluated.
        seed: Seed of the episode, below 2^63.
        return_: Undiscounted sum of rewards; None for a failed or an ungraded episode.
        length: Actions played.
        started_at: Unix time, in seconds.
        duration_s: Seconds of wall time.
        sample: Index of the episode in its group.
        attempt: Which attempt this is, from 0.
        terminated: It ended in a terminal state.
        truncated: It was cut short.
        failure: Why there is no whole episode; the rows up to the failure may be there.
        earlier_failures: What ended the attempts before this one.
        parent_episode_id: The episode that it branched from, None for a root.
        branch_path: Node ids from the parent's tree that led here; empty for a root.
        checkpoint_id: The checkpoint after the reset; None where none was kept.
        fingerprint: Of the engine that it was played on, as its checkpoints have it.
        image_digest: The image that its sandbox was booted from; empty for engines without images.
    """

    episode_id: str
    task_id: str
    group_id: str
    env_id: str
    engine: str
    search: str
    policy: str
    seed: int
    return_: float | None
    length: int
    started_at: float
    duration_s: float
    sample: int = 0
    attempt: int = 0
    terminated: bool = False
    truncated: bool = False
    failure: Failure | None = None
    earlier_failures: Sequence[Failure] = ()
    parent_episode_id: str | None = None
    branch_path: Sequence[int] = ()
    checkpoint_id: str | None = None
    fingerprint: str | None = None
    image_digest: str | None = None


@dataclass(frozen=True, slots=True)
class StepRow:
    """One time step: an observation, and the action taken there (None in the last row).

    Attributes:
        t: From 0, consecutive.
        observation: A value of the observation space.
        action: A value of the action space; None in the last row, and only there.
        reward: What the action brought; None where there was none, never 0 in its place.
        terminated: The action led to a terminal state; None in the last row.
        truncated: The episode was cut after the action; None in the last row.
        info: What the environment said along with `observation`.
        state_hash: Digest of the state that `observation` shows.
        checkpoint_id: The checkpoint of that state, None where none was kept.
        node_id: The node of this move's tree that the played action led to (its root is node 0).
        visits: Visits of the root of this move's tree.
        value: Value of that root after the search.
        legal_actions: The actions that the search chose from, in order; None without a search.
        action_visits: Visits of each legal action.
        policy_target: The policy to train towards, one probability per legal action.
        n_step_return: Discounted return from here on, for value targets.
        rng_policy: What the played branch did with its generators ("unique", "seeded", "inherit").
        rng_seed: Its seed, when seeded.
        tokens: A language model's action as tokens.
        logprobs: Their log-probabilities, as many.
        duration_s: Seconds that the move took, search included.
    """

    t: int
    observation: Value
    action: Value = None
    reward: float | None = None
    terminated: bool | None = None
    truncated: bool | None = None
    info: Mapping[str, Value] = field(default_factory=dict[str, "Value"])
    state_hash: str | None = None
    checkpoint_id: str | None = None
    node_id: int | None = None
    visits: int | None = None
    value: float | None = None
    legal_actions: Sequence[Value] | None = None
    action_visits: Sequence[int] | None = None
    policy_target: Sequence[float] | None = None
    n_step_return: float | None = None
    rng_policy: str | None = None
    rng_seed: int | None = None
    tokens: Sequence[int] | None = None
    logprobs: Sequence[float] | None = None
    duration_s: float | None = None


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node of the search tree of one move.

    Attributes:
        t: The move: the tree is that of (episode, t).
        node_id: Unique in the tree; 0 is the root.
        parent_id: None for the root.
        depth: Actions from the root.
        action: What led here from the parent; None for the root.
        visits: Completed visits.
        value: Mean (or backed-up) value of the state; None where it was never evaluated.
        prior: Probability of `action` under the parent's prior; None for the root.
        reward: Reward of `action`; None for the root, and where there was none.
        terminated: A terminal state.
        truncated: Cut short by the environment.
        checkpoint_id: Its checkpoint, None where none was kept.
        state_hash: Digest of the state.
        rng_policy: What its branch did with its generators.
        rng_seed: Its seed, when seeded.
        duration_s: Seconds from clone to release of its branch.
        private_bytes: What its checkpoint costs.
        action_visits: Visits of each legal action.
        policy_target: The improved policy, one probability per legal action.
        n_step_return: Discounted return along the tree from here on, for value targets.
        failure: Why the branch failed; such a node has no value.
        observation_digest: Digest of what was observed in the state (`rollout.trajectory.digest`).
    """

    t: int
    node_id: int
    parent_id: int | None
    depth: int
    action: Value
    visits: int
    value: float | None
    prior: float | None = None
    reward: float | None = None
    terminated: bool = False
    truncated: bool = False
    checkpoint_id: str | None = None
    state_hash: str | None = None
    rng_policy: str | None = None
    rng_seed: int | None = None
    duration_s: float | None = None
    private_bytes: int | None = None
    action_visits: Sequence[int] | None = None
    policy_target: Sequence[float] | None = None
    n_step_return: float | None = None
    failure: Failure | None = None
    observation_digest: int | None = None


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One finished episode with its steps and the nodes of its searches: written whole or not at all.

    Attributes:
        episode: The episode's own row.
        steps: `episode.length + 1` rows by ascending t, the last one without an action; fewer, or none,
            only when the episode failed.
        nodes: Rows of every tree that is to be kept, in any order.
    """

    episode: EpisodeRow
    steps: Sequence[StepRow]
    nodes: Sequence[NodeRow] = ()


def make_episode_id(
    run_id: str, task_id: str, group_id: str, sample: int, branch_path: Sequence[int] = ()
) -> str:
    """The identity of an episode: 32 hexadecimal digits.

    A function of what the episode *is*, not of who plays it or when, so that every retry, restart and
    duplicate of it has the same id and commits once.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (run_id, task_id, group_id, str(sample), *map(str, branch_path)):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(4, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def make_tree_id(episode_id: str, t: int) -> str:
    """The identity of the tree of move `t`, as the sink writes it."""
    return f"{episode_id}/{t}"
