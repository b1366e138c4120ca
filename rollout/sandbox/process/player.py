"""The player: serves the guest channel, and gets a sandbox ready to be saved.

A keeper's memory is forked, but some things of a process are not memory. What can be made again in a clone
is recorded when the player parks, and made again when the next one starts: open files (by path, position and
flags), the working directory, the file mask. What cannot be is refused: other threads, other processes, open
sockets, pipes and the like, files that have no name any more, and memory that is shared.

Invariant: a refused `process.park` changes nothing; the sandbox goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import resource
import stat
from dataclasses import dataclass

from rollout.errors import GuestError
from rollout.sandbox.agent import Agent, Args, Call
from rollout.sandbox.agent_ops import register_operations
from rollout.sandbox.process.keeper import CHANNEL_FD, CONTROL_FD
from rollout.sandbox.process.walls import WORK
from rollout.types import Value

__all__ = ["Player"]

_STANDARD = frozenset((0, 1, 2, CHANNEL_FD, CONTROL_FD))
_LOST_FLAGS = os.O_CREAT | os.O_EXCL | os.O_TRUNC


@dataclass(frozen=True, slots=True)
class _OpenFile:
    """A file or folder to be opened again under the same number."""

    fd: int
    path: str
    flags: int
    offset: int
    inheritable: bool


class Player:
    """What a player does between its walls; one object, which lives on in the memory of all clones.

    Attributes:
        is_parked: The last player ended because the host asked for it.
        failure: Why it ended otherwise, if it could tell.
    """

    def __init__(self) -> None:
        self.is_parked = False
        self.failure = ""
        self._num_faults = 0
        self._agent: Agent | None = None
        self._files: list[_OpenFile] = []
        self._folder = WORK
        self._mask = 0o022
        self._is_frozen = False

    def prepare(self, num_faults: int) -> None:
        """Forgets how the last player ended.

        Args:
            num_faults: Pages that the keeper has touched since it was forked.
        """
        self.is_parked = False
        self.failure = "the guest closed its channel"
        self._num_faults = num_faults

    def play(self) -> None:
        """Takes up where the last player parked, and serves the channel until it is closed or parks."""
        os.umask(self._mask)
        os.chdir(self._folder)
        for file in self._files:
            _open_again(file)
        self._files = []
        if self._agent is None:
            self._agent = Agent(CHANNEL_FD, CHANNEL_FD)
            register_operations(self._agent)
            self._agent.register("process.park", self._park)
        else:
            self._agent.after_fork(CHANNEL_FD, CHANNEL_FD)
        self._agent.serve()

    def _park(self, call: Call, args: Args) -> Value:
        """Ends the player so that its memory can be forked; answers what the memory costs."""
        assert self._agent is not None
        _refuse_companions()
        own = _STANDARD | {self._agent.loop.fileno()}
        files = [_describe(fd) for fd in _descriptors() if fd not in own]
        _refuse_shared_memory()
        self._folder = os.getcwd()  # noqa: PTH109
        self._mask = os.umask(0o022)
        if self._is_frozen:
            # Exact figures would take longer than the fork. Every page that was copied has cost a fault, and
            # few faults are for something else, so this is a little too much rather than too little.
            num_faults = self._num_faults + resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            private_bytes = num_faults * resource.getpagesize()
        else:
            # The first checkpoint after a boot holds what all later ones share: leave it alone from now on.
            self._is_frozen = True
            gc.collect()
            gc.freeze()
            private_bytes = _private_bytes()
        self._files = [file for file in files if file is not None]
        for file in self._files:
            os.close(file.fd)
        self.is_parked = True
        self._agent.stop()
        return {"private_bytes": private_bytes}


def _descriptors() -> list[int]:
    found: list[int] = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):  # the descriptor of this very listing is closed by now
            os.fstat(int(name))
            found.append(int(name))
    return found


def _refuse_companions() -> None:
    """Threads and processes beside this one would be missing from a clone."""
    num_threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    if num_threads > 1:
        raise GuestError(f"{num_threads - 1} other threads are running, which the process engine cannot save")
    running = [name for name in os.listdir("/proc") if name.isdigit() and name != "1" and _is_running(name)]  # noqa: PTH208
    if running:
        names = ", ".join(sorted({_name_of(pid) for pid in running}))
        raise GuestError(
            f"{len(running)} background processes are running ({names}), which the process engine cannot "
            "save: end them first, or use the microvm engine"
        )


def _is_running(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _name_of(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            return file.read().strip()
    except OSError:
        return "ended meanwhile"


def _describe(fd: int) -> _OpenFile | None:
    """How to open a descriptor again; None if siblings can share it."""
    target = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
    status = os.fstat(fd)
    if stat.S_ISCHR(status.st_mode):
        return None  # such as /dev/urandom: it has no position
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise GuestError(
            f"descriptor {fd} ({target}) is open, which the process engine cannot save: close it first"
        )
    if not _is_at(target, status):
        raise GuestError(
            f"the open file {target} has no name, which the process engine cannot save: close it first"
        )
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~_LOST_FLAGS | os.O_CLOEXEC
    offset = os.lseek(fd, 0, os.SEEK_CUR)
    return _OpenFile(fd, target, flags, offset, os.get_inheritable(fd))


def _is_at(path: str, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), status)  # noqa: PTH116
    except OSError:
        return False


def _open_again(file: _OpenFile) -> None:
    fd = os.open(file.path, file.flags)
    if fd != file.fd:
        os.dup2(fd, file.fd, inheritable=file.inheritable)
        os.close(fd)
    else:
        os.set_inheritable(fd, file.inheritable)
    os.lseek(file.fd, file.offset, os.SEEK_SET)


def _refuse_shared_memory() -> None:
    """Pages that are shared by intent would stay shared with a clone."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:  # noqa: PTH123
        shared_kib = next((line.split()[1] for line in file if line.startswith("RssShmem:")), "0")
    if shared_kib == "0":
        return
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        for line in file:
            fields = line.split(maxsplit=5)
            if fields[1].startswith("rw") and fields[1].endswith("s"):
                what = fields[5].strip() if len(fields) > 5 else "without a name"
                raise GuestError(
                    f"memory is mapped shared ({what}), which the process engine cannot save: unmap it first"
                )


def _private_bytes() -> int:
    """Memory that this process does not share with the checkpoint that it was forked from."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:  # noqa: PTH123
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Private_"))
