"""Puts a live VMM back to a checkpoint of its base, without a new process.

Three things must happen while it stands still, in this order:

1. TCG forgets the code that it translated from pages that are about to change. Pages are written from
   outside, which TCG cannot see, so QEMU is first asked to write to them itself (zeros, by the `memset` of
   its qtest protocol, which any accelerator serves): that path drops translated code, exactly where there is
   some. Code of every other page stays translated, which is what makes a rewind worth ten starts.
2. The pages are written.
3. `loadvm` resets every device and loads the checkpoint's device state, from a disk of the VMM's own.

Where the vCPU's state cannot be loaded without throwing all translated code away, it is thrown away: slower,
and as right (`device_state.without_code_flush`). Under KVM there is no translated code.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable

import numpy as np

from rollout.sandbox.microvm.device_state import without_code_flush
from rollout.sandbox.microvm.machine import GUEST_PAGE_BYTES
from rollout.sandbox.microvm.memory import GuestMemory, PageNumbers, Pages, runs
from rollout.sandbox.microvm.qmp import QmpClient, QmpError
from rollout.sandbox.microvm.state_disk import (
    MAX_STATE_BYTES,
    SNAPSHOT_NAME,
    STATE_OFFSET,
    empty_state_disk,
)

__all__ = ["Rewinder"]

_ACKNOWLEDGED = b"OK\n"
_EMPTY_DISK = empty_state_disk()
_COMMANDS_AT_ONCE = 256
"""So few that their answers fit into a socket's buffer while nobody reads them."""


class Rewinder:
    """What it takes to rewind one VMM. Its far ends go to the VMM, which gets copies of `far_fds`.

    Args:
        forgets_code: The VMM translates code, and must be told of changes.

    Attributes:
        forgets_code: See above.
    """

    def __init__(self, *, forgets_code: bool) -> None:
        self._memset, self._their_memset = socket.socketpair()
        try:
            self._disk_fd = os.memfd_create("vmm-state-disk", os.MFD_CLOEXEC)
        except OSError:
            self._memset.close()
            self._their_memset.close()
            raise
        os.ftruncate(self._disk_fd, len(_EMPTY_DISK))
        os.pwrite(self._disk_fd, _EMPTY_DISK[:STATE_OFFSET], 0)
        self.forgets_code = forgets_code

    @property
    def far_fds(self) -> tuple[int, int]:
        """Descriptors for the VMM: the disk, and the socket of its qtest protocol."""
        return self._disk_fd, self._their_memset.fileno()

    def has_started(self) -> None:
        """The VMM has its copies."""
        self._their_memset.close()

    def rewind(
        self,
        qmp: QmpClient,
        memory: GuestMemory,
        device_state: bytes,
        page_numbers: PageNumbers,
        pages: Pages,
        timeout_s: float,
    ) -> None:
        """Changes pages and loads device state; the vCPU must be stopped, and stays so.

        Raises:
            QmpError: The VMM is gone, late, or does not take the state.
            CheckpointError: The VMM is gone.
        """
        stream = device_state
        if self.forgets_code:
            stream = without_code_flush(device_state) or device_state
        self.change(memory, page_numbers, pages, timeout_s)
        if len(stream) > MAX_STATE_BYTES:
            raise QmpError(f"device state of {len(stream)} bytes does not fit its disk")
        os.pwrite(self._disk_fd, stream, STATE_OFFSET)
        command = {"command-line": f"loadvm {SNAPSHOT_NAME}"}
        if words := qmp.execute("human-monitor-command", command, timeout_s=timeout_s).strip():
            raise QmpError(f"loadvm: {words}")

    def change(self, memory: GuestMemory, page_numbers: PageNumbers, pages: Pages, timeout_s: float) -> None:
        """Changes pages of a stopped machine, and has it forget what it translated from them.

        Raises:
            QmpError: The VMM is gone, or late.
            CheckpointError: The VMM is gone.
        """
        if self.forgets_code:
            self._forget_code(page_numbers, timeout_s)
        memory.write(page_numbers, pages)

    def close(self) -> None:
        """Closes the near ends."""
        os.close(self._disk_fd)
        self._memset.close()
        self._their_memset.close()

    def _forget_code(self, page_numbers: PageNumbers, timeout_s: float) -> None:
        give_up_at_s = time.monotonic() + timeout_s
        firsts, lengths = runs(page_numbers)
        starts = (firsts.astype(np.uint64) * GUEST_PAGE_BYTES).tolist()
        sizes = (lengths.astype(np.uint64) * GUEST_PAGE_BYTES).tolist()
        commands = [
            b"memset 0x%x 0x%x 0x0\n" % (start, size) for start, size in zip(starts, sizes, strict=True)
        ]
        try:
            for begin in range(0, len(commands), _COMMANDS_AT_ONCE):
                self._run(commands[begin : begin + _COMMANDS_AT_ONCE], give_up_at_s)
        except OSError as error:
            raise QmpError(f"the VMM is gone ({error})") from error

    def _run(self, commands: Iterable[bytes], give_up_at_s: float) -> None:
        commands = list(commands)
        self._memset.settimeout(max(0.001, give_up_at_s - time.monotonic()))
        self._memset.sendall(b"".join(commands))
        expected, answer = _ACKNOWLEDGED * len(commands), b""
        while len(answer) < len(expected):
            self._memset.settimeout(max(0.001, give_up_at_s - time.monotonic()))
            if not (data := self._memset.recv(1 << 16)):
                raise QmpError("the VMM is gone")
            answer += data
        if answer != expected:
            raise QmpError("the VMM refused to forget translated code")
