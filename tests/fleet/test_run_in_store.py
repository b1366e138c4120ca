"""`rollout run` into an object store and what reads it there: real servers, reached by their URIs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from driven_runs import CONFIG, DEADLINE_S, ROLLOUT, ROOT
from object_stores import GcsBucket, S3Bucket

if TYPE_CHECKING:
    from conftest import GuestCluster

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

PRELUDE = """
import contextlib, io, json, sys
from pathlib import Path
from driven_runs import assert_whole
from rollout.cli import main
from rollout.errors import RolloutError
from rollout.trajectory import scan

def call(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as end:
            return end.code, out.getvalue(), err.getvalue()

def ask(*words):
    code, out, err = call(*words, "--json")
    assert code == 0, err
    return json.loads(out)

uri = sys.argv[1]
"""


class Machine:
    """Runs commands as a user of a machine would.

    Args:
        folder: Gets its cache, logs and configurations.
        environment: Of the commands.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self._environment = {
            **os.environ,
            **environment,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_EC2_METADATA_DISABLED": "true",
            "XDG_CACHE_HOME": str(self.cache),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent), *sys.path]),
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [ROLLOUT, *words],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def begin(self, output: str, *options: str, episodes: int, report: bool = False) -> subprocess.Popen[str]:
        """Starts a run."""
        config = self.folder / "test.toml"
        config.write_text(CONFIG.format(episodes=episodes, output=output, engine="inline"))
        settings = [word for option in options for word in ("--set", option)]
        return self.start("run", str(config), *settings, *([] if report else ["--no-report"]))

    def resume(self, uri: str) -> subprocess.Popen[str]:
        return self.start("run", "--resume", uri, "--no-report")

    def program(self, code: str, *words: str) -> Any:
        """What a program prints last, as JSON."""
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + code, *words],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    @property
    def logs(self) -> list[Path]:
        return list(self.cache.rglob("*.wal"))


@pytest.fixture
def machine(tmp_path: Path, guest_cluster: GuestCluster) -> Machine:
    return Machine(tmp_path, guest_cluster.environment | {"RAY_ADDRESS": guest_cluster.address})


@pytest.fixture
def bucket(s3_server: str) -> S3Bucket:
    bucket = S3Bucket(s3_server)
    bucket.make()
    return bucket


