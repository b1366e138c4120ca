"""The reaper ends what its owner started and removes its folders, however the owner ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rollout.fleet.reaper import OWNER_MARK, Reaper, owned_folder, sweep

# A reaper ends whatever carries its token, so test workers must not share one.
TOKEN = f"token-{os.getpid()}"

OWNER = """
import os, subprocess, sys, time
from pathlib import Path
from rollout.fleet.reaper import OWNER_MARK, Reaper, owned_folder
parent, lease_s, behaviour, token = Path(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:]
folder = owned_folder(parent, token)
(folder / "ram").write_bytes(bytes(1000))
os.environ[OWNER_MARK] = token
reaper = Reaper(token, [folder], lease_s or None)
children = [subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(3)]
print(*(child.pid for child in children), flush=True)
if behaviour == "stop":
    os.kill(os.getpid(), 19)
while True:
    reaper.renew()
    time.sleep(0.05)
"""


def start_owner(tmp_path: Path, lease_s: float, behaviour: str) -> tuple[subprocess.Popen[str], list[int]]:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path), str(lease_s), behaviour, TOKEN],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    pids = [int(word) for word in owner.stdout.readline().split()]
    owner.stdout.close()
    assert len(pids) == 3
    return owner, pids


def wait_until_gone(pids: list[int], folder: Path) -> None:
    deadline = time.monotonic() + 30
    while folder.exists() or any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "something outlived its owner"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_killed_owner_leaves_nothing(tmp_path: Path) -> None:
    owner, pids = start_owner(tmp_path, 0, "work")
    assert (tmp_path / f"rollout-{TOKEN}").exists()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    wait_until_gone(pids, tmp_path / f"rollout-{TOKEN}")


def test_a_silent_owner_is_killed_when_its_lease_runs_out(tmp_path: Path) -> None:
    owner, pids = start_owner(tmp_path, 0.5, "stop")  # stopped: it can do nothing for itself
    assert owner.wait(timeout=30) == -signal.SIGKILL
    wait_until_gone(pids, tmp_path / f"rollout-{TOKEN}")


def test_an_owner_that_renews_keeps_its_lease(tmp_path: Path) -> None:
    # long enough for an owner that gets no processor for a while
    owner, pids = start_owner(tmp_path, 10.0, "work")
    with pytest.raises(subprocess.TimeoutExpired):
        owner.wait(timeout=14)
    assert all(is_alive(pid) for pid in pids)
    owner.kill()
    owner.wait()
    wait_until_gone(pids, tmp_path / f"rollout-{TOKEN}")


def test_close_ends_everything_and_spares_the_owner_and_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = owned_folder(tmp_path, f"mine-{TOKEN}")
    reaper = Reaper(f"mine-{TOKEN}", [folder])
    monkeypatch.setenv(OWNER_MARK, f"mine-{TOKEN}")
    mine = subprocess.Popen(["sleep", "60"])
    monkeypatch.setenv(OWNER_MARK, f"other-{TOKEN}")
    other = subprocess.Popen(["sleep", "60"])
    reaper.close()
    reaper.close()
    assert mine.wait(timeout=10) == -signal.SIGKILL
    assert not folder.exists()
    assert other.poll() is None
    other.kill()
    other.wait()


def test_what_hides_its_mark_is_ended_if_it_was_noted(tmp_path: Path) -> None:
    older = subprocess.Popen(["sleep", "60"])
    reaper = Reaper(f"mine-{TOKEN}", [owned_folder(tmp_path, f"mine-{TOKEN}")])
    noted = subprocess.Popen(["sleep", "60"], env={})
    reaper.note_descendants()
    reaper.renew()
    later = subprocess.Popen(["sleep", "60"], env={})
    reaper.close()
    assert noted.wait(timeout=10) == -signal.SIGKILL
    for spared in (older, later):
        assert spared.poll() is None
        spared.kill()
        spared.wait()


def test_it_is_nobodys_child(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from rollout.fleet.reaper import Reaper, owned_folder; "
    script += "import psutil; r = Reaper('t', [owned_folder(Path(sys.argv[1]), 't')]); "
    script += "print(psutil.Process().children()); r.close()"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
    assert list(tmp_path.iterdir()) == []


def test_sweep_removes_only_folders_whose_owner_is_gone(tmp_path: Path) -> None:
    mine = owned_folder(tmp_path, f"mine-{TOKEN}")
    reused_pid = owned_folder(tmp_path, "reused")
    (reused_pid / "owner").write_text(f"{os.getpid()} 1")  # our id, but not our start time
    stranger = tmp_path / "rollout-stranger"
    stranger.mkdir()
    assert sweep(tmp_path) == [reused_pid]
    assert mine.exists()
    assert stranger.exists()
