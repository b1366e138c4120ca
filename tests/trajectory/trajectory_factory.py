"""Trajectories whose every value follows from the number of the episode, so that a reader can check them."""

from __future__ import annotations

from gymnasium import spaces

from rollout.trajectory.rows import EpisodeRow, NodeRow, StepRow, Trajectory, make_episode_id

RUN_ID = "run-1"
OBSERVATION_SPACE = spaces.Discrete(1000)
ACTION_SPACE = spaces.Discrete(4)
NODES_PER_MOVE = 4


def episode_id(number: int) -> str:
    return make_episode_id(RUN_ID, f"task-{number % 3}", f"group-{number % 3}", number)


def length_of(number: int) -> int:
    return number % 5 + 1


def make_trajectory(number: int, *, attempt: int = 0) -> Trajectory:
    length = length_of(number)
    episode = EpisodeRow(
        episode_id=episode_id(number),
        task_id=f"task-{number % 3}",
        group_id=f"group-{number % 3}",
        env_id="Test-v0",
        engine="inline",
        search="uct",
        policy="playout",
        seed=number,
        return_=float(length),
        length=length,
        started_at=1_700_000_000.25 + number,
        duration_s=0.5,
        sample=number,
        attempt=attempt,
        terminated=True,
    )
    steps = [
        StepRow(
            t=t,
            observation=(number + t) % 1000,
            action=(number + t) % 4 if t < length else None,
            reward=1.0 if t < length else None,
            terminated=t == length - 1 if t < length else None,
            truncated=False if t < length else None,
            info={"number": number},
            node_id=1 if t < length else None,
            visits=NODES_PER_MOVE,
            value=0.5,
            legal_actions=[0, 1, 2, 3],
            action_visits=[1, 1, 1, 1],
            policy_target=[0.25] * 4,
            rng_policy="seeded",
            rng_seed=number * 1000 + t,
        )
        for t in range(length + 1)
    ]
    nodes = [
        NodeRow(
            t=t,
            node_id=node_id,
            parent_id=None if node_id == 0 else 0,
            depth=int(node_id > 0),
            action=None if node_id == 0 else node_id,
            visits=NODES_PER_MOVE - node_id,
            value=0.1 * number + 0.01 * node_id,
            prior=None if node_id == 0 else 0.25,
        )
        for t in range(length)
        for node_id in range(NODES_PER_MOVE)
    ]
    return Trajectory(episode, steps, nodes)