def wait_until(what: Callable[[], object], run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def test_a_whole_run_in_s3_is_read_back_by_its_uri(machine: Machine, bucket: S3Bucket) -> None:
    run = machine.begin(bucket.uri("runs"), episodes=4, report=True)
    out, err = run.communicate(timeout=DEADLINE_S)
    assert run.returncode == 0, err
    [uri] = re.findall(r"^run: (.*)$", out, re.MULTILINE)
    run_id = uri.partition("?")[0].rsplit("/", 1)[-1]
    assert uri == bucket.uri(f"runs/{run_id}", credentials="")
    assert f"report: {bucket.uri(f'runs/{run_id}/report.html', credentials='')}" in out
    assert "secret" not in out + err
    names = {key.split("/")[2] for key in bucket.names(f"runs/{run_id}/")} - {""}
    small = {"run.json", "metrics.jsonl", "timings.json", "report.html"}
    assert names == {"manifest", "episodes", "steps", "nodes", *small}, "and no driver's object"
    assert machine.logs == []
    assert sorted(path.name for path in machine.folder.iterdir()) == ["cache", "test.toml"]

    found = machine.program(
        """
from rollout.fleet.record import read_description
shown = ask("show", uri)
first = ask("show", uri, "1")
page = call("report", uri, "--output", "page.html")[1].strip()
print(json.dumps({
    "whole": assert_whole(uri),
    "config": read_description(uri)["config"]["output"],
    "rows": scan(uri, "steps").count_rows(),
    "shown": [shown["folder"], shown["episodes"], shown["notes"], sorted(shown["timings"])],
    "first": len(first["steps"]),
    "runs": [run["folder"] for run in ask("runs", sys.argv[2])],
    "page": [page, Path(page).read_text()[:15]],
    "again": call("report", uri)[1].strip(),
    "diff": ask("diff", uri, uri)["return"]["value"],
    "replay": ask("replay", uri, "1")["equal"],
    "export": ask("export", uri, "--format", "grpo", "--out", "grpo")["episodes"],
}))
""",
        uri,
        bucket.uri("runs"),
    )
    assert found["whole"] == found["export"] == 4
    assert found["config"] == bucket.uri("runs", credentials="")
    assert found["shown"][:3] == [uri, 4, []]
    assert {"search", "sink", "step"} <= set(found["shown"][3])
    assert found["rows"] >= found["first"] >= 2
    assert found["runs"] == [uri]
    assert found["page"] == ["page.html", "<!doctype html>"]
    assert found["again"] == bucket.uri(f"runs/{run_id}/report.html", credentials="")
    assert (found["diff"], found["replay"]) == (0, True)


def test_a_killed_run_in_s3_is_finished_by_one_of_two(machine: Machine, bucket: S3Bucket) -> None:
    num_episodes = 24
    run = machine.begin(
        bucket.uri("runs"), "search.simulations=60", "fleet.lease_s=30", episodes=num_episodes
    )
    wait_until(lambda: sum("/manifest/" in key for key in bucket.names()) >= 3, run)  # two of them commits
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    [described] = [key for key in bucket.names() if key.endswith("/run.json")]
    uri = bucket.uri(described.removesuffix("/run.json"))
    assert f"{described.removesuffix('run.json')}driver.lock" in bucket.names()
    read = 'print(json.dumps({row["episode_id"]: row for row in scan(uri, "episodes").to_table().to_pylist()}'
    read += ", default=str))"
    before = machine.program(read, uri)
    assert 1 <= len(before) < num_episodes

    first, second = machine.resume(uri), machine.resume(uri)
    ends = {each: each.communicate(timeout=DEADLINE_S) for each in (first, second)}
    [winner] = [each for each in ends if each.returncode == 0]
    [loser] = [each for each in ends if each.returncode != 0]
    assert loser.returncode == 2
    assert f"is being played by process {winner.pid} on " in last_line(ends[loser][1])
    assert f"episodes        {num_episodes} of {num_episodes}" in ends[winner][0]
    after = machine.program(read, uri)
    assert len(after) == num_episodes
    assert {key: after[key] for key in before} == before, "what was committed is as it was"
    assert not [key for key in bucket.names() if key.endswith("driver.lock")]
    assert machine.logs == []
    said = machine.program(
        """
from rollout.report.files import read_run_files
files = read_run_files(uri)
times = [metric.t_s for metric in files.metrics]
print(json.dumps([files.description["status"], len(files.description["resumed_at"]), times == sorted(times)]))
""",
        uri,
    )
    assert said == ["finished", 1, True]


def test_a_run_that_another_machine_took_over_stops_and_leaves_it_alone(
    machine: Machine, bucket: S3Bucket
) -> None:
    run = machine.begin(bucket.uri("runs"), episodes=100_000)
    wait_until(lambda: sum("/manifest/" in key for key in bucket.names()) >= 2, run)
    [lock] = [key for key in bucket.names() if key.endswith("/driver.lock")]
    bucket.put(lock, b'{"driver": "process 1 on another machine", "nonce": "n"}')
    _, err = run.communicate(timeout=DEADLINE_S)
    assert run.returncode == 1, err
    line = last_line(err)
    assert re.fullmatch(
        "rollout: run error: the run in s3://.* was taken over by process 1 on another machine, so .*", line
    )
    uri = bucket.uri(lock.removesuffix("/driver.lock"))
    assert machine.logs == [], "what it had finished is committed"
    found = machine.program(
        """
from rollout.report.files import read_run_files
print(json.dumps([read_run_files(uri).description["status"], assert_whole(uri) > 0]))
""",
        uri,
    )
    assert found == ["running", True], "run.json is the other's"
    assert lock in bucket.names()


def test_a_run_in_s3_that_is_interrupted_says_all_it_knows(machine: Machine, bucket: S3Bucket) -> None:
    run = machine.begin(bucket.uri("runs"), episodes=100_000)
    wait_until(lambda: sum("/manifest/" in key for key in bucket.names()) >= 2, run)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=DEADLINE_S)
    assert run.returncode == 130, err
    [uri] = re.findall(r"are committed in .*; to finish it: rollout run --resume '([^']*)'$", last_line(err))
    names = {key.split("/")[2] for key in bucket.names() if key.count("/") >= 2}
    assert {"run.json", "timings.json", "metrics.jsonl"} <= names, "the timeline too, before its time"
    assert "driver.lock" not in names
    said = 'print(json.dumps(json.loads(Storage.of(uri).read("run.json"))["status"]))'
    program = "from rollout.trajectory.storage import Storage\n" + said
    assert machine.program(program, uri) == "interrupted"


