"""One VMM: become a checkpoint, save, stop, go on, end. Blocking, for worker threads.

One thread at a time may use a VMM.

Life: dormant (a base mapped, no state) → running ⇄ stopped → dead. A dormant VMM becomes any checkpoint of
its base, once, by an incoming migration; one that has run becomes any other by a rewind, again and again.
Either way pages go into its memory first, because loading device state reads the queues in it, then the
device state, and then the vCPU runs. All errors of the monitor end here, as `ForkError` or
`CheckpointError`; after one the VMM must be killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import termios
import time

from rollout.errors import BootError, CheckpointError, ForkError
from rollout.sandbox.microvm.device_state import without_code_flush
from rollout.sandbox.microvm.ends import VmmEnds
from rollout.sandbox.microvm.machine import STATE_SET
from rollout.sandbox.microvm.memory import GuestMemory, PageNumbers, Pages, RawState, room_for
from rollout.sandbox.microvm.qmp import QmpClient, QmpError
from rollout.sandbox.microvm.spawner import Child

__all__ = ["Vmm"]

_MAX_STATE_BYTES = 16 << 20
_SAVE = "xen-save-devices-state"
"""In every build, whatever its name says."""
_INTERRUPTS, _INTERRUPT_S = 3, 0.0005
"""How often and how long a machine may go on to take a pending interrupt before it is saved."""
_MIN_MORE_PAGES = 128
"""What a machine may at least have written since its pages were counted, for its next save to find room."""
_MAX_REWINDS = 1000
"""Uses of one process, so that whatever QEMU might not give back stays bounded."""


class Vmm:
    """A QEMU process. It comes from `start_vmm` or is a fork (`Candidate.fork`); end it with `kill`.

    Args:
        child: The process.
        ends: What it and we share; the VMM's from now on.
        ram_fd: Its guest's memory, the caller's and open as long as the VMM is used.
        size_bytes: How large that is.
        use_scan: See `GuestMemory`.
        is_dormant: It has no state yet.

    Attributes:
        channel: Socket to the guest's agent; users take a `dup` of it.
        ram_fd: See above.
        is_dormant: See above.
    """

    def __init__(
        self,
        child: Child,
        ends: VmmEnds,
        ram_fd: int,
        size_bytes: int,
        *,
        use_scan: bool,
        is_dormant: bool,
    ) -> None:
        self.child = child
        self.channel = ends.channel
        self.ram_fd = ram_fd
        self.is_dormant = is_dormant
        self._qmp = QmpClient(ends.qmp)
        self._state_fds = ends.state_fds
        self._rewinder = ends.rewinder
        self._num_rewinds = 0
        self._num_private = 0
        self._size_bytes = size_bytes
        self._use_scan = use_scan
        self._memory: GuestMemory | None = None
        self._is_closed = False

    def negotiate(self, timeout_s: float) -> None:
        """Begins to speak with the monitor of a program that has just been started.

        Raises:
            BootError: It did not come up in time, and is ended; its own last words are in the message.
        """
        try:
            self._qmp.negotiate(timeout_s)
        except QmpError as error:
            words = self.child.log()
            self.kill()
            raise BootError(f"the VMM did not start: {error}; it said: {words}", retryable=True) from error

    def new_ends(self) -> VmmEnds:
        """What a fork of this one's process and we are to share.

        Raises:
            BootError: There are no descriptors left.
        """
        assert self._rewinder is not None, "the VM that makes a base is never forked"
        return VmmEnds.open(forgets_code=self._rewinder.forgets_code)

    def twin(self, child: Child, ends: VmmEnds, ram_fd: int) -> Vmm:
        """The VMM that a fork of this one's process is; it has run if this one has.

        Args:
            child: The process.
            ends: Those of `new_ends`; the twin's from now on.
            ram_fd: Its guest's memory.
        """
        size_bytes, is_dormant = self._size_bytes, self.is_dormant
        return Vmm(child, ends, ram_fd, size_bytes, use_scan=self._use_scan, is_dormant=is_dormant)

    @property
    def is_closed(self) -> bool:
        """It has been killed."""
        return self._is_closed

    @property
    def pid(self) -> int:
        """Process id, as this process sees it."""
        return self.child.pid

    @property
    def memory(self) -> GuestMemory:
        """The guest's memory.

        Raises:
            CheckpointError: The VMM is gone.
        """
        if self._memory is None:
            status = os.fstat(self.ram_fd)
            self._memory = GuestMemory.find(
                self.pid, (status.st_dev, status.st_ino), self._size_bytes, use_scan=self._use_scan
            )
        return self._memory

    def assign(self, device_state: bytes, page_numbers: PageNumbers, pages: Pages, timeout_s: float) -> None:
        """Makes a dormant VMM into a checkpoint; its vCPU runs when this returns.

        Raises:
            ForkError: The VMM is gone or does not take the state.
        """
        read_fd, write_fd = os.pipe()
        try:
            os.set_blocking(write_fd, False)
            if os.write(write_fd, device_state) != len(device_state):
                raise ForkError("the device state does not fit into a pipe")
            os.close(write_fd)
            write_fd = -1
            self.memory.write(page_numbers, pages)
            self._num_private = len(page_numbers)
            self._qmp.forget_events()
            self._qmp.execute("getfd", {"fdname": "state"}, fds=[read_fd], timeout_s=timeout_s)
            self._qmp.execute("migrate-incoming", {"uri": "fd:state"}, timeout_s=timeout_s)
            self._qmp.wait_event("RESUME", timeout_s)
            self.is_dormant = False
        except (QmpError, CheckpointError, OSError) as error:
            raise ForkError(f"a VMM did not become its checkpoint: {error}{self._words()}") from error
        finally:
            os.close(read_fd)
            if write_fd >= 0:
                os.close(write_fd)

    def rewind(
        self,
        device_state: bytes,
        page_numbers: PageNumbers,
        pages: Pages,
        timeout_s: float,
        *,
        resume: bool = True,
    ) -> None:
        """Makes a stopped VMM into a checkpoint.

        Args:
            device_state: What the checkpoint has.
            page_numbers: Pages in which its memory differs from the checkpoint's, shape [n], ascending.
            pages: What they are to hold, shape [n, 4096].
            timeout_s: Deadline of each step.
            resume: Let the vCPU run.

        Raises:
            ForkError: The VMM is gone or does not take the state.
        """
        assert self._rewinder is not None, "the VM that makes a base is never put back"
        self._num_rewinds += 1
        try:
            self._rewinder.rewind(self._qmp, self.memory, device_state, page_numbers, pages, timeout_s)
            if resume:
                self._qmp.execute("cont", timeout_s=timeout_s)
        except (QmpError, CheckpointError, OSError) as error:
            raise ForkError(f"a VMM did not go back to its checkpoint: {error}{self._words()}") from error

    def change_memory(self, page_numbers: PageNumbers, pages: Pages, timeout_s: float) -> None:
        """Changes pages of a stopped VMM; its devices must be loaded before it runs again.

        Raises:
            ForkError: The VMM is gone.
        """
        assert self._rewinder is not None, "the VM that makes a base is never put back"
        try:
            self._rewinder.change(self.memory, page_numbers, pages, timeout_s)
        except (QmpError, CheckpointError) as error:
            raise ForkError(f"a VMM did not go back to its checkpoint: {error}{self._words()}") from error

    def retire(self, timeout_s: float) -> bool:
        """Stops a VMM whose user is gone; whether it may become another checkpoint.

        Nothing of the last user's conversation may reach the next one: what the guest sent is dropped, and a
        VMM that has not taken all that was sent to it is of no more use.

        Raises:
            CheckpointError: The VMM is gone.
        """
        self._command("stop", timeout_s)
        unread = fcntl.ioctl(self.channel.fileno(), termios.TIOCOUTQ, bytes(4))
        if any(unread) or self._num_rewinds >= _MAX_REWINDS:
            return False
        self.channel.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self.channel.recv(1 << 16):
                pass
        return True

    def save(self, timeout_s: float, *, resume: bool) -> RawState:
        """Reads the machine's state; it stands still only meanwhile.

        Args:
            timeout_s: Deadline of each step.
            resume: Let the vCPU run afterwards.

        Raises:
            CheckpointError: The VMM is gone or does not give its state.
        """
        try:
            state = self._stop_and_read(timeout_s)
            for _ in range(_INTERRUPTS):
                if not self._has_pending_interrupt(state.device_state):
                    break
                self._qmp.execute("cont", timeout_s=timeout_s)
                time.sleep(_INTERRUPT_S)
                state = self._stop_and_read(timeout_s)
            if resume:
                self._qmp.execute("cont", timeout_s=timeout_s)
        except (QmpError, OSError) as error:
            raise CheckpointError(f"a VMM did not give its state: {error}{self._words()}") from error
        return state

    def save_base(self, timeout_s: float) -> bytes:
        """Stops a machine that writes into its base file, and returns its device state.

        Raises:
            CheckpointError: The VMM is gone or does not give its state.
        """
        try:
            self._qmp.execute("stop", timeout_s=timeout_s)
            return self._save_devices(timeout_s)
        except (QmpError, OSError) as error:
            raise CheckpointError(f"a VMM did not give its state: {error}{self._words()}") from error

    def stop(self, timeout_s: float) -> None:
        """Stops the vCPU; guest time stands still.

        Raises:
            CheckpointError: The VMM is gone.
        """
        self._command("stop", timeout_s)

    def resume(self, timeout_s: float) -> None:
        """Lets the vCPU run.

        Raises:
            CheckpointError: The VMM is gone.
        """
        self._command("cont", timeout_s)

    def kill(self) -> None:
        """Ends the process and closes what it held. Idempotent; does not wait."""
        if self._is_closed:
            return
        self._is_closed = True
        self.child.kill()
        self.child.close()
        self._qmp.close()
        self.channel.close()
        for fd in self._state_fds:
            os.close(fd)
        if self._rewinder is not None:
            self._rewinder.close()

    def _command(self, name: str, timeout_s: float) -> None:
        try:
            self._qmp.execute(name, timeout_s=timeout_s)
        except QmpError as error:
            raise CheckpointError(f"{error}{self._words()}") from error

    def _has_pending_interrupt(self, device_state: bytes) -> bool:
        """Whether the vCPU should first take an interrupt: without one, a state is put back much faster.

        See `device_state`.
        """
        translates = self._rewinder is not None and self._rewinder.forgets_code
        return translates and without_code_flush(device_state) is None

    def _stop_and_read(self, timeout_s: float) -> RawState:
        """Stops the machine and reads it.

        Its memory is read while the VMM writes its device state: neither changes what the other reads.
        """
        room = room_for(self._num_private + max(_MIN_MORE_PAGES, self._num_private // 4))
        begun_s = time.perf_counter()
        self._qmp.send("stop", timeout_s=timeout_s)
        self._send_save(timeout_s)
        self._qmp.receive("stop", timeout_s)
        numbers = self.memory.private_pages()
        pages = self.memory.read(numbers, room)
        device_state = self._receive_save(timeout_s)
        self._num_private = len(numbers)
        return RawState(device_state, numbers, pages, time.perf_counter() - begun_s)

    def _save_devices(self, timeout_s: float) -> bytes:
        self._send_save(timeout_s)
        return self._receive_save(timeout_s)

    def _send_save(self, timeout_s: float) -> None:
        # QEMU writes on from the position of the descriptor that it was given, and does not truncate.
        read_fd, write_fd = self._state_fds
        os.lseek(write_fd, 0, os.SEEK_SET)
        os.ftruncate(read_fd, 0)
        arguments = {"filename": f"/dev/fdset/{STATE_SET}", "live": False}
        self._qmp.send(_SAVE, arguments, timeout_s=timeout_s)

    def _receive_save(self, timeout_s: float) -> bytes:
        self._qmp.receive(_SAVE, timeout_s)
        return os.pread(self._state_fds[0], _MAX_STATE_BYTES, 0)

    def _words(self) -> str:
        if self._is_closed:
            return ""
        words = self.child.log()
        return f" (it said: {words})" if words else ""
