"""VMMs that are forks of a VMM which has run: they need not translate again what it has translated.

Under TCG nearly all that a new VMM does until its guest first answers is to translate the guest's code:
10,500 blocks, eighty milliseconds. So one VMM of each base, the *prototype*, is made to run what every clone
runs first, is put back to the base, and stopped for ever; and clones are forks of its process, which share
its memory, translated code included, until one of the two changes it. Nothing of QEMU is patched.

The kernel forks one thread of a process. Therefore every thread of a prototype is stopped in the handler of
a signal (`rollout.sandbox.microvm.stopping`), and the first one then serves packets like any template. A fork
makes the other threads anew, on their stacks; all return from their handlers, which restores their registers,
and go on where they stood: in a system call, which a signal may interrupt. What a process has open is dealt
with in `rollout.sandbox.microvm.descriptors`, its confinement in `rollout.sandbox.microvm.family`.

Invariants:

- A prototype runs only what its base holds, never what a clone of it was told; so no clone can change what
  another one is forked from.
- Forks live on without their prototype. The end of the family's first process is the end of all.

Not guaranteed: that forks do not know each other's address space layout (see `template`), and protection of
forks from what their base holds: a base that takes its VMM over has all of them, as it would one by one.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout.errors import BootError, CheckpointError
from rollout.sandbox.microvm import family
from rollout.sandbox.microvm.confinement import FIRST_FD
from rollout.sandbox.microvm.descriptors import identity
from rollout.sandbox.microvm.spawner import Child, Spawner, new_log
from rollout.sandbox.microvm.stopping import Stopped
from rollout.sandbox.microvm.template import (
    CLONE_PARENT,
    CONTROL_FD,
    FORK_FLAGS,
    forked,
    number_from,
    packed,
    stop_handler,
)
from rollout.sandbox.microvm.vmm import Vmm

__all__ = ["Candidate", "Family", "Prototype", "control_pair", "files_of"]

_ANSWER_WITHIN_S = 10.0
_MEMORY_AT = 3
"""Which of a VMM's descriptors is its guest's memory (`VmmEnds.far_fds`)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A VMM that others may be forked from, once it stands still.

    Attributes:
        vmm: It.
        family: Its family.
        control: Our end of its socket, which it serves then.
        given: Which files it was given: those of `VmmEnds.far_fds`, what holds it if anything does, its
            socket, and its log.
        owner: Its user and group.
        limits: Resource limits of its forks.
    """

    vmm: Vmm
    family: Family
    control: socket.socket
    given: tuple[tuple[int, int], ...]
    owner: tuple[str, str]
    limits: Mapping[str, int]

    @property
    def can_fork(self) -> bool:
        """It lives, and has answered whenever it was asked."""
        return self.control.fileno() >= 0 and not self.vmm.child.has_ended

    def fork(
        self, packet: bytes, ram_fd: int, more_fds: Sequence[int]
    ) -> tuple[Vmm, tuple[tuple[int, int], ...]]:
        """Makes a VMM that goes on where this one stopped.

        Args:
            packet: What it does first.
            ram_fd: Its guest's memory, the caller's and open as long as the VMM is used.
            more_fds: What it gets beside those of `VmmEnds.far_fds`.

        Returns:
            It, and which files it was given.

        Raises:
            BootError: This one is gone, or the kernel makes no process.
        """
        ends = self.vmm.new_ends()
        fds = [*ends.far_fds(ram_fd), *more_fds]
        try:
            child = self.family.member(self.control, packet, fds)
        except BaseException:
            ends.close()
            raise
        given = files_of([*fds, child.log_fd])
        ends.has_started()
        return self.vmm.twin(child, ends, ram_fd), given

    def kill(self) -> None:
        """Ends it."""
        self.vmm.kill()
        self.control.close()


class Family:
    """The first process of a family. Blocking; threads may share it, but for each socket they take turns.

    Args:
        spawner: Starts it.
        argv: Program and arguments of its prototype; descriptors are counted from `FIRST_FD`.

    Raises:
        BootError: It did not come up.
    """

    def __init__(self, spawner: Spawner, argv: Sequence[str]) -> None:
        self._control, theirs = control_pair()
        first: Child | None = None
        try:
            with theirs:
                first, self._address = spawner.start_family(argv, theirs)
            number_from(self._control)
        except (OSError, BootError) as error:
            self._control.close()
            if first is not None:
                first.kill()
                first.close()
            raise BootError(f"no family of VMMs can be made: {error}") from error
        self._first = first
        self._has_ended = False

    @property
    def address(self) -> int:
        """Where packets lie in the memory of all of its processes."""
        return self._address

    def start(
        self, fds: Sequence[int], uid: int | None, limits: Mapping[str, int], *, signals_threads: bool = False
    ) -> Child:
        """Starts the program of a VMM that may become a prototype.

        Args:
            fds: Its descriptors from `FIRST_FD` on; the last is its socket.
            uid: Its user.
            limits: Resource limits.
            signals_threads: It and its forks can send signals to their own threads.

        Raises:
            BootError: It could not be started.
        """
        there = range(CONTROL_FD + 1, CONTROL_FD + 2 + len(fds))
        stop = stop_handler(self._address)
        calls = family.prototype(there, limits, uid, stop, signals_threads=signals_threads)
        # Its child, not its sibling, of which the kernel lets the first process of a namespace have none.
        flags = FORK_FLAGS & ~CLONE_PARENT | signal.SIGCHLD
        packet = packed(calls, flags, self._address, control_fd=FIRST_FD + len(fds) - 1)
        return self.member(self._control, packet, fds)

    def member(self, control: socket.socket, packet: bytes, fds: Sequence[int]) -> Child:
        """Has a process of the family fork.

        Args:
            control: Its socket; closed if it does not answer, because it may fork late, and nobody else may
                take that for the answer to what is asked next.
            packet: What the new process does.
            fds: Its descriptors.

        Raises:
            BootError: There is no new process.
        """
        log_fd = new_log()
        try:
            try:
                pid = forked(control, packet, [*fds, log_fd])
            except OSError:
                control.close()
                raise
            if pid < 0:
                raise OSError(-pid, os.strerror(-pid))
            return Child(pid, self._pidfd(pid), log_fd, is_fork=True)
        except OSError as error:
            os.close(log_fd)
            raise BootError(f"a VMM cannot be forked: {error}", retryable=True) from error

    def end(self) -> None:
        """Ends all processes of the family. Idempotent."""
        if not self._has_ended:
            self._has_ended = True
            self._control.close()
            self._first.kill()
            self._first.close()

    def _pidfd(self, pid: int) -> int:
        """Refers to a process of the family.

        The kernel reaps them, so the number may be somebody else's already.
        """
        pidfd = os.pidfd_open(pid)
        try:
            status = Path(f"/proc/{pid}/stat").read_bytes()
            if int(status.rpartition(b")")[2].split()[1]) != self._first.pid:
                raise ProcessLookupError("it has ended")
        except OSError:
            os.close(pidfd)
            raise
        return pidfd


class Prototype:
    """A VMM that stands still for ever. Blocking; threads take turns.

    Args:
        candidate: A VMM whose guest is stopped; the prototype's from now on, and ended if it cannot be one.

    Raises:
        BootError: It cannot be stopped, or has something open that forks cannot share.
    """

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        self._lock = threading.Lock()
        try:
            vmm, family = candidate.vmm, candidate.family
            memory = vmm.memory.start, vmm.memory.end
            stopped = Stopped.of(vmm.pid, family.address, candidate.control, candidate.given)
            self._packet = stopped.fork(candidate.owner, candidate.limits)
            self._next_packet = stopped.successor(candidate.owner, memory, _MEMORY_AT)
        except (OSError, ValueError, CheckpointError) as error:
            candidate.kill()
            raise BootError(f"a VMM cannot be made a prototype: {error}") from error

    @property
    def can_fork(self) -> bool:
        """It lives, and has answered whenever it was asked."""
        return self._candidate.can_fork

    def fork(self, ram_fd: int) -> Vmm:
        """Makes a VMM that goes on where this one stopped.

        Args:
            ram_fd: The guest's memory, the caller's and open as long as the VMM is used.

        Raises:
            BootError: The prototype is gone, or the kernel makes no process.
        """
        return self._fork(self._packet, ram_fd, [])[0]

    def candidate(self, ram_fd: int) -> Candidate:
        """Makes a VMM that may become a prototype itself, on another file of the same content.

        Args:
            ram_fd: What holds all that this one's memory does, and is what it writes on from now on.

        Raises:
            BootError: As `fork`.
        """
        mine = self._candidate
        control, theirs = control_pair()
        try:
            with theirs:
                vmm, given = self._fork(self._next_packet, ram_fd, [theirs.fileno()])
        except BootError:
            control.close()
            raise
        candidate = Candidate(vmm, mine.family, control, given, mine.owner, mine.limits)
        try:
            vmm.stop(_ANSWER_WITHIN_S)  # it stands still; once it answers, its memory is the other file
        except CheckpointError as error:
            candidate.kill()
            raise BootError(f"a VMM cannot be forked: {error.message}", retryable=True) from error
        return candidate

    def close(self) -> None:
        """Ends the prototype; its forks live on. Idempotent."""
        self._candidate.kill()

    def _fork(
        self, packet: bytes, ram_fd: int, more_fds: Sequence[int]
    ) -> tuple[Vmm, tuple[tuple[int, int], ...]]:
        with self._lock:
            return self._candidate.fork(packet, ram_fd, more_fds)


def control_pair() -> tuple[socket.socket, socket.socket]:
    """Our end of a template's socket, which says who answers, and its own."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(_ANSWER_WITHIN_S)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs


def files_of(fds: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Which files descriptors of ours refer to."""
    return tuple(identity(os.fstat(fd)) for fd in fds)
