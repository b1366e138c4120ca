"""`rollout run --resume`: what a killed run lacks is played, no more and no fewer, and only where it fits."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from driven_runs import DEADLINE_S, ROLLOUT, ROOT, Run, assert_whole, committed
from gymnasium.spaces import Discrete

from rollout.cli import main
from rollout.config import RunConfig, check_config
from rollout.fleet.ownership import hold_lock
from rollout.fleet.progress import Progress
from rollout.fleet.record import RunRecord
from rollout.fleet.resume import check_engine, count_committed
from rollout.runner import play_locally
from rollout.sandbox.base import PhaseTimings
from rollout.trajectory import TrajectorySink, scan
from rollout.trajectory.recover import recover_run

NUM_EPISODES = 24


def resume(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [ROLLOUT, "run", *more, "--resume", str(folder), "--no-report"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rows(folder: Path, table: str) -> list[dict[str, Any]]:
    """A table without what differs between two plays of the same seed, in the order of the episodes."""
    order = {row["episode_id"]: row["sample"] for row in scan(folder, "episodes").to_table().to_pylist()}
    ids = ("run_id", "episode_id", "tree_id", "checkpoint_id")
    found = scan(folder, table).to_table().to_pylist()
    for row in found:
        row["sample"] = order[row["episode_id"]]
        for name in (*ids, "fingerprint", "started_at", "duration_s", "private_bytes"):
            row.pop(name, None)
    return sorted(found, key=lambda row: (row["sample"], row.get("t", 0), row.get("node_id") or 0))


@pytest.mark.ray
@pytest.mark.xdist_group("ray")
def test_a_killed_run_is_finished_once_with_the_rows_of_an_uninterrupted_one(tmp_path: Path) -> None:
    options = ["search.simulations=60", "fleet.lease_s=30"]
    run = Run.start(tmp_path, "inline", episodes=NUM_EPISODES, options=options)
    run.wait_for_commits(2)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    before = {episode["episode_id"]: episode for episode in committed(run.output)}
    assert 2 <= len(before) < NUM_EPISODES
    first, second = resume(run.folder), resume(run.folder)
    ends = {each: each.communicate(timeout=DEADLINE_S) for each in (first, second)}
    [winner] = [each for each in ends if each.returncode == 0]
    [loser] = [each for each in ends if each.returncode != 0]
    assert loser.returncode == 2
    assert ends[loser][1].splitlines()[-1].startswith("rollout: config error: the run in ")
    assert f"is being played by process {winner.pid} on " in ends[loser][1]
    assert f"episodes        {NUM_EPISODES} of {NUM_EPISODES}" in ends[winner][0]
    assert not (run.folder / "driver.lock").exists()

    after = {episode["episode_id"]: episode for episode in committed(run.output)}
    assert assert_whole(run.folder) == len(after) == NUM_EPISODES
    assert {key: after[key] for key in before} == before, "what was committed is as it was"
    described = json.loads((run.folder / "run.json").read_text())
    assert described["status"] == "finished"
    assert described["summary"]["episodes"] == NUM_EPISODES
    assert len(described["resumed_at"]) == 1
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("t_s", "branches"):
        values = [metric[name] for metric in metrics]
        assert values == sorted(values), "the timeline goes on where it ended"

    alone = tmp_path / "alone"
    write_run(alone, check_config(described["config"]), tmp_path)
    for table in ("episodes", "steps", "nodes"):
        assert rows(run.folder, table) == rows(alone, table)

    third = resume(run.folder)
    out, err = third.communicate(timeout=DEADLINE_S)
    assert third.returncode == 0, err
    assert out.splitlines()[0] == f"nothing to play: {NUM_EPISODES} of {NUM_EPISODES} episodes are there"
    run.assert_nothing_is_left()


def write_run(folder: Path, config: RunConfig, scratch: Path, *, num_episodes: int | None = None) -> None:
    """Plays a run in this process, without Ray, and leaves its folder as if it had been killed then."""
    folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord.begin(folder, "alone", config, started_at=0.0)
    engine = {"kind": "inline", "fingerprint": "f", "image_digest": ""}
    record.update(status="running", engine=engine)
    trajectories = asyncio.run(play_locally(config, scratch))
    with TrajectorySink(
        folder,
        run_id="local",
        observation_space=Discrete(16),
        action_space=Discrete(4),
        config=config.sink,
    ) as sink:
        for trajectory in trajectories[:num_episodes]:
            sink.write(trajectory)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return check_config(
        {
            "episodes": 3,
            "max_steps": 3,
            "env": {"args": {"env_id": "FrozenLake-v1"}},
            "engine": {"kind": "inline"},
            "search": {"simulations": 4, "playout_horizon": 3},
        }
    )


@pytest.fixture
def killed(tmp_path: Path, config: RunConfig) -> Path:
    """A run of which one episode of three is there."""
    folder = tmp_path / "runs" / "killed"
    write_run(folder, config, tmp_path, num_episodes=1)
    return folder


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command line that must fail as bad usage."""
    with pytest.raises(SystemExit) as caught:
        main(["run", *map(str, arguments)])
    captured = capsys.readouterr()
    assert (captured.out, caught.value.code) == ("", 2)
    [line] = [s for s in captured.err.splitlines() if not s.startswith(("starting Ray", "episodes "))]
    return line


