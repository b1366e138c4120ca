"""Runs for the tests of the report and of what reads runs: written by the real sink, of made-up episodes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gymnasium import spaces

from rollout.trajectory import EpisodeRow, NodeRow, StepRow, Trajectory, TrajectorySink, make_episode_id
from rollout.types import Failure

ACTIONS = ("left", "down", "right", "up")
BEGUN_AT = 1_760_000_000.0


def write_run(
    folder: Path,
    trajectories: Sequence[Trajectory],
    *,
    planned: int | None = None,
    timings: object = None,
    metrics: Sequence[object] = (),
    observation_space: spaces.Space[Any] | None = None,
    action_space: spaces.Space[Any] | None = None,
) -> Path:
    """Writes trajectories and the small files of a run into `folder`."""
    sink = TrajectorySink(
        folder,
        run_id=folder.name,
        observation_space=observation_space or spaces.Discrete(16),
        action_space=action_space or spaces.Discrete(4),
    )
    sink.write_many(trajectories)
    sink.close()
    description = {
        "run_id": folder.name,
        "config": {"seed": 3, "episodes": len(trajectories) if planned is None else planned},
        "versions": {"rollout": "0.1.0"},
    }
    (folder / "run.json").write_text(json.dumps(description))
    if timings is not None:
        (folder / "timings.json").write_text(json.dumps(timings))
    if metrics:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(metric) + "\n" for metric in metrics))
    return folder


def played(
    run_id: str,
    number: int,
    *,
    return_: float | None = 1.0,
    length: int = 3,
    simulations: int = 12,
    observations: Sequence[object] | None = None,
    task_id: str = "task",
    failure: Failure | None = None,
    earlier: Sequence[Failure] = (),
    seed: int | None = None,
) -> Trajectory:
    """An episode with a tree for each move; a failed one has no return and no last row."""
    rng = random.Random(number)
    episode = EpisodeRow(
        episode_id=make_episode_id(run_id, task_id, task_id, number),
        task_id=task_id,
        group_id=task_id,
        env_id="FrozenLake-v1",
        engine="inline",
        search="uct",
        policy="playout",
        seed=number if seed is None else seed,
        return_=None if failure else return_,
        length=length,
        started_at=BEGUN_AT + 2.0 * number,
        duration_s=1.5,
        sample=number,
        attempt=len(earlier),
        terminated=failure is None and number % 3 != 2,
        truncated=failure is None and number % 3 == 2,
        failure=failure,
        earlier_failures=tuple(earlier),
    )
    steps: list[StepRow] = []
    nodes: list[NodeRow] = []
    seen = list(observations) if observations is not None else list(range(length + 1))
    for t in range(length):
        tree = grown_tree(t, simulations, rng)
        nodes += tree
        steps.append(step_row(t, seen[t], tree, is_last=t == length - 1, episode=episode))
    if failure is None:
        steps.append(StepRow(t=length, observation=seen[length]))
    return Trajectory(episode, steps, nodes)


def step_row(
    t: int, observation: Any, tree: Sequence[NodeRow], *, is_last: bool, episode: EpisodeRow
) -> StepRow:
    """The move that the most visited child of the root stands for."""
    children = {node.action: node for node in tree if node.parent_id == 0}
    visits = [children[action].visits if action in children else 0 for action in range(len(ACTIONS))]
    action = visits.index(max(visits))
    return StepRow(
        t=t,
        observation=observation,
        action=action,
        reward=(episode.return_ if is_last else 0.0),
        terminated=episode.terminated and is_last,
        truncated=episode.truncated and is_last,
        info={"prob": 1.0},
        node_id=children[action].node_id if action in children else None,
        visits=tree[0].visits,
        value=tree[0].value,
        legal_actions=list(range(len(ACTIONS))),
        action_visits=visits,
        policy_target=[count / max(1, sum(visits)) for count in visits],
        duration_s=0.4,
    )


def grown_tree(t: int, simulations: int, rng: random.Random) -> list[NodeRow]:
    """A tree grown by `simulations` random descents: a node's visits are 1 and those of its children."""
    parents: list[int] = [-1]
    actions: list[int] = [-1]
    visits: list[int] = [1]
    children: list[dict[int, int]] = [{}]
    for _ in range(simulations):
        node = 0
        while True:
            visits[node] += 1
            action = min(rng.randrange(4), rng.randrange(4))
            if action in children[node]:
                node = children[node][action]
                continue
            children[node][action] = len(parents)
            parents.append(node)
            actions.append(action)
            visits.append(1)
            children.append({})
            break
    depths: list[int] = []
    rows: list[NodeRow] = []
    for node, parent in enumerate(parents):
        depths.append(0 if parent < 0 else depths[parent] + 1)
        is_root = parent < 0
        rows.append(
            NodeRow(
                t=t,
                node_id=node,
                parent_id=None if is_root else parent,
                depth=depths[node],
                action=None if is_root else actions[node],
                visits=visits[node],
                value=None if node % 17 == 16 else round(rng.random() * visits[node] / visits[0], 6),
                prior=None if is_root else 0.25,
                reward=None if is_root else 0.0,
                terminated=node % 11 == 10,
            )
        )
    return rows


def a_timeline(seconds: int) -> list[dict[str, float]]:
    """Metrics as a run writes them."""
    return [
        {
            "t_s": float(t),
            "live_sandboxes": min(9, t) + t % 3,
            "checkpoints": 12 * t % 180,
            "checkpoint_bytes": 70_000 * (12 * t % 180),
            "branches": 22 * t,
            "rss_bytes": 300_000_000 + 20_000_000 * min(9, t),
        }
        for t in range(seconds)
    ]


TIMINGS = {
    "start": {"seconds": 9.8, "calls": 1},
    "restore": {"seconds": 21.3, "calls": 840},
    "handshake": {"seconds": 4.1, "calls": 840},
    "step": {"seconds": 12.7, "calls": 1210},
    "checkpoint": {"seconds": 6.4, "calls": 702},
    "search": {"seconds": 0.9, "calls": 1680},
    "ray": {"seconds": 1.7, "calls": 105},
}