def test_what_a_store_refuses_is_one_line(machine: Machine, bucket: S3Bucket) -> None:
    nowhere = S3Bucket("http://127.0.0.1:1", bucket.name)
    missing = S3Bucket(bucket.server)
    config = machine.folder / "test.toml"
    config.write_text(CONFIG.format(episodes=1, output="unused", engine="inline"))
    code = """
found = []
for words in (["run", "test.toml", "--set", f"output={uri}"], ["run", "--resume", uri], ["show", uri]):
    code, out, err = call(*words)
    lines = [line for line in err.splitlines() if not line.startswith(("starting Ray", "episodes "))]
    found.append([code, len(lines), out, lines[-1]])
print(json.dumps(found))
"""
    found = machine.program(code, missing.uri("runs"))
    assert [each[:3] for each in found] == [[1, 1, ""]] * 3
    assert all(re.search("there is no (such )?bucket", each[3]) for each in found), found
    assert missing.name in found[0][3]
    silent = machine.program(code, nowhere.uri("runs"))
    assert [each[:3] for each in silent] == [[1, 1, ""]] * 3
    assert all("the store does not answer: check the endpoint" in each[3] for each in silent), silent
    try:
        set_open_to_all(bucket, "0")
        denied = machine.program(code, bucket.uri("runs", "unknown:key@"))
    finally:
        set_open_to_all(bucket, "inf")
    assert [each[:3] for each in denied] == [[1, 1, ""]] * 3
    assert all("access is denied: give credentials" in each[3] for each in denied), denied
    assert "unknown:key" not in json.dumps([found, silent, denied])
    assert [key for key in bucket.names() if not key.endswith("/")] == []


def set_open_to_all(bucket: S3Bucket, num_requests: str) -> None:
    """Makes the server ask for keys that it knows, of which there are none, after so many requests."""
    url = f"{bucket.server}/moto-api/reset-auth"
    headers = {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(url, num_requests.encode(), headers), timeout=60).close()


def test_a_prefix_that_is_in_use_is_left_alone(machine: Machine, bucket: S3Bucket) -> None:
    said = machine.program(
        """
from rollout.fleet.record import make_run_folder
from rollout.trajectory.storage import Storage
Storage.of(uri).child("id").put("run.json", b"{}", "an earlier run")
try:
    make_run_folder(uri, "id")
except RolloutError as error:
    print(json.dumps(error.message))
""",
        bucket.uri("runs"),
    )
    assert said.startswith("cannot write to the output folder s3://")
    assert "holds something already" in said
    assert [key for key in bucket.names() if not key.endswith("/")] == ["runs/id/run.json"]


def test_a_run_in_gcs_outlives_the_way_to_its_store(
    machine: Machine, gcs_server: int, tmp_path: Path
) -> None:
    num_episodes = 16
    bucket = GcsBucket(gcs_server, tmp_path)
    with bucket.reachable():
        run = machine.begin(bucket.uri("runs"), "search.simulations=60", episodes=num_episodes)
        wait_until(lambda: sum("/manifest/" in key for key in bucket.names()) >= 2, run)
    out, err = run.communicate(timeout=DEADLINE_S)  # the store is away, and the run goes on
    assert run.returncode == 1, err
    line = last_line(err)
    assert "the store does not answer" in line
    assert f"what was finished is kept in {machine.cache}/" in line
    assert "Traceback" not in err
    assert machine.logs
    [uri] = re.findall(r"rollout run --resume '([^']*)'$", line)

    with bucket.reachable():
        resumed = machine.resume(uri)
        out, err = resumed.communicate(timeout=DEADLINE_S)
        assert resumed.returncode == 0, err
        assert f"nothing to play: {num_episodes} of {num_episodes} episodes are there" in out
        found = machine.program(
            """
print(json.dumps([assert_whole(uri), ask("show", uri)["episodes"], ask("runs", sys.argv[2])[0]["folder"],
                  ask("export", uri, "--format", "rllib", "--out", "out")["episodes"]]))
""",
            uri,
            bucket.uri("runs"),
        )
    assert found == [num_episodes, num_episodes, uri, num_episodes]
    assert machine.logs == []
