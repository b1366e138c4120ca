"""One driver at a time, where there are locks and where there are none."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow import fs

from rollout.errors import ConfigError
from rollout.fleet.ownership import Lease, RunTakenOver, drive_alone
from rollout.trajectory.storage import Storage

DEADLINE_S = 60.0
QUICK = Lease(renew_s=0.05, lease_s=0.4, settle_s=0.1)
PATIENT = Lease(renew_s=0.05, lease_s=3600.0, settle_s=0.1)
SETTLING = Lease(renew_s=0.1, lease_s=0.4, settle_s=1.5)
NEVER_RENEWED = Lease(renew_s=3600.0, lease_s=0.4, settle_s=0.1)


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    """A folder that is used as an object store is: it has no local path."""
    (tmp_path / "run").mkdir()
    return Storage(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "run")


@pytest.fixture
def here(tmp_path: Path) -> str:
    """Where this machine's logs lie."""
    return str(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> str:
    """Where another machine's logs lie."""
    return str(tmp_path / "there")


async def test_a_folder_has_one_driver(tmp_path: Path) -> None:
    storage = Storage.of(tmp_path)
    async with drive_alone(storage, "") as ownership:
        ownership.check()
        with pytest.raises(ConfigError, match=f"{tmp_path} is being played by process {os.getpid()} on "):
            await drive_alone(storage, "").__aenter__()
    assert storage.names() == frozenset()


async def test_drivers_on_one_machine_exclude_each_other_at_once(store: Storage, here: str) -> None:
    async with drive_alone(store, here, is_new=True, lease=PATIENT):
        said = json.loads(store.read("driver.lock"))
        assert said["driver"].startswith(f"process {os.getpid()} on ")
        with pytest.raises(ConfigError, match=f"is being played by process {os.getpid()} on "):
            await drive_alone(store, here, lease=PATIENT).__aenter__()
    assert store.read_if_there("driver.lock") is None


async def test_a_driver_on_another_machine_is_seen_to_live(store: Storage, here: str, there: str) -> None:
    waited: list[str] = []
    async with drive_alone(store, here, is_new=True, lease=QUICK) as ownership:
        with pytest.raises(ConfigError, match="is being played by "):
            await drive_alone(store, there, lease=PATIENT, on_wait=waited.append).__aenter__()
        assert waited[0].startswith(f"looking for 3600 s whether process {os.getpid()} on ")
        ownership.check()
        assert ownership.taken_by is None
    assert store.read_if_there("driver.lock") is None


async def test_a_driver_that_is_silent_for_its_lease_is_taken_over(
    store: Storage, here: str, there: str
) -> None:
    waited: list[str] = []
    async with drive_alone(store, here, is_new=True, lease=NEVER_RENEWED):
        async with drive_alone(store, there, lease=QUICK, on_wait=waited.append) as second:
            second.check()
        assert len(waited) == 2
        assert waited[-1] == ""


async def test_a_driver_that_was_taken_over_stops_and_leaves_the_others_object(
    store: Storage, here: str
) -> None:
    async with drive_alone(store, here, is_new=True, lease=QUICK) as ownership:
        other = json.dumps({"driver": "process 1 on another machine", "nonce": "n"}).encode()
        store.put("driver.lock", other, "of the other")
        deadline = time.monotonic() + DEADLINE_S
        while ownership.taken_by is None:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        with pytest.raises(RunTakenOver, match="was taken over by process 1 on another machine"):
            ownership.check()
    assert store.read("driver.lock") == other


async def test_of_two_that_take_over_at_once_one_wins(store: Storage, here: str, there: str) -> None:
    store.put("driver.lock", b'{"driver": "process 1 on a dead machine", "nonce": "n"}', "of the dead")
    both = [drive_alone(store, folder, lease=SETTLING) for folder in (here, there)]
    ends = await asyncio.gather(*(each.__aenter__() for each in both), return_exceptions=True)
    losers = [end for end in ends if isinstance(end, BaseException)]
    assert [type(loser) for loser in losers] == [ConfigError], ends
    [winner] = [each for each, end in zip(both, ends, strict=True) if end not in losers]
    await winner.__aexit__(None, None, None)
    assert store.read_if_there("driver.lock") is None


def test_a_dead_driver_is_known_at_once_on_its_own_machine(store: Storage, tmp_path: Path, here: str) -> None:
    code = f"""
import asyncio, os
from pyarrow import fs
from rollout.fleet.ownership import drive_alone
from rollout.trajectory.storage import Storage
async def die():
    store = Storage(fs.SubTreeFileSystem({str(tmp_path)!r}, fs.LocalFileSystem()), "run")
    async with drive_alone(store, {here!r}, is_new=True):
        os.kill(os.getpid(), 9)
asyncio.run(die())
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=DEADLINE_S)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert store.read_if_there("driver.lock") is not None
    waited: list[str] = []

    async def take_over() -> None:
        async with drive_alone(store, here, lease=PATIENT, on_wait=waited.append) as ownership:
            ownership.check()

    asyncio.run(take_over())
    assert waited == [], "its lock on this machine is free, so it cannot live"


async def test_an_object_that_could_not_be_removed_is_known_to_be_dead_here(
    store: Storage, tmp_path: Path, here: str
) -> None:
    async with drive_alone(store, here, is_new=True, lease=PATIENT):
        (tmp_path / "run" / "driver.lock").rename(tmp_path / "lock")
        (tmp_path / "run" / "driver.lock").mkdir()  # as if the store were away
    (tmp_path / "run" / "driver.lock").rmdir()
    (tmp_path / "lock").rename(tmp_path / "run" / "driver.lock")
    waited: list[str] = []
    async with drive_alone(store, here, lease=PATIENT, on_wait=waited.append):
        assert waited == []


async def test_a_damaged_object_is_that_of_somebody(store: Storage, here: str) -> None:
    store.put("driver.lock", b"\xff{", "damaged")
    waited: list[str] = []
    async with drive_alone(store, here, lease=QUICK, on_wait=waited.append):
        assert "another process" in waited[0]
