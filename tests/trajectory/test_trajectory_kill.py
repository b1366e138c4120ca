"""Writers are killed at every point and at random times: nothing acknowledged is lost, nothing is doubled."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from killed_writer import MAX_EPISODES, open_sink
from pyarrow import fs
from trajectory_factory import NODES_PER_MOVE, episode_id, length_of

from rollout.trajectory import scan

NUMBERS = list(range(MAX_EPISODES))
PART_STEPS = ("write.before", "write.torn", "write.after", "fsync.before", "fsync.after")
PART_STEPS += ("rename.before", "rename.after", "folder.after")
LOCAL_POINTS = [
    *(f"wal.header.{when}" for when in ("before", "torn", "after")),
    *(f"wal.create.{when}" for when in ("before", "after")),
    *(f"wal.append.{when}" for when in ("before", "torn", "after")),
    *(f"wal.fsync.{when}" for when in ("before", "after")),
    *(f"part.{table}.{step}" for table in ("episodes", "steps", "nodes") for step in PART_STEPS),
    *(f"manifest.write.{when}" for when in ("before", "torn", "after")),
    *(f"manifest.fsync.{when}" for when in ("before", "after")),
    *(f"wal.delete.{when}" for when in ("before", "after")),
]
STORE_POINTS = [
    *(
        f"part.{table}.write.{when}"
        for table in ("episodes", "steps", "nodes")
        for when in ("before", "after")
    ),
    *(f"manifest.write.{when}" for when in ("before", "after")),
    *(f"wal.delete.{when}" for when in ("before", "after")),
]

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run_writer() -> Iterator[Run]:
    """Runs one writer, which may be killed, to its end."""
    script = Path(__file__).with_name("killed_writer.py")
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as zygote:
        assert zygote.stdin is not None
        assert zygote.stdout is not None

        def run(run_dir: Path, **order: Any) -> dict[str, Any]:
            defaults = {"fault": "", "kill_after_s": None, "num_others": 0, "seed": 0, "roll_rows": 20}
            defaults["numbers"] = NUMBERS
            text = json.dumps({"run_dir": str(run_dir), "log_folder": "", **defaults, **order})
            print(text, file=zygote.stdin, flush=True)
            return json.loads(zygote.stdout.readline())

        yield run
        zygote.stdin.close()


def committed(run_dir: Path, log_folder: str = "") -> set[str]:
    """Ids of the committed episodes, after a check that each is whole, right, and there once."""
    where: dict[str, Any] = {}
    if log_folder:
        where = {"filesystem": fs.SubTreeFileSystem(str(run_dir), fs.LocalFileSystem())}
    path = "run" if log_folder else run_dir

    def read(table: str) -> pa.Table:
        found = scan(path, table, verify=True, **where)
        # A torn line and a file without its commit are what crashes leave; anything else is a fault.
        assert {problem.kind for problem in found.problems} <= {"torn manifest record", "uncommitted file"}
        return found.to_table()

    by_id = {episode_id(number): number for number in NUMBERS}
    ids: list[str] = read("episodes")["episode_id"].to_pylist()
    assert len(ids) == len(set(ids))
    steps, nodes = read("steps"), read("nodes")
    observations: dict[str, list[tuple[int, int]]] = {}
    rows = (steps[name].to_pylist() for name in ("episode_id", "t", "observation"))
    for id_, t, observation in zip(*rows, strict=True):
        observations.setdefault(id_, []).append((t, observation))
    num_nodes = Counter(nodes["episode_id"].to_pylist())
    assert set(observations) == set(num_nodes) == set(ids)
    for id_ in ids:
        number = by_id[id_]
        assert observations[id_] == [(t, number + t) for t in range(length_of(number) + 1)]
        assert num_nodes[id_] == length_of(number) * NODES_PER_MOVE
    return set(ids)


def check_recovery(run_dir: Path, acknowledged: set[int], log_folder: str = "") -> None:
    """A new sink commits what was acknowledged, and leaves no log."""
    with open_sink(str(run_dir), log_folder) as sink:
        assert {episode_id(number) for number in acknowledged} <= sink.episode_ids
    assert {episode_id(number) for number in acknowledged} <= committed(run_dir, log_folder)
    logs = Path(log_folder) if log_folder else run_dir / "wal"
    assert not [path for path in logs.rglob("*") if path.is_file()]
    assert not list(run_dir.rglob("*.tmp"))


@pytest.mark.parametrize("point", LOCAL_POINTS)
def test_killed_at_every_point_of_a_local_run(run_writer: Run, tmp_path: Path, point: str) -> None:
    run_dir = tmp_path / "run"
    acknowledged: set[int] = set()
    for count in (1, 2, 3):  # each writer begins with what the one before it left, so recovery is killed too
        result = run_writer(run_dir, fault=f"{point}:{count}", seed=count)
        assert result["exit"] == -signal.SIGKILL
        acknowledged.update(result["acknowledged"])
    if acknowledged:
        committed(run_dir)
    check_recovery(run_dir, acknowledged)


@pytest.mark.parametrize("point", STORE_POINTS)
def test_killed_at_every_point_of_a_run_in_an_object_store(
    run_writer: Run, tmp_path: Path, point: str
) -> None:
    run_dir, logs = tmp_path / "store", str(tmp_path / "logs")
    run_dir.mkdir()
    acknowledged: set[int] = set()
    for count in (1, 2, 3):
        result = run_writer(run_dir, fault=f"{point}:{count}", seed=count, log_folder=logs)
        assert result["exit"] == -signal.SIGKILL
        acknowledged.update(result["acknowledged"])
    check_recovery(run_dir, acknowledged, logs)


@pytest.fixture(scope="module")
def run_duration_s(run_writer: Run, tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long a writer lives that is not killed."""
    started_s = time.monotonic()
    run_writer(tmp_path_factory.mktemp("timing") / "run")
    return time.monotonic() - started_s


@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random_times(run_writer: Run, run_duration_s: float, tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    num_kills = 0
    for attempt in range(100):
        run_dir, acknowledged = tmp_path / f"run-{attempt}", set[int]()
        for writer in range(2):  # the second one is killed in the recovery of the first, if time will have it
            delay_s, roll_rows = generator.uniform(0.0, run_duration_s), generator.choice([1, 40, 200])
            result = run_writer(run_dir, kill_after_s=delay_s, seed=writer, roll_rows=roll_rows)
            assert result["exit"] in (0, -signal.SIGKILL)
            num_kills += result["exit"] != 0
            acknowledged.update(result["acknowledged"])
        check_recovery(run_dir, acknowledged)
        if num_kills >= 4:
            return
    pytest.fail("the writers finish before they are killed")


@pytest.mark.parametrize("point", ["wal.fsync.before", "part.nodes.rename.after", "manifest.write.torn"])
def test_duplicate_writers_of_which_one_is_killed(run_writer: Run, tmp_path: Path, point: str) -> None:
    result = run_writer(tmp_path / "run", fault=f"{point}:2", num_others=2)
    assert result["exit"] == -signal.SIGKILL
    assert result["other_exits"] == [0, 0]
    assert result["acknowledged"] == NUMBERS
    assert committed(tmp_path / "run") == {episode_id(number) for number in NUMBERS}
    check_recovery(tmp_path / "run", set(NUMBERS))


def test_a_writer_that_is_not_killed_commits_everything(run_writer: Run, tmp_path: Path) -> None:
    result = run_writer(tmp_path / "run")
    assert result == {"exit": 0, "other_exits": [], "acknowledged": NUMBERS}
    assert committed(tmp_path / "run") == {episode_id(number) for number in NUMBERS}
