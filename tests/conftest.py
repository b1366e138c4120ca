"""Shared by all tests: every test is checked for what it leaves behind.

After each test no process, file descriptor or temporary file may be left that was not there before it.
What a fixture of a wider scope owns is its own business: it exists before the test, and processes below
a process that existed before the test are taken to be its.

The temporary folder of the test process is a private one, so that a stray file can be told from other
programs' files. Orphans come back to the test process (it is their "subreaper"), so that a child which was
left by a dead parent is found too.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["pytester"]

PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 10.0
"""How long what a test ended may take to be gone: a killed process is not gone at once."""


@dataclass(frozen=True)
class _Snapshot:
    processes: frozenset[tuple[int, float]]
    descriptors: frozenset[tuple[int, str]]
    files: frozenset[str]


# How long an example takes says more about what else this machine does than about the code. What is tried
# stays the same, so that a verdict is of the code, too: `--hypothesis-profile=explore` tries others.
settings.register_profile("explore", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("explore"), derandomize=True)
settings.load_profile("same")


def pytest_configure() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@pytest.fixture(scope="session", autouse=True)
def private_temporary_folder() -> Iterator[Path]:
    """A short path, because socket names below it may not exceed 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"], tempfile.tempdir = str(folder), str(folder)
    yield folder
    tempfile.tempdir = before[1]
    if before[0] is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before[0]
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def leaves_nothing_behind(private_temporary_folder: Path) -> Iterator[None]:
    before = _snapshot(private_temporary_folder)
    yield
    deadline = time.monotonic() + GRACE_S
    while leaks := _leaks(before, _snapshot(private_temporary_folder)):
        if time.monotonic() > deadline:
            pytest.fail("the test left behind:\n" + "\n".join(leaks))
        time.sleep(0.02)
        gc.collect()  # what an unreferenced object still holds is not a leak once it is collected


def _snapshot(folder: Path) -> _Snapshot:
    return _Snapshot(_live_descendants(), _descriptors(), frozenset(path.name for path in folder.iterdir()))


def _live_descendants() -> frozenset[tuple[int, float]]:
    """(process id, start time) of every living descendant; zombies that came to us are reaped on the way."""
    found: set[tuple[int, float]] = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.add((child.pid, child.create_time()))
    return frozenset(found)


def _descriptors() -> frozenset[tuple[int, str]]:
    found: set[tuple[int, str]] = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this very listing
            found.add((int(link.name), str(link.readlink())))
    return frozenset(found)


def _leaks(before: _Snapshot, after: _Snapshot) -> list[str]:
    owned = {pid for pid, _ in before.processes}
    leaks = [
        f"process {pid}: {_describe(pid)}"
        for pid, _ in sorted(after.processes - before.processes)
        if not _is_below(pid, owned)
    ]
    if not _ray_is_up():  # its client opens connections when it likes, for as long as the cluster lives
        new = sorted(after.descriptors - before.descriptors)
        leaks += [f"descriptor {number}: {target}" for number, target in new]
    new_files = sorted(after.files - before.files)
    leaks += [f"file {name}" for name in new_files if not name.startswith("pytest-of-")]
    return leaks


def _is_below(pid: int, owners: set[int]) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(parent.pid in owners for parent in psutil.Process(pid).parents())
    return True  # it is gone by now


def _describe(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(psutil.Process(pid).cmdline())[:200]
    return "gone by now"


def _ray_is_up() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
