"""A run in an object store: a real S3 server on loopback, reached by its URI.

What reaches for it runs in processes of its own: Arrow's S3 client keeps threads and descriptors for as long
as its process lives.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from trajectory_factory import episode_id, length_of, make_trajectory

from rollout.errors import SinkError
from rollout.trajectory import TrajectorySink, scan

OpenSink = Callable[..., TrajectorySink]
DEADLINE_S = 60.0
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

def open_sink(where=uri):
    return TrajectorySink(where, run_id=RUN_ID, observation_space=OBSERVATION_SPACE,
                          action_space=ACTION_SPACE, config=SinkConfig(log_folder="logs"))

def make_bucket():
    fs.S3FileSystem(access_key="key", secret_key="secret", endpoint_override=server, region="us-east-1",
                    allow_bucket_creation=True).create_dir(bucket)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("s3") / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=file,
            stderr=file,
        )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class Store:
    """Runs programs that know the URI of a run in a bucket of its own."""

    def __init__(self, server: str, folder: Path) -> None:
        self.bucket = f"bucket-{uuid.uuid4().hex}"
        endpoint = quote(server, safe="")
        uri = f"s3://key:secret@{self.bucket}/runs/x?region=us-east-1&endpoint_override={endpoint}"
        self._arguments = [uri, self.bucket, server]
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
def store(server: str, tmp_path: Path) -> Store:
    return Store(server, tmp_path)


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
