"""Stops a process for ever, so that it can be forked with all of its threads.

Each thread gets a signal, whose handler (`rollout.sandbox.microvm.template`, label `stop`) notes where its
stack and its thread-local storage are, and never returns. The first thread gets it last, and serves packets.

Before that all threads are at rest, as far as can be seen from outside: each slept, and none ran in between.
Threads of forks have other ids than those that they go on for, and a lock that is its owner's alone knows the
owner by its id: who was stopped with one in hand could neither take it again nor give it back.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rollout.sandbox.microvm import family
from rollout.sandbox.microvm.confinement import FIRST_FD, SystemCall
from rollout.sandbox.microvm.descriptors import Opened, exchange, opened
from rollout.sandbox.microvm.template import FORK_FLAGS, number_from, packed, threads_address

__all__ = ["Stopped"]

_STOP_WITHIN_S, _LOOK_S = 5.0, 0.0005
_SYS_TGKILL = 234
_COUNTERS = struct.Struct("QQ")
_SLOT = struct.Struct("QQQ")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Stopped:
    """A process that stands still.

    Attributes:
        address: Where packets lie in its memory.
        threads: Calls that make its threads anew, but for the first.
        there: What it has open.
        given: Which files it was given; the last but one is its socket.
    """

    address: int
    threads: tuple[SystemCall, ...]
    there: tuple[Opened, ...]
    given: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls, pid: int, address: int, control: socket.socket, given: tuple[tuple[int, int], ...]
    ) -> Stopped:
        """Stops a process.

        Args:
            pid: It; it must not end before this returns.
            address: See the class.
            control: Our end of its socket.
            given: See the class.

        Raises:
            OSError: It does not stop.
        """
        return cls(address, tuple(_stop(pid, address, control)), tuple(opened(pid)), given)

    def fork(self, owner: tuple[str, str], limits: Mapping[str, int], *, keeps_root: bool = False) -> bytes:
        """The packet for a fork that goes on, confined for good; its descriptors are all but the socket.

        Args:
            owner: User and group of the process.
            limits: Resource limits of the fork.
            keeps_root: It has files to open yet: see `family.fork`.

        Raises:
            OSError: Something is open that cannot be shared.
        """
        change = exchange(self.there, self.given, len(self.given) - 2)
        confined = family.fork(owner, limits, change.free_fd, keeps_root=keeps_root)
        calls = [*change.calls, *change.afterwards, *confined]
        return packed(
            [*calls, *self.threads],
            family.FORK_NAMESPACES | FORK_FLAGS,
            self.address,
            afterwards=change.afterwards,
        )

    def successor(self, owner: tuple[str, str], memory: tuple[int, int], memory_at: int) -> bytes:
        """The packet for a fork that can be stopped like this process, with a socket of its own.

        Args:
            owner: User and group of the process.
            memory: Where the guest's memory lies; the fork maps what it gets over it.
            memory_at: Which of its descriptors that is.

        Raises:
            OSError: Something is open that cannot be shared.
        """
        change = exchange(self.there, self.given, None)
        mapping = family.mapped(*memory, change.numbers[memory_at])
        calls = [mapping, *change.calls, *change.afterwards, *family.successor(owner, change.free_fd)]
        return packed(
            [*calls, *self.threads],
            family.SUCCESSOR_NAMESPACES | FORK_FLAGS,
            self.address,
            control_fd=FIRST_FD + len(self.given) - 2,
            afterwards=change.afterwards,
        )


def _stop(pid: int, address: int, control: socket.socket) -> list[SystemCall]:
    _wait_until_at_rest(pid)
    threads = _numbers(pid)
    others = [number for number in threads if number != pid]
    counters_at = threads_address(address)
    for number in others:
        _send(pid, number)
    give_up_at_s = time.monotonic() + _STOP_WITHIN_S
    while _COUNTERS.unpack(_read(pid, counters_at, _COUNTERS.size)) != (len(others), len(others)):
        if time.monotonic() > give_up_at_s:
            raise OSError(f"its {len(others) + 1} threads do not stop")
        time.sleep(_LOOK_S)
    _send(pid, pid)
    number_from(control)
    if _numbers(pid) != threads:  # one that is not stopped may hold a lock, and forks would lack it
        raise OSError("it has begun a thread meanwhile")
    slots = _read(pid, counters_at + _COUNTERS.size, _SLOT.size * len(others))
    return [family.thread(*slot) for slot in _SLOT.iter_unpack(slots)]


def _wait_until_at_rest(pid: int) -> None:
    """Returns once every thread of a process sleeps, and none has run for a moment.

    Raises:
        OSError: That does not come.
    """
    give_up_at_s = time.monotonic() + _STOP_WITHIN_S
    before: list[str] = []
    while True:
        try:
            now = [_state(task) for task in sorted(Path(f"/proc/{pid}/task").iterdir())]
        except (FileNotFoundError, ProcessLookupError):  # one has ended, or all have
            now = []
        if not now and not Path(f"/proc/{pid}").exists():
            raise OSError("it has ended")
        if now and now == before and all("State:\tS" in state for state in now):
            return
        if time.monotonic() > give_up_at_s:
            raise OSError("its threads do not come to rest")
        before = now
        time.sleep(_LOOK_S)


def _state(task: Path) -> str:
    """What a thread does, and how often it has begun to do so."""
    lines = (task / "status").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith(("State:", "voluntary_", "nonvoluntary_")))


def _numbers(pid: int) -> list[int]:
    return sorted(int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir())


def _send(pid: int, thread: int) -> None:
    if _libc.syscall(_SYS_TGKILL, pid, thread, int(family.STOP_SIGNAL)) < 0:
        raise OSError(ctypes.get_errno(), "a thread cannot be signalled")


def _read(pid: int, address: int, num_bytes: int) -> bytes:
    room = ctypes.create_string_buffer(max(num_bytes, 1))
    local = struct.pack("QQ", ctypes.addressof(room), num_bytes)
    remote = struct.pack("QQ", address, num_bytes)
    if num_bytes and _libc.process_vm_readv(pid, local, 1, remote, 1, 0) != num_bytes:
        raise OSError(ctypes.get_errno(), f"its memory cannot be read: {os.strerror(ctypes.get_errno())}")
    return room.raw[:num_bytes]
