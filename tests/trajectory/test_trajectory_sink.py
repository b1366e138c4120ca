"""The sink: acknowledged means safe, once means once, and a full or missing disk is a clear error."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gymnasium import spaces
from pyarrow import fs
from trajectory_factory import ACTION_SPACE, OBSERVATION_SPACE, RUN_ID, episode_id, make_trajectory

from rollout.config import SinkConfig
from rollout.errors import SinkError
from rollout.trajectory import TrajectorySink, scan
from rollout.trajectory.batch import pack_batch
from rollout.trajectory.encode import TrajectoryEncoder
from rollout.trajectory.recover import make_log_folder
from rollout.trajectory.roll import log_header
from rollout.trajectory.schema import TABLES
from rollout.trajectory.storage import Storage
from rollout.trajectory.wal import LogWriter

OpenSink = Callable[..., TrajectorySink]
DEADLINE_S = 30.0


def committed(run_dir: Path) -> list[str]:
    return scan(run_dir, "episodes", ["episode_id"]).to_table()["episode_id"].to_pylist()


def ids(*numbers: int) -> list[str]:
    return [episode_id(number) for number in numbers]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fill(path: Path) -> None:
    """Takes all the space that the file system of `path` has."""
    with path.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def write_until_it_raises(sink: TrajectorySink) -> None:
    for number in range(1000):
        sink.write(make_trajectory(number))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_written_is_safe_and_flushed_is_seen(open_sink: OpenSink, run_dir: Path) -> None:
    sink = open_sink()
    assert sink.write(make_trajectory(1))
    assert list((run_dir / "wal").iterdir())
    assert committed(run_dir) == []
    sink.flush()
    assert committed(run_dir) == ids(1)
    assert not list((run_dir / "wal").iterdir())
    sink.flush()
    sink.close()
    sink.close()
    assert (sink.stats.num_written, sink.stats.num_committed) == (1, 1)


def test_an_episode_is_written_once(open_sink: OpenSink, run_dir: Path) -> None:
    sink = open_sink()
    assert sink.write(make_trajectory(1))
    assert not sink.write(make_trajectory(1, attempt=1))
    sink.flush()
    assert not sink.write(make_trajectory(1, attempt=2))
    assert sink.write_many([make_trajectory(number) for number in (1, 2, 3)]) == 2
    sink.close()
    assert sorted(committed(run_dir)) == sorted(ids(1, 2, 3))
    assert scan(run_dir, "episodes", ["attempt"]).to_table()["attempt"].to_pylist() == [0, 0, 0]
    assert sink.stats.num_duplicates == 3


def test_a_resumed_run_knows_what_is_there(open_sink: OpenSink, run_dir: Path) -> None:
    with open_sink() as sink:
        sink.write_many([make_trajectory(number) for number in range(5)])
    with open_sink() as sink:
        assert sink.episode_ids == set(ids(*range(5)))
        assert episode_id(4) in sink
        assert episode_id(5) not in sink
        sink.write_many([make_trajectory(number) for number in range(8)])
        assert episode_id(7) in sink
    assert sorted(committed(run_dir)) == sorted(ids(*range(8)))


def test_many_sinks_with_the_same_episodes_commit_each_once(open_sink: OpenSink, run_dir: Path) -> None:
    sinks = [open_sink(config=SinkConfig(roll_rows=30)) for _ in range(3)]

    def write(sink: TrajectorySink, order: int) -> None:
        for number in range(30)[::order]:
            sink.write(make_trajectory(number))
        sink.close()

    threads = [
        threading.Thread(target=write, args=(sink, order))
        for sink, order in zip(sinks, (1, -1, 1), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(committed(run_dir)) == sorted(ids(*range(30)))
    for table in TABLES:
        rows = scan(run_dir, table, verify=True)
        assert rows.problems == ()
        assert len(rows.to_table().group_by("episode_id").aggregate([])) == 30
    assert sum(sink.stats.num_committed for sink in sinks) == 30


def test_a_living_sinks_log_is_left_alone(open_sink: OpenSink, run_dir: Path) -> None:
    one = open_sink()
    one.write(make_trajectory(1))
    with open_sink() as other:
        assert other.stats.num_recovered == 0
        assert episode_id(1) not in other
    one.close()
    assert committed(run_dir) == ids(1)


def test_rolls_by_time_and_by_rows(open_sink: OpenSink, run_dir: Path) -> None:
    timed = open_sink(config=SinkConfig(roll_s=0.02))
    timed.write(make_trajectory(1))
    wait_until(lambda: committed(run_dir) == ids(1))
    counted = open_sink(config=SinkConfig(roll_rows=1, roll_s=1000))
    counted.write(make_trajectory(2))
    wait_until(lambda: len(committed(run_dir)) == 2)


def test_a_writer_waits_when_rolling_is_behind_and_nothing_is_dropped(
    open_sink: OpenSink, run_dir: Path
) -> None:
    sink = open_sink(config=SinkConfig(roll_rows=50))
    done = threading.Event()

    def write() -> None:
        for number in range(40):
            sink.write(make_trajectory(number))
        done.set()

    with (run_dir / "manifest.jsonl").open("rb") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_EX)  # no one can commit now
        writer = threading.Thread(target=write)
        writer.start()
        wait_until(lambda: len(list((run_dir / "wal").iterdir())) == 2)
        written = -1
        while written != sink.stats.num_written:  # it fills the second log, and then it waits
            written = sink.stats.num_written
            time.sleep(0.1)
        assert not done.is_set()
        assert written < 20
        assert len(list((run_dir / "wal").iterdir())) == 2
    writer.join()
    assert done.is_set()
    sink.close()
    assert sink.stats.waited_s > 0
    assert sorted(committed(run_dir)) == sorted(ids(*range(40)))


def test_nodes_are_left_out_when_not_wanted(open_sink: OpenSink, run_dir: Path) -> None:
    batch = TrajectoryEncoder(OBSERVATION_SPACE, ACTION_SPACE).encode([make_trajectory(2)])
    with open_sink(config=SinkConfig(record_nodes=False)) as sink:
        sink.write(make_trajectory(1))
        sink.write_batch(batch)
    assert scan(run_dir, "nodes").count_rows() == 0
    assert not list((run_dir / "nodes").iterdir())
    assert len(committed(run_dir)) == 2


def test_a_batch_of_other_columns_is_refused(open_sink: OpenSink) -> None:
    batch = TrajectoryEncoder(spaces.Box(0, 9, (1,)), ACTION_SPACE).encode([])
    with pytest.raises(SinkError, match="the columns of steps"):
        open_sink().write_batch(batch)


def test_a_refused_trajectory_leaves_no_trace(open_sink: OpenSink, run_dir: Path) -> None:
    sink = open_sink()
    good = make_trajectory(1)
    with pytest.raises(SinkError, match="need 3 steps"):
        sink.write_many([make_trajectory(0), type(good)(good.episode, good.steps[:1])])
    assert episode_id(0) not in sink
    sink.close()
    assert committed(run_dir) == []
    with pytest.raises(SinkError, match="the sink is closed"):
        sink.write(good)
    with pytest.raises(SinkError, match="the sink is closed"):
        sink.flush()


def left_log(open_sink: OpenSink, run_dir: Path, *numbers: int) -> bytes:
    """What the log of a writer looks like that died after it wrote these episodes."""
    other = run_dir.with_name("other")
    sink = open_sink(other)
    for number in numbers:
        sink.write(make_trajectory(number))
    (path,) = (other / "wal").iterdir()
    data = path.read_bytes()
    sink.close()
    open_sink().close()
    return data


def test_a_torn_tail_is_cut_and_counted(open_sink: OpenSink, run_dir: Path) -> None:
    data = left_log(open_sink, run_dir, 1, 2, 3)
    (run_dir / "wal" / "dead-000000.wal").write_bytes(data[:-5])
    sink = open_sink()
    assert sink.episode_ids == set(ids(1, 2))
    assert sink.stats.num_recovered == 2
    assert sink.stats.torn_bytes > 0
    assert committed(run_dir) == ids(1, 2)
    assert not list((run_dir / "wal").iterdir())


def test_damage_inside_a_log_costs_one_record_and_keeps_the_log(open_sink: OpenSink, run_dir: Path) -> None:
    data = bytearray(left_log(open_sink, run_dir, 1, 2, 3))
    data[-len(data) // 3] ^= 1  # the header is most of the rest
    (run_dir / "wal" / "dead-000000.wal").write_bytes(data)
    sink = open_sink()
    assert sink.stats.num_damaged == 1
    assert sink.stats.num_recovered == 2
    assert [path.name for path in (run_dir / "wal").iterdir()] == ["dead-000000.damaged"]


def test_what_an_interrupted_roll_left_of_a_table_without_rows_goes(
    open_sink: OpenSink, run_dir: Path
) -> None:
    open_sink().close()
    encoder = TrajectoryEncoder(OBSERVATION_SPACE, ACTION_SPACE)
    log = LogWriter(run_dir / "wal" / "dead-000000.wal", log_header(RUN_ID, encoder.schemas))
    log.append(pack_batch(encoder.encode([make_trajectory(1)], with_nodes=False)))
    log.close()
    for table in TABLES:
        (run_dir / table / "dead-000000.parquet").write_bytes(b"of a roll that had more episodes")
    open_sink().close()
    assert committed(run_dir) == ids(1)
    assert scan(run_dir, "nodes", verify=True).problems == ()
    assert not list((run_dir / "nodes").iterdir())


def test_an_episode_that_is_in_a_log_twice_is_committed_once(open_sink: OpenSink, run_dir: Path) -> None:
    open_sink().close()
    encoder = TrajectoryEncoder(OBSERVATION_SPACE, ACTION_SPACE)
    log = LogWriter(run_dir / "wal" / "dead-000000.wal", log_header(RUN_ID, encoder.schemas))
    for numbers in ((1, 2), (2,), (2, 3)):
        log.append(pack_batch(encoder.encode([make_trajectory(number) for number in numbers])))
    log.close()
    open_sink().close()
    assert committed(run_dir) == ids(1, 2, 3)
    assert scan(run_dir, "steps").count_rows() == sum(len(make_trajectory(n).steps) for n in (1, 2, 3))


def test_foreign_logs_are_left_alone_and_counted(open_sink: OpenSink, run_dir: Path) -> None:
    data = left_log(open_sink, run_dir, 1)
    logs = run_dir / "wal"
    (logs / "garbage.wal").write_bytes(b"garbage")
    (logs / "cut.wal").write_bytes(data[:100])
    (logs / "other.wal").write_bytes(left_log_of_another_run(open_sink, run_dir))
    (logs / "notes.txt").write_text("not a log")
    sink = open_sink()
    assert sink.stats.num_foreign_logs == 3
    assert len(list(logs.iterdir())) == 4
    assert committed(run_dir) == []


def left_log_of_another_run(open_sink: OpenSink, run_dir: Path) -> bytes:
    other = run_dir.with_name("another")
    sink = open_sink(other, run_id="another")
    sink.write(make_trajectory(1))
    (path,) = (other / "wal").iterdir()
    return path.read_bytes()


def test_another_run_is_refused(open_sink: OpenSink) -> None:
    open_sink().close()
    with pytest.raises(SinkError, match="holds the run 'run-1'"):
        open_sink(run_id="run-2")
    with pytest.raises(SinkError, match=r"steps\.action"):
        open_sink(action_space=spaces.Text(3))


@pytest.mark.parametrize(
    "make", [lambda: fs.FileSystem.from_uri("mock:///")[0], None], ids=["mock", "subtree"]
)
def test_an_object_store_without_rename_and_append(
    open_sink: OpenSink, tmp_path: Path, make: Callable[[], fs.FileSystem] | None
) -> None:
    store = make() if make else fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    where: dict[str, Any] = {
        "filesystem": store,
        "config": SinkConfig(roll_rows=40, log_folder=str(tmp_path / "logs")),
    }
    with open_sink("bucket/run", **where) as sink, open_sink("bucket/run", **where) as other:
        for number in range(20):
            sink.write(make_trajectory(number))
            other.write(make_trajectory(number + 10))
    found = scan("bucket/run", "episodes", filesystem=store, verify=True)
    assert sorted(found.to_table()["episode_id"].to_pylist()) == sorted(ids(*range(30)))
    assert found.problems == ()
    assert not [path for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    with open_sink("bucket/run", **where) as sink:
        assert sink.episode_ids == set(ids(*range(30)))


def test_logs_of_an_object_store_lie_in_the_cache_by_default(
    open_sink: OpenSink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store, _ = fs.FileSystem.from_uri("mock:///")
    sink = open_sink("bucket/run", filesystem=store)
    sink.write(make_trajectory(1))
    assert len(list((tmp_path / "cache" / "rollout" / "wal").rglob("*.wal"))) == 1


@pytest.mark.parametrize("uri", ["nosuch://bucket/run", "not a scheme://x"])
def test_a_bad_uri_is_an_error(open_sink: OpenSink, uri: str) -> None:
    with pytest.raises(SinkError, match="cannot open"):
        open_sink(uri)


def test_a_folder_that_cannot_be_made_is_an_error(open_sink: OpenSink, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SinkError, match="cannot make the folder"):
        open_sink(tmp_path / "file" / "run")


def test_a_read_only_folder_is_an_error(open_sink: OpenSink, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(SinkError, match="no permission to write there"):
        open_sink(small_disk / "run")


def test_a_disk_that_fills_up_refuses_and_forgets_nothing(open_sink: OpenSink, small_disk: Path) -> None:
    run_dir = small_disk / "run"
    sink = open_sink(run_dir)
    assert sink.write(make_trajectory(0))
    fill(small_disk / "ballast")
    with pytest.raises(SinkError, match="the disk is full") as caught:
        write_until_it_raises(sink)  # the last block of the log may have room for some more
    assert caught.value.retryable
    number = sink.stats.num_written - 1
    assert episode_id(number + 1) not in sink
    with pytest.raises(SinkError, match="the disk is full"):
        sink.flush()
    assert sink.stats.num_failed_rolls > 0
    (small_disk / "ballast").unlink()
    assert sink.write(make_trajectory(number + 1))
    sink.flush()
    assert sorted(committed(run_dir)) == sorted(ids(*range(number + 2)))
    assert scan(run_dir, verify=True).problems == ()


def test_a_sink_closed_on_a_full_disk_loses_nothing(open_sink: OpenSink, small_disk: Path) -> None:
    run_dir = small_disk / "run"
    sink = open_sink(run_dir)
    sink.write_many([make_trajectory(number) for number in range(300)])
    fill(small_disk / "ballast")
    with pytest.raises(SinkError, match="the disk is full"):
        sink.close()
    fill(small_disk / "more")  # what the failed roll gave back
    with pytest.raises(SinkError, match="the disk is full"):
        open_sink(run_dir)
    (small_disk / "ballast").unlink()
    assert open_sink(run_dir).episode_ids == set(ids(*range(300)))


def test_a_file_size_limit_is_a_clear_error(open_sink: OpenSink, run_dir: Path) -> None:
    sink = open_sink()
    sink.write(make_trajectory(0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(SinkError, match="size limit"):
            sink.write(make_trajectory(1))
        with pytest.raises(SinkError, match="size limit"):
            sink.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sink.flush()
    assert committed(run_dir) == ids(0)


def test_a_store_that_goes_away_and_comes_back(open_sink: OpenSink, run_dir: Path) -> None:
    sink = open_sink(config=SinkConfig(roll_rows=30, roll_s=0.05))
    shutil.rmtree(run_dir / "nodes")
    with pytest.raises(SinkError, match="No such file"):
        write_until_it_raises(sink)
    assert sink.stats.num_failed_rolls > 0
    written = sink.episode_ids
    (run_dir / "nodes").mkdir()
    wait_until(lambda: bool(committed(run_dir)))  # tried again by itself
    sink.close()
    assert set(committed(run_dir)) == written


def test_logs_that_lie_apart_are_found_however_the_run_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = SinkConfig(log_folder="logs")
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    folders = {
        make_log_folder(Storage.of(spelled), config.log_folder)
        for spelled in (
            tmp_path / "runs/one",
            Path("one"),
            tmp_path / "link/one",
            tmp_path / "runs/../runs/one",
        )
    }
    assert len(folders) == 1
    assert folders.pop().is_relative_to(tmp_path / "logs")
