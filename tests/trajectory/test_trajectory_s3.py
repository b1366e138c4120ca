"""The sink and the reader in an object store: a real S3 server on loopback, reached by its URI."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from object_stores import DEADLINE_S, S3Bucket
from trajectory_factory import episode_id, length_of, make_trajectory

from rollout.errors import SinkError
from rollout.trajectory import TrajectorySink, scan

OpenSink = Callable[..., TrajectorySink]
NUMBERS = range(6)

PRELUDE = """
import json, os, sys
from pathlib import Path
import pyarrow.compute as pc
from pyarrow import fs
from rollout.config import SinkConfig
from rollout.errors import SinkError
from rollout.trajectory import TrajectorySink, scan
from rollout.trajectory.export.formats import export_run
from trajectory_factory import *

uri, bucket, server = sys.argv[1:4]
trajectories = [make_trajectory(number) for number in range(6)]

def open_sink(where=uri, log_folder="logs"):
    return TrajectorySink(where, run_id=RUN_ID, observation_space=OBSERVATION_SPACE,
                          action_space=ACTION_SPACE, config=SinkConfig(log_folder=log_folder))

def make_bucket():
    fs.S3FileSystem(access_key="key", secret_key="secret", endpoint_override=server, region="us-east-1",
                    allow_bucket_creation=True).create_dir(bucket)
"""


class Store:
    """Runs programs that know the URI of a run in a bucket of its own."""

    def __init__(self, server: str, folder: Path) -> None:
        bucket = S3Bucket(server)
        self.bucket = bucket.name
        self._arguments = [bucket.uri("runs/x"), bucket.name, server]
        self._folder = folder

    def run(self, code: str, returncode: int = 0) -> Any:
        """What a program prints last, as JSON."""
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + code, *self._arguments],
            cwd=self._folder,
            env={"PYTHONPATH": str(Path(__file__).parent), "AWS_EC2_METADATA_DISABLED": "true"},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == returncode, done.stderr
        return json.loads(done.stdout.splitlines()[-1]) if returncode == 0 else None


@pytest.fixture
def store(s3_server: str, tmp_path: Path) -> Store:
    return Store(s3_server, tmp_path)


def test_a_run_in_s3_is_written_read_and_exported(store: Store, tmp_path: Path) -> None:
    found = store.run("""
make_bucket()
with open_sink() as sink:
    new = [sink.write_many(trajectories[:3])]
    sink.flush()
    new.append(sink.write_many(trajectories[3:4]))
with open_sink() as second:
    known = len(second.episode_ids)
    new.append(second.write_many(trajectories))
episodes = scan(uri, "episodes", verify=True)
last = scan(uri, "steps", ["t"], pc.field("action").is_null()).to_table()
print(json.dumps({
    "new": new,
    "known": known,
    "problems": len(episodes.problems),
    "episodes": sorted(episodes.to_table()["episode_id"].to_pylist()),
    "lengths": sorted(last["t"].to_pylist()),
    "exported": export_run(uri, "rllib", Path("rllib")).num_records,
}))
""")
    assert found == {
        "new": [3, 1, 2],
        "known": 4,
        "problems": 0,
        "episodes": sorted(episode_id(number) for number in NUMBERS),
        "lengths": sorted(length_of(number) for number in NUMBERS),
        "exported": {"train": sum(map(length_of, NUMBERS))},
    }
    assert not list((tmp_path / "logs").rglob("*.wal"))
    exported = store.run("""
import contextlib, io
from rollout.cli import main
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main(["export", uri, "--format", "grpo", "--out", "grpo", "--json"])
print(json.dumps(json.loads(out.getvalue())["episodes"]))
""")
    assert exported == len(NUMBERS), "the command takes a URI too"


def test_what_a_killed_writer_acknowledged_reaches_s3_with_the_next_one(store: Store) -> None:
    code = "make_bucket(); sink = open_sink(); sink.write_many(trajectories[:2]); os.kill(os.getpid(), 9)"
    store.run(code, returncode=-signal.SIGKILL)
    found = store.run("""
before = scan(uri, "episodes").count_rows()
with open_sink() as sink:
    recovered = sink.stats.num_recovered
print(json.dumps([before, recovered, scan(uri, "episodes").count_rows()]))
""")
    assert found == [0, 2, 2]


def test_a_log_that_stays_on_a_dead_machine_adds_nothing_later(store: Store, tmp_path: Path) -> None:
    code = "make_bucket(); sink = open_sink(); sink.write_many(trajectories[:2]); os.kill(os.getpid(), 9)"
    store.run(code, returncode=-signal.SIGKILL)
    found = store.run("""
with open_sink(log_folder="of another machine") as sink:
    missing = [len(sink.episode_ids), sink.write_many(trajectories)]
with open_sink() as sink:
    late = [sink.stats.num_recovered, sink.stats.num_duplicates]
episodes = scan(uri, "episodes")
print(json.dumps([missing, late, episodes.count_rows(), len(episodes.files())]))
""")
    assert found == [[0, 6], [0, 2], 6, 1]
    assert not list((tmp_path / "logs").rglob("*.wal"))


def test_a_bucket_that_is_not_there_is_an_error(store: Store) -> None:
    found = store.run("""
messages = []
for call in (open_sink, lambda: scan(uri, "episodes")):
    try:
        call()
    except SinkError as error:
        messages.append(error.message)
print(json.dumps(messages))
""")
    assert len(found) == 2
    assert all(store.bucket in message for message in found)


def test_a_file_uri_is_a_local_folder(run_dir: Path, open_sink: OpenSink) -> None:
    with open_sink(run_dir.as_uri()) as sink:
        sink.write(make_trajectory(0))
        assert list((run_dir / "wal").iterdir()), "its log lies in the run's folder, as for a path"
    assert (run_dir / "manifest.jsonl").exists()
    assert scan(run_dir.as_uri(), "episodes").count_rows() == scan(run_dir, "episodes").count_rows() == 1


def test_a_uri_of_no_file_system_is_refused(open_sink: OpenSink) -> None:
    with pytest.raises(SinkError, match="cannot open ftp://host/run"):
        open_sink("ftp://host/run")
    assert not Path("ftp:").exists()
