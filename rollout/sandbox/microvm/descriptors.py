"""What a VMM has open, and how a fork of it gets what is its own. Pure but for `opened`.

A process that forks shares every open file with its fork. Those that a VMM is given are replaced by those of
the fork, under every number that they have, and do not block where the VMM's do not; event counters by new
ones. The rest must be something that can be shared: a file that is only read (QEMU reads at positions of its
own), a null device, a signal descriptor (each reader gets its own process's signals), an epoll set without
members. Anything else is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout.sandbox.microvm import family
from rollout.sandbox.microvm.confinement import SystemCall

__all__ = ["Exchange", "Opened", "exchange", "identity", "opened"]

_MAX_FDS = 256
_SHAREABLE = ("/dev/null", "anon_inode:[signalfd]")


@dataclass(frozen=True, slots=True)
class Opened:
    """A descriptor of another process.

    Attributes:
        number: The descriptor.
        target: What it refers to, as `/proc` has it.
        file: Device and inode.
        flags: Those of `open`.
        info: What the kernel says about it (`/proc/PID/fdinfo`).
    """

    number: int
    target: str
    file: tuple[int, int]
    flags: int
    info: str

    @property
    def closes_on_exec(self) -> int:
        """`O_CLOEXEC`, or 0."""
        return self.flags & os.O_CLOEXEC

    @property
    def can_be_shared(self) -> bool:
        """Whether it does not matter who else has it."""
        if self.target == "anon_inode:[eventpoll]":
            return "tfd:" not in self.info
        is_only_read = self.target.startswith("/") and self.flags & os.O_ACCMODE == os.O_RDONLY
        return self.target in _SHAREABLE or is_only_read


@dataclass(frozen=True, slots=True)
class Exchange:
    """How a fork's descriptors become its own.

    Attributes:
        numbers: Which numbers what comes with the packet gets, in its order.
        calls: What the fork does.
        afterwards: What the forked process does: it lets go of what came.
        free_fd: The lowest number that is no descriptor of the fork afterwards.
    """

    numbers: tuple[int, ...]
    calls: tuple[SystemCall, ...]
    afterwards: tuple[SystemCall, ...]
    free_fd: int


def opened(pid: int) -> list[Opened]:
    """What a process that stands still has open, by number.

    Raises:
        OSError: It is gone, or cannot be inspected.
    """
    found: list[Opened] = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        info = Path(f"/proc/{pid}/fdinfo/{path.name}").read_text()
        target, file = str(path.readlink()), identity(path.stat())
        found.append(Opened(int(path.name), target, file, _field(info, "flags", 8), info))
    return sorted(found, key=lambda each: each.number)


def identity(status: os.stat_result) -> tuple[int, int]:
    """Device and inode: which file a descriptor refers to."""
    return status.st_dev, status.st_ino


def exchange(there: Sequence[Opened], given: Sequence[tuple[int, int]], kept: int | None) -> Exchange:
    """Plans how a fork's descriptors become its own.

    Args:
        there: What the forked process has open.
        given: The files that it was given; the fork gets as many others, in this order.
        kept: Which of them, if any, the fork gets nothing for, and closes.

    Raises:
        OSError: Something is open that cannot be shared, or too much.
    """
    taken = {each.number for each in there}
    free = [number for number in range(_MAX_FDS) if number not in taken]
    wanted = [index for index in range(len(given)) if index != kept]
    if len(free) <= len(wanted):
        raise OSError(f"with {len(taken)} descriptors it has none left for its forks")
    coming = dict(zip(wanted, free, strict=False))
    spare = free[len(wanted)]
    calls: list[SystemCall] = []
    lowest = free[0]
    for each in there:
        index = next((index for index, file in enumerate(given) if file == each.file), None)
        if index is not None and index == kept:
            calls.append(family.closed(each.number))
            lowest = min(lowest, each.number)
        elif index is not None:
            calls.append(family.replaced(each.number, coming[index], closes_on_exec=each.closes_on_exec))
            if each.flags & os.O_NONBLOCK:
                calls.append(family.not_blocking(each.number))
        elif each.target == "anon_inode:[eventfd]":
            flags, count = each.flags & os.O_NONBLOCK, _field(each.info, "eventfd-count", 16)
            calls += family.new_eventfd(each.number, count, flags, each.closes_on_exec, spare)
        elif not each.can_be_shared:
            raise OSError(f"it has {each.target} open as {each.number}, which forks cannot share")
    closing = [family.closed(number) for number in coming.values()]
    return Exchange(tuple(coming.values()), tuple(calls), tuple(closing), lowest)


def _field(info: str, name: str, base: int) -> int:
    found = re.search(rf"^{name}:\s*([0-9a-f]+)$", info, re.MULTILINE)
    if found is None:
        raise OSError(f"this kernel does not tell the {name} of a descriptor")
    return int(found[1], base)