def test_what_is_no_run_is_refused_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no run 'nowhere'" in refuse(capsys, "--resume", "nowhere")
    assert f"{tmp_path} holds no run.json: no run was begun there" in refuse(capsys, "--resume", tmp_path)
    (tmp_path / "run.json").write_text("{")
    assert "run.json is damaged" in refuse(capsys, "--resume", tmp_path)
    (tmp_path / "run.json").write_text('{"run_id": "x"}')
    assert "it does not say config, versions" in refuse(capsys, "--resume", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert "give a CONFIG, or --resume RUN" in refuse(capsys)
    assert "--set needs a CONFIG" in refuse(capsys, "--resume", tmp_path, "--set", "seed=3")


def test_another_config_is_refused(
    killed: Path, tmp_path: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.toml"
    same = '[env]\nargs = { env_id = "FrozenLake-v1" }\n[engine]\nkind = "inline"\n'
    other.write_text(same)
    line = refuse(capsys, other, "--resume", killed)
    assert "episodes is 3 in this run, not 8: a run is finished with its own settings" in line
    options = ["episodes=3", "max_steps=3", "search.simulations=4", "search.playout_horizon=3"]
    settings = [word for option in options for word in ("--set", option)]
    line = refuse(
        capsys, other, *settings, "--set", "env.args.kwargs={is_slippery=false}", "--resume", killed
    )
    assert "env.args.kwargs.is_slippery is None in this run, not False" in line


@pytest.mark.parametrize("package", ["rollout", "python", "numpy", "gymnasium"])
def test_another_version_is_refused(killed: Path, package: str, capsys: pytest.CaptureFixture[str]) -> None:
    change(killed, lambda described: described["versions"].update({package: "0.0.9"}))
    line = refuse(capsys, "--resume", killed)
    assert f"this run was begun with {package} 0.0.9, here is " in line
    assert f"install {package} 0.0.9, or begin another run" in line


def test_another_engine_or_image_is_refused() -> None:
    recorded = {"kind": "process", "image_digest": "a", "fingerprint": "of one session"}
    check_engine(recorded, recorded | {"fingerprint": "of another"})
    check_engine(None, recorded)
    with pytest.raises(Exception, match="begun with the engine 'process', here is 'inline'"):
        check_engine(recorded, recorded | {"kind": "inline"})
    with pytest.raises(Exception, match="begun with the guest image 'a', here is 'b'"):
        check_engine(recorded, recorded | {"image_digest": "b"})


def change(folder: Path, what: Callable[[dict[str, Any]], None]) -> None:
    described = json.loads((folder / "run.json").read_text())
    what(described)
    (folder / "run.json").write_text(json.dumps(described))


def test_a_run_that_is_being_played_is_refused(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold_lock(killed / "driver.lock", "this run"):
        line = refuse(capsys, "--resume", killed)
    assert line.startswith("rollout: config error: the run in ")
    assert f"is being played by process {os.getpid()} on " in line
    with hold_lock(killed / "driver.lock", "this run"):
        pass
    assert not (killed / "driver.lock").exists()


def test_the_lock_of_a_dead_driver_is_taken_over(killed: Path) -> None:
    lock = killed / "driver.lock"
    lock.write_text("process 1 on another machine")
    with hold_lock(lock, "this run") as held, lock.open() as file:
        assert held.left == ""
        assert file.read() == f"process {os.getpid()} on {os.uname().nodename}"
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_run_that_lacks_nothing_is_told_so_without_starting_ray(
    tmp_path: Path, config: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "whole"
    write_run(folder, config, tmp_path)
    change(folder, lambda described: described.update(run_id="local"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # whoever tries to reach it fails
    main_ok(["run", "--resume", str(folder), "--no-report"])
    assert capsys.readouterr().out.splitlines()[0] == "nothing to play: 3 of 3 episodes are there"
    described = json.loads((folder / "run.json").read_text())
    assert described["status"] == "finished"
    assert "resumed_at" not in described, "it was only found to be finished"


def main_ok(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0


def test_what_a_dead_driver_left_in_its_log_is_not_missing(tmp_path: Path, config: RunConfig) -> None:
    folder = tmp_path / "run"
    write_run(folder, config, tmp_path, num_episodes=1)
    code = f"""
import asyncio, os, pathlib
from gymnasium.spaces import Discrete
from rollout.config import RunConfig, check_config
from rollout.runner import play_locally
from rollout.trajectory import TrajectorySink
config = check_config({config.model_dump(mode="json")!r})
sink = TrajectorySink(
    {str(folder)!r}, run_id="local", observation_space=Discrete(16), action_space=Discrete(4)
)
sink.write(asyncio.run(play_locally(config, pathlib.Path({str(tmp_path)!r})))[1])
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert scan(folder, "episodes").count_rows() == 1
    assert len(recover_run(folder, config.sink)) == 2
    progress = Progress(3)
    count_committed(folder, progress)
    assert (progress.done, progress.failed, len(progress.returns)) == (2, 0, 2)


def test_a_damaged_file_is_noted_and_not_played_again(killed: Path) -> None:
    [file] = (killed / "steps").iterdir()
    file.unlink()
    progress = Progress(3)
    count_committed(killed, progress)
    assert progress.done == 0
    [note] = progress.notes
    assert note.startswith(f"steps/{file.name}: it was committed, and is not there; 1 episodes are left out")


def test_the_timeline_and_the_timings_of_sessions_add_up(tmp_path: Path) -> None:
    first = RunRecord.begin(tmp_path, "id", RunConfig(), started_at=1.0)
    first.update(status="running")
    first.add_metric({"t_s": 2.5, "branches": 7})
    first.write_timings(PhaseTimings({"step": 2.0}, {"step": 4}))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"t_s": 3.5, "bra')
    again = RunRecord.resume(tmp_path)
    assert (again.played_s, again.num_branches) == (2.5, 7)
    again.add_metric({"t_s": 4.0, "branches": 9})
    assert [json.loads(line)["t_s"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        2.5,
        4.0,
    ]
    again.write_timings(PhaseTimings({"step": 1.0, "search": 1.0}, {"step": 1, "search": 1}))
    assert json.loads((tmp_path / "timings.json").read_text()) == {
        "search": {"seconds": 1.0, "calls": 1},
        "step": {"seconds": 3.0, "calls": 5},
    }
    (tmp_path / "timings.json").write_text("torn")
    (tmp_path / "metrics.jsonl").write_text("torn\n")
    assert RunRecord.resume(tmp_path).played_s == 0.0
