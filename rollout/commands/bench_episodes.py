"""Made-up episodes for the benchmark of the sink: shaped like those of a search on FrozenLake, from a seed.

An episode has 8 moves of 64 simulations, so 9 steps and 520 nodes. What a search fills in is filled in, and
compresses as real rows do: values are wins by visits, checkpoints are numbered, seeds and times are noise.
"""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
from gymnasium import spaces

from rollout.trajectory.batch import TrajectoryBatch
from rollout.trajectory.digest import value_digest
from rollout.trajectory.encode import TrajectoryEncoder
from rollout.trajectory.rows import EpisodeRow, NodeRow, StepRow, Trajectory, make_episode_id

__all__ = [
    "ACTIONS",
    "MOVES",
    "OBSERVATIONS",
    "RUN_ID",
    "SIMULATIONS",
    "make_episodes",
    "renamed",
    "step_batch",
]

RUN_ID = "bench"
OBSERVATIONS = spaces.Discrete(16)
ACTIONS = spaces.Discrete(4)
MOVES = 8
SIMULATIONS = 64
_DIGESTS = [value_digest(observation) for observation in range(int(OBSERVATIONS.n))]


def make_episodes(count: int, seed: int = 0) -> list[Trajectory]:
    """Episodes with all their nodes."""
    generator = random.Random(seed)
    return [_episode(generator, number) for number in range(count)]


def step_batch(number: int, num_episodes: int, length: int, seed: int = 0) -> TrajectoryBatch:
    """Many episodes of steps alone, in columns; batches with different numbers have different episodes."""
    generator = random.Random(seed)
    row = _episode(generator, 0)
    steps = [
        StepRow(
            t=t,
            observation=generator.randrange(16),
            action=generator.randrange(4) if t < length else None,
            reward=0.0 if t < length else None,
            terminated=t == length - 1 if t < length else None,
            truncated=False if t < length else None,
            value=generator.random(),
            rng_policy="seeded",
            rng_seed=generator.getrandbits(63),
        )
        for t in range(length + 1)
    ]
    episode = Trajectory(
        EpisodeRow(
            episode_id="0",
            task_id="task-0",
            group_id="group-0",
            env_id="FrozenLake-v1",
            engine="inline",
            search="random",
            policy="uniform",
            seed=0,
            return_=0.0,
            length=length,
            started_at=row.episode.started_at,
            duration_s=1.0,
        ),
        steps,
    )
    one = TrajectoryEncoder(OBSERVATIONS, ACTIONS).encode([episode])
    ids = pa.array([f"{number:08x}{index:024x}" for index in range(num_episodes)])
    repeat = pa.array(np.zeros(num_episodes, np.int64))
    episodes = one.episodes.take(repeat)
    rows = pa.array(np.tile(np.arange(length + 1), num_episodes))
    return TrajectoryBatch(
        episodes=pa.RecordBatch.from_arrays([ids, *episodes.columns[1:]], schema=episodes.schema),
        steps=one.steps.take(rows),
        nodes=one.nodes,
        num_steps=np.full(num_episodes, length + 1, np.int64),
        num_nodes=np.zeros(num_episodes, np.int64),
    )


def renamed(batch: TrajectoryBatch, number: int) -> TrajectoryBatch:
    """The same episodes under other ids, different for each number."""
    ids = pa.array([f"{number:04x}{episode_id[4:]}" for episode_id in batch.episode_ids])
    episodes = pa.RecordBatch.from_arrays([ids, *batch.episodes.columns[1:]], schema=batch.episodes.schema)
    return TrajectoryBatch(episodes, batch.steps, batch.nodes, batch.num_steps, batch.num_nodes)


def _episode(generator: random.Random, number: int) -> Trajectory:
    task = f"task-{number % 8}"
    episode = EpisodeRow(
        episode_id=make_episode_id(RUN_ID, task, task, number),
        task_id=task,
        group_id=task,
        env_id="FrozenLake-v1",
        engine="process",
        search="uct",
        policy="playout",
        seed=generator.getrandbits(63),
        return_=1.0,
        length=MOVES,
        started_at=1.7e9 + number * 0.37,
        duration_s=generator.random(),
        sample=number // 8,
        terminated=True,
        checkpoint_id=_checkpoint(generator, 0, 0),
    )
    nodes = [node for t in range(MOVES) for node in _tree(generator, t)]
    return Trajectory(episode, [_step(generator, t) for t in range(MOVES + 1)], nodes)


def _step(generator: random.Random, t: int) -> StepRow:
    if t == MOVES:
        return StepRow(t, generator.randrange(16), info={"prob": 1.0})
    visits = [generator.randrange(1, SIMULATIONS // 2) for _ in range(4)]
    return StepRow(
        t=t,
        observation=generator.randrange(16),
        action=generator.randrange(4),
        reward=float(t == MOVES - 1),
        terminated=t == MOVES - 1,
        truncated=False,
        info={"prob": 1.0},
        checkpoint_id=_checkpoint(generator, t, 0),
        node_id=generator.randrange(1, SIMULATIONS),
        visits=SIMULATIONS + 1,
        value=generator.randrange(SIMULATIONS) / (SIMULATIONS + 1),
        legal_actions=[0, 1, 2, 3],
        action_visits=visits,
        policy_target=[count / sum(visits) for count in visits],
        n_step_return=1.0,
        rng_policy="seeded",
        rng_seed=generator.getrandbits(63),
        duration_s=generator.random(),
    )


def _tree(generator: random.Random, t: int) -> list[NodeRow]:
    return [_node(generator, t, node) for node in range(SIMULATIONS + 1)]


def _node(generator: random.Random, t: int, node: int) -> NodeRow:
    visits = 1 + int(generator.expovariate(0.5)) if node else SIMULATIONS + 1
    return NodeRow(
        t=t,
        node_id=node,
        parent_id=generator.randrange(node) if node else None,
        depth=generator.randrange(1, 8) if node else 0,
        action=generator.randrange(4) if node else None,
        visits=visits,
        value=generator.randrange(visits + 1) / visits,
        prior=0.25 if node else None,
        reward=0.0 if node else None,
        checkpoint_id=_checkpoint(generator, t, node),
        rng_policy="seeded" if node else None,
        rng_seed=generator.getrandbits(63) if node else None,
        duration_s=generator.random() / 1000 if node else None,
        private_bytes=4096 + generator.randrange(1000),
        action_visits=[generator.randrange(visits + 1) for _ in range(4)],
        observation_digest=_DIGESTS[generator.randrange(len(_DIGESTS))],
    )


def _checkpoint(generator: random.Random, t: int, node: int) -> str:
    """A name as an engine gives it: made in order, except that branches overtake each other."""
    return f"process-18269140-{t * SIMULATIONS + node + generator.randrange(4)}"
