"""One Ray cluster for the tests that are guests on one, started as an operator would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from object_stores import gcs_server, s3_server

from rollout.sandbox.image.store import cache_dir

__all__ = ["GuestCluster", "gcs_server", "guest_cluster", "s3_server"]

RAY = str(Path(sys.executable).with_name("ray"))
START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 60.0


@dataclass(frozen=True)
class GuestCluster:
    """A cluster that asks for a token, as clusters do by default.

    Attributes:
        address: For `RAY_ADDRESS` of a driver.
        dashboard: For `ray job submit`.
        environment: What a user has to have in the environment.
    """

    address: str
    dashboard: str
    environment: dict[str, str]


@pytest.fixture(scope="session")
def guest_cluster() -> Iterator[GuestCluster]:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        port, dashboard_port, client_port = _free_ports(3)
        environment = {
            "HOME": str(folder),  # the token lies in Ray's folder of the home directory
            "ROLLOUT_CACHE": str(cache_dir()),  # images are the real user's
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        subprocess.run(
            [RAY, "get-auth-token", "--generate"],
            env=os.environ | environment,
            check=True,
            capture_output=True,
        )
        command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=100000000"]
        command += [
            f"--port={port}",
            f"--dashboard-port={dashboard_port}",
            f"--ray-client-server-port={client_port}",
        ]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        command += ["--node-ip-address=127.0.0.1", f"--temp-dir={folder}/ray", "--include-dashboard=true"]
        with (folder / "log").open("wb") as log:
            head = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
        dashboard = f"http://127.0.0.1:{dashboard_port}"
        try:
            _wait_for(dashboard, head, folder / "log")
            yield GuestCluster(f"127.0.0.1:{port}", dashboard, environment)
        finally:
            _stop(head)


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_for(dashboard: str, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        if (status := _status(f"{dashboard}/api/version")) is not None:
            assert status == 401, "the cluster does not ask for a token"
            return
        time.sleep(0.2)


def _status(url: str) -> int | None:
    """The HTTP status; None while nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


def _stop(head: subprocess.Popen[bytes]) -> None:
    """Ends the cluster by the ids of its processes, and nothing else."""
    below = psutil.Process(head.pid).children(recursive=True)
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    for process in psutil.wait_procs(below, timeout=5)[1]:
        process.kill()
