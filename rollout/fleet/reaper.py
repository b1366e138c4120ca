"""A small process that outlives its owner by moments: it ends what the owner started and removes its folders.

The owner (a driver, or a host that owns sandboxes) starts it and keeps one end of a pipe. The reaper acts
when that pipe closes, whatever closed it: a clean end, a crash, kill -9. An owner may also hold a lease: it
then has to write to the pipe again and again, and when it is silent for longer than the lease the reaper
kills it first. So neither Ray, nor the owner's event loop, nor its interpreter lock has to work for the
clean-up to happen.

What was started is found by a mark in its environment, `ROLLOUT_OWNER=<token>`, which children inherit. A
program that writes its title over its environment (Ray's do) hides the mark; so the owner can also have all
that is below it at a moment noted.

The program needs only the standard library and is run by its path, so it starts in some 20 ms and holds few
pages. It is no child of its owner, because a Ray worker kills its children when it ends. This module is also
the owner's side: `Reaper`.

Not guaranteed: that a process is found which hid its mark and was not noted; engines therefore tie their
processes to their parents as well. And nobody ends what a reaper would have ended that was killed itself; the
folders it leaves are removed by the next owner that calls `sweep`.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["OWNER_MARK", "Reaper", "main", "owned_folder", "sweep"]

OWNER_MARK = "ROLLOUT_OWNER"
"""Name of the environment variable that marks what an owner started."""

_FOLDER_PREFIX = "rollout-"
_OWNER_FILE = "owner"
_GRACE_S = 20.0
"""How long the reaper goes on killing what keeps appearing before it removes the folders."""
_EXIT_TIMEOUT_S = 30.0
_NOTE = b"n"
_NOTE_TIMEOUT_S = 10.0


class Reaper:
    """The owner's side: starts the process, renews the lease, closes it.

    Args:
        token: The mark of what the owner starts.
        folders: Removed at the end.
        lease_s: Longest silence before the owner is killed; None for no lease.
    """

    def __init__(self, token: str, folders: Sequence[Path], lease_s: float | None = None) -> None:
        environment = {name: value for name, value in os.environ.items() if name != OWNER_MARK}
        argv = [sys.executable, "-I", "-S", __file__, str(os.getpid()), token, f"{lease_s or 0}"]
        theirs, self._order_fd = os.pipe()
        self._answer_fd, their_end = os.pipe()
        try:
            starter = subprocess.Popen(
                [*argv, *map(str, folders)],
                stdin=theirs,
                stdout=their_end,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal is for the owner
                env=environment,
            )
        finally:
            os.close(theirs)
            os.close(their_end)
        starter.wait()  # it has left the reaper behind, as nobody's child
        self._is_closed = False

    def renew(self) -> None:
        """Says that the owner is alive and wanted."""
        self._order(b".")

    def note_descendants(self) -> None:
        """Has everything ended too, marked or not, that is below the owner now and younger than this."""
        self._order(_NOTE)
        if select.select([self._answer_fd], [], [], _NOTE_TIMEOUT_S)[0]:
            os.read(self._answer_fd, 1)

    def close(self) -> None:
        """Ends and removes everything now, and waits until that is done. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        os.close(self._order_fd)
        select.select([self._answer_fd], [], [], _EXIT_TIMEOUT_S)  # closed when it is gone
        os.close(self._answer_fd)

    def _order(self, order: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # it was killed: nothing depends on this write
            os.write(self._order_fd, order)


def owned_folder(parent: Path, token: str) -> Path:
    """Makes a folder that says whose it is, so that `sweep` can tell when its owner is gone."""
    folder = parent / f"{_FOLDER_PREFIX}{token}"
    folder.mkdir(mode=0o700)
    (folder / _OWNER_FILE).write_text(_identity(os.getpid()))
    return folder


def sweep(parent: Path) -> list[Path]:
    """Removes folders whose owners are gone; returns them."""
    removed: list[Path] = []
    for folder in parent.glob(f"{_FOLDER_PREFIX}*"):
        try:
            identity = (folder / _OWNER_FILE).read_text()
        except OSError:
            continue  # it has no owner yet, or is not ours
        pid = identity.partition(" ")[0]
        if identity and not (pid.isdigit() and _identity(int(pid)) == identity):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def main(arguments: Sequence[str]) -> None:
    """The process: `owner_pid token lease_s folder...`, with the owner's pipe as standard input."""
    if os.fork():
        os._exit(0)
    owner_pid, token, lease_s = int(arguments[0]), arguments[1], float(arguments[2])
    folders = arguments[3:]
    noted = _watch(owner_pid, lease_s)
    give_up_at_s = time.monotonic() + _GRACE_S
    while (owned := _owned(token, noted)) and time.monotonic() < give_up_at_s:
        for pid in owned:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _watch(owner_pid: int, lease_s: float) -> set[str]:
    """Until the owner is gone or has let its lease run out; returns what it had noted."""
    owner = _identity(owner_pid)
    noted: set[str] = set()
    while True:
        readable, _, _ = select.select([0], [], [], lease_s or None)
        if not readable:
            if _identity(owner_pid) == owner:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(owner_pid, signal.SIGKILL)
            return noted
        orders = os.read(0, 4096)
        if not orders:
            return noted
        if _NOTE in orders:
            noted |= _descendants(owner_pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(1, _NOTE)


def _owned(token: str, noted: set[str]) -> list[int]:
    """Ids of living processes with the owner's mark or on its note, this one and zombies excepted."""
    mark = f"{OWNER_MARK}={token}".encode()
    others = (pid for pid in _pids() if pid != os.getpid())
    return [
        pid for pid in others if mark in _read(f"/proc/{pid}/environ").split(b"\0") or _identity(pid) in noted
    ]


def _descendants(root: int) -> set[str]:
    """Identities of the processes below one that are younger than this one.

    Other reapers are left out: theirs is to outlive what they watch.
    """
    born = _start_time(os.getpid())
    children: dict[int, list[int]] = {}
    for pid in _pids():
        if __file__.encode() not in _read(f"/proc/{pid}/cmdline"):
            children.setdefault(_parent(pid), []).append(pid)
    found: set[str] = set()
    waiting = [root]
    while waiting:
        for child in children.get(waiting.pop(), []):
            waiting.append(child)
            if _start_time(child) >= born:
                found.add(_identity(child))
    return found - {""}


def _pids() -> list[int]:
    # pathlib would triple the start-up time of this program
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208


def _identity(pid: int) -> str:
    """The process's id and start time, which no other process has; empty if there is none."""
    start_time = _start_time(pid)
    return f"{pid} {start_time}" if start_time else ""


def _start_time(pid: int) -> int:
    """In clock ticks since the machine's start; 0 for a zombie, or if there is no such process."""
    fields = _status(pid)
    return int(fields[19]) if fields and fields[0] not in (b"Z", b"X") else 0


def _parent(pid: int) -> int:
    fields = _status(pid)
    return int(fields[1]) if fields else 0


def _status(pid: int) -> list[bytes]:
    """The fields of /proc/pid/stat after the name, which may hold anything; none if there is no process."""
    return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return b""


if __name__ == "__main__":
    main(sys.argv[1:])
