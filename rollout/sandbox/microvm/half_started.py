"""VMMs that are forks of a program which has begun to start: what all starts have in common is done once.

A machine under KVM cannot be forked, because the kernel keeps it for the process that made it. But before
QEMU makes its machine it reads its arguments, and lays out the types of all devices. There a program is held,
and stopped for ever with all of its threads (`rollout.sandbox.microvm.stopping`); VMMs are forks of it, which
share what it has laid out, and go on to make a machine each.

What holds it is one of QEMU's own objects, which is read from a file: a pipe in which nothing comes. The
program is given the writing end, and opens that by its path, for reading. So we know when it is there: a pipe
tells whether it has a reader. Each fork has a pipe of its own, and goes on with what we write into that, or
ends: one that comes late, or whose descriptors we have no room for, is nobody's.

Forks keep the root folder that every VMM has, because they have files to open yet.
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import BinaryIO

from rollout.errors import BootError
from rollout.sandbox.microvm.prototype import Candidate
from rollout.sandbox.microvm.spawner import Child
from rollout.sandbox.microvm.stopping import Stopped
from rollout.sandbox.microvm.vmm import Vmm

__all__ = ["HalfStarted", "pipe"]

_LOOK_S = 0.0005
_GO_ON, _END = b"Z28gb24=", b"!"
"""What the object is made of: base64, and what cannot be, of which QEMU ends."""


class HalfStarted:
    """A program that stands still before it makes its machine. Blocking; threads take turns.

    Args:
        candidate: It, just started; this object's from now on, and ended if it cannot be held.
        hold: Our end of the pipe that holds it, of which it has the other.
        timeout_s: Deadline of its start, and of each fork's.

    Raises:
        BootError: It does not come so far, or cannot be stopped there.
    """

    def __init__(self, candidate: Candidate, hold: BinaryIO, timeout_s: float) -> None:
        self._candidate = candidate
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        vmm, family = candidate.vmm, candidate.family
        try:
            _wait_for_reader(hold, vmm.child, timeout_s)
            stopped = Stopped.of(vmm.pid, family.address, candidate.control, candidate.given)
            self._packet = stopped.fork(candidate.owner, candidate.limits, keeps_root=True)
        except (OSError, ValueError) as error:
            candidate.kill()
            raise BootError(f"a VMM cannot be held while it starts: {error}") from error

    @property
    def can_fork(self) -> bool:
        """It lives, and has answered whenever it was asked."""
        return self._candidate.can_fork

    def fork(self, ram_fd: int) -> Vmm:
        """A dormant VMM.

        Args:
            ram_fd: The guest's memory, the caller's and open as long as the VMM is used.

        Raises:
            BootError: The program is gone, the kernel makes no process, or the VMM does not come up in time:
                then this object makes no more.
        """
        theirs, ours = pipe()
        with theirs, ours:
            word = _END
            try:
                with self._lock:
                    vmm, _ = self._candidate.fork(self._packet, ram_fd, [theirs.fileno()])
                word = _GO_ON
            finally:
                ours.write(word)
        try:
            vmm.negotiate(self._timeout_s)
        except BootError:
            with self._lock:  # another thread may be at its socket
                self.close()
            raise
        return vmm

    def close(self) -> None:
        """Ends the program; its forks live on. Idempotent."""
        self._candidate.kill()


def pipe() -> tuple[BinaryIO, BinaryIO]:
    """The reading and the writing end of a new one.

    Raises:
        BootError: There are no descriptors left.
    """
    try:
        reading_fd, writing_fd = os.pipe()
    except OSError as error:
        raise BootError(f"a VMM cannot be started: {error}", retryable=True) from error
    os.fchmod(writing_fd, 0o644)  # a VMM's user is another one
    return os.fdopen(reading_fd, "rb", 0), os.fdopen(writing_fd, "wb", 0)


def _wait_for_reader(hold: BinaryIO, child: Child, timeout_s: float) -> None:
    """Returns once somebody has opened a pipe for reading.

    Raises:
        OSError: Nobody did in time.
    """
    readers = select.poll()
    readers.register(hold, 0)
    give_up_at_s = time.monotonic() + timeout_s
    while readers.poll(0):  # POLLERR: there is none
        if child.has_ended or time.monotonic() > give_up_at_s:
            raise OSError(f"it does not come so far; it said: {child.log()}")
        time.sleep(_LOOK_S)
