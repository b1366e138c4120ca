"""Replays: what a run recorded comes out again, and what does not is told with its place."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from envs.gym import GymEnv
from rollout.cli import main
from rollout.config import RunConfig, check_config
from rollout.errors import EnvError
from rollout.fleet.record import RunRecord
from rollout.loading import load_env
from rollout.replay import Replayer, read_episode, read_tree
from rollout.runner import Runner, episode_specs
from rollout.sandbox.branching import LocalBrancher
from rollout.sandbox.inline import InlineEngine
from rollout.testing import Fault, FaultPlan, FaultyEngine
from rollout.trajectory import Trajectory, TrajectorySink, scan

Change = Callable[[Trajectory], Trajectory]


def config(env_id: str = "FrozenLake-v1", episodes: int = 1, **search: object) -> RunConfig:
    return check_config(
        {
            "episodes": episodes,
            "max_steps": 5,
            "env": {"args": {"env_id": env_id}},
            "engine": {"kind": "inline"},
            "search": {"simulations": 14, "wave": 3, "playout_horizon": 5} | search,
        }
    )


def unchanged(trajectory: Trajectory) -> Trajectory:
    return trajectory


def nothing_fails(phase: str, count: int) -> Fault | None:
    return None


def write_run(
    folder: Path, run: RunConfig, change: Change = unchanged, plan: FaultPlan = nothing_fails
) -> list[Trajectory]:
    """Plays a run in this process and writes it, with a change to each trajectory."""

    async def play() -> tuple[GymEnv, list[Trajectory]]:
        env = load_env(run.env)
        assert isinstance(env, GymEnv)
        async with FaultyEngine(InlineEngine(run.engine), plan) as engine:
            brancher = LocalBrancher(engine, env)
            runner = Runner(env, brancher, run, engine="inline")
            return env, [await runner.play(spec) for spec in episode_specs(run, folder.name, env.tasks())]

    env, trajectories = asyncio.run(play())
    folder.mkdir(parents=True)
    RunRecord.begin(folder, folder.name, run, started_at=0.0).update(status="finished")
    with TrajectorySink(
        folder,
        run_id=folder.name,
        observation_space=env.observation_space,
        action_space=env.action_space,
    ) as sink:
        for trajectory in trajectories:
            sink.write(change(trajectory))
    return trajectories


def replay(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["replay", *map(str, arguments)])
    captured = capsys.readouterr()
    assert caught.value.code == code, captured
    return captured.out if code < 2 else captured.err


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "CartPole-v1", "Blackjack-v1"])
def test_an_episode_comes_out_again(env_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [trajectory] = write_run(tmp_path / "run", config(env_id))
    length = trajectory.episode.length
    out = replay(capsys, tmp_path / "run", 1)
    assert out == f"episode 1, played again on inline: {length} moves, all equal\n"


@pytest.mark.process
@pytest.mark.parametrize("policy", ["seeded", "inherit"])
def test_trees_and_nodes_come_out_again_on_any_engine(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", config(randomness=policy))
    nodes = scan(tmp_path / "run", "nodes").to_table().to_pylist()
    tree = [node for node in nodes if node["t"] == 0]
    out = replay(capsys, tmp_path / "run", 1, "--move", 0)
    assert out == (
        f"episode 1, played again on inline: 0 moves and {len(tree) - 1} branches of a search, all equal\n"
    )
    inner = next(node["node_id"] for node in tree if node["depth"] == 1 and node["visits"] > 1)
    children = [node for node in tree if node["parent_id"] == inner]
    found = json.loads(
        replay(capsys, tmp_path / "run", 1, "--move", 0, "--node", inner, "--engine", "process", "--json")
    )
    assert found["equal"] is True
    assert (found["engine"], found["num_moves"]) == ("process", 0)
    assert found["num_branches"] > len(children) > 0
    assert found["notes"] == ["the engine was inline, and is process now"]


@pytest.mark.parametrize(
    "search",
    [
        {"ensemble": 2},
        {"algorithm": "gumbel"},
        {"algorithm": "puct", "deterministic": False},
        {"outcomes": "widening", "backup": "expectation"},
        {"outcomes": "widening", "randomness": "inherit"},
        {"transpositions": True},
        {"algorithm": "best_of_n"},
        {"algorithm": "beam"},
        {"algorithm": "ab_mcts"},
        {"algorithm": "breadth_first"},
        {"tree_reuse": True},
        {"tree_reuse": True, "randomness": "inherit"},
    ],
    ids=str,
)
def test_the_trees_of_every_search_come_out_again(
    search: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", config(simulations=24, **search))
    nodes = scan(tmp_path / "run", "nodes", ["t"]).to_table()["t"].to_pylist()
    for move in (0, 1):
        out = replay(capsys, tmp_path / "run", 1, "--move", move)
        assert f"{move} moves and {nodes.count(move) - 1} branches of a search, all equal" in out


def altered_step(t: int, **fields: Any) -> Change:
    def change(trajectory: Trajectory) -> Trajectory:
        steps = list(trajectory.steps)
        steps[t] = replace(steps[t], **fields)
        return replace(trajectory, steps=steps)

    return change


def altered_node(t: int, node_id: int, **fields: Any) -> Change:
    def change(trajectory: Trajectory) -> Trajectory:
        nodes = [
            replace(node, **fields) if (node.t, node.node_id) == (t, node_id) else node
            for node in trajectory.nodes
        ]
        return replace(trajectory, nodes=nodes)

    return change


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (altered_step(0, observation=7), "the beginning, observation: recorded 7, played 0"),
        (altered_step(1, observation=9), "move 0, observation: recorded 9, played "),
        (altered_step(0, reward=0.5), "move 0, reward: recorded 0.5, played 0.0"),
        (altered_step(0, terminated=True), "move 0, terminated: recorded True, played False"),
        (altered_step(0, truncated=True), "move 0, truncated: recorded True, played False"),
        (altered_step(1, state_hash="x"), "move 0, state_hash: recorded x, played "),
    ],
)
def test_the_first_difference_is_told(
    change: Change, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", config(), change)
    out = replay(capsys, tmp_path / "run", 1, code=1).splitlines()
    assert out[0] == "episode 1, played again on inline: 0 moves, equal before the first difference"
    assert out[1].startswith(f"first difference: {place}")


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"reward": 3.0}, "reward: recorded 3.0, played 0.0"),
        ({"observation_digest": 5}, "observation_digest: recorded 5, played "),
        ({"state_hash": "x"}, "state_hash: recorded x, played "),
    ],
)
def test_the_first_difference_in_a_tree_is_told(
    fields: dict[str, Any], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", config(), altered_node(0, 4, **fields))
    out = replay(capsys, tmp_path / "run", 1, "--move", 0, code=1).splitlines()
    assert out[1].startswith(f"first difference: node 4 of move 0, {what}")
    found = json.loads(replay(capsys, tmp_path / "run", 1, "--move", 0, "--json", code=1))
    assert found["equal"] is False
    assert found["difference"]["where"] == "node 4 of move 0"


def test_a_difference_inside_an_array_has_its_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(trajectory: Trajectory) -> Trajectory:
        observation: Any = trajectory.steps[2].observation
        observation = observation.copy()
        observation[3] = 0.25
        return altered_step(2, observation=observation)(trajectory)

    write_run(tmp_path / "run", config("CartPole-v1"), change)
    out = replay(capsys, tmp_path / "run", 1, code=1)
    assert "first difference: move 1, observation[3]: recorded 0.25, played " in out
    assert "1 moves, equal before" in out


def test_branches_that_failed_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(phase: str, count: int) -> Fault | None:
        is_bad = phase == "env.step" and count in (2, 5)
        return Fault(EnvError("it broke", retryable=True)) if is_bad else None

    write_run(tmp_path / "run", config(), plan=plan)
    tree = [node for node in scan(tmp_path / "run", "nodes").to_table().to_pylist() if node["t"] == 0]
    failed = [node["node_id"] for node in tree if node["failure"] is not None]
    assert len(failed) == 2
    out = replay(capsys, tmp_path / "run", 1, "--move", 0)
    assert f"{len(tree) - 3} branches of a search, all equal\nleft out: 2 branches that had failed" in out
    line = replay(capsys, tmp_path / "run", 1, "--move", 0, "--node", failed[0], code=2)
    assert f"the branch of node {failed[0]} failed: it led to no state" in line


def test_an_episode_that_failed_is_played_again_as_far_as_it_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(phase: str, count: int) -> Fault | None:
        is_bad = phase == "env.step" and count > 20
        return Fault(EnvError("it broke")) if is_bad else None

    [trajectory] = write_run(tmp_path / "run", config(), plan=plan)
    assert trajectory.episode.failure is not None
    out = replay(capsys, tmp_path / "run", 1)
    assert f"{trajectory.episode.length} moves, all equal" in out
    assert "note: the episode failed: it is played again as far as it is recorded" in out


async def test_a_replay_leaves_no_checkpoint_whatever_comes_of_it(tmp_path: Path) -> None:
    run = config(simulations=30)
    await asyncio.to_thread(write_run, tmp_path / "run", run, altered_node(0, 9, reward=2.0))
    episode_id = scan(tmp_path / "run", "episodes").to_table()["episode_id"][0].as_py()
    recorded = read_episode(tmp_path / "run", episode_id)
    tree = read_tree(tmp_path / "run", episode_id, 0)
    counted: list[int] = []
    env = load_env(run.env)
    failing = False

    def plan(phase: str, count: int) -> Fault | None:
        return Fault(EnvError("it broke")) if failing and phase == "env.step" else None

    async with FaultyEngine(InlineEngine(run.engine), plan) as engine:
        brancher = LocalBrancher(engine, env)
        await brancher.prepare()
        replayer = Replayer(env, brancher, run.max_steps, lambda: counted.append(1))
        found = await replayer.play_tree(recorded, tree, 0, 0)
        assert found.difference is not None
        assert found.num_branches == len(counted)
        assert (await replayer.play_episode(recorded)).difference is None
        failing = True
        broken = await replayer.play_episode(recorded)
        assert broken.difference is not None
        assert (broken.difference.what, broken.difference.played) == ("a failure", "env: it broke")
        assert brancher.stats.checkpoints == 0
        assert engine.num_sandboxes == 0


def test_other_versions_and_unique_randomness_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", config("CartPole-v1", randomness="unique"))
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    described["versions"]["gymnasium"] = "0.9"
    (tmp_path / "run" / "run.json").write_text(json.dumps(described))
    found = json.loads(replay(capsys, tmp_path / "run", 1, "--json"))
    assert found["equal"], "this environment uses no randomness after its reset"
    first, second = found["notes"]
    assert first.startswith("gymnasium was 0.9, and is ")
    assert second == "it was played with unique randomness, which cannot be had again"


def test_what_cannot_be_played_again_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    write_run(run, config(algorithm="random"))
    assert "no run 'nowhere'" in replay(capsys, "nowhere", 1, code=2)
    assert "there is no episode '7'" in replay(capsys, run, 7, code=2)
    assert "give --move too" in replay(capsys, run, 1, "--node", 2, code=2)
    assert "no tree of move 0 is recorded: " in replay(capsys, run, 1, "--move", 0, code=2)
    assert "no engine 'docker': there are inline, " in replay(capsys, run, 1, "--engine", "docker", code=2)
    (run / "run.json").unlink()
    assert "holds no run.json" in replay(capsys, run, 1, code=2)
