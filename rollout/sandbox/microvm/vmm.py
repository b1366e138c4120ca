"""One VMM: start, become a checkpoint, save, stop, go on, end. Blocking, for worker threads.

One thread at a time may use a VMM.

Life: dormant (a base mapped, no state) → running ⇄ stopped → dead. A dormant VMM becomes any checkpoint of
its base: pages go into its memory first, because loading device state reads the queues in it, then the
device state, and then the vCPU runs. All errors of the monitor end here, as `ForkError` or
`CheckpointError`; after one the VMM must be killed.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from rollout.errors import BootError, CheckpointError, ForkError
from rollout.sandbox.microvm.launcher import FIRST_FD
from rollout.sandbox.microvm.machine import STATE_SET, MachineShape, Start, qemu_argv
from rollout.sandbox.microvm.memory import GuestMemory, PageNumbers, Pages
from rollout.sandbox.microvm.qmp import QmpClient, QmpError
from rollout.sandbox.microvm.spawner import Child, Spawner
from rollout.sandbox.microvm.tsc import measure_tsc_khz

__all__ = ["BootFiles", "RawState", "Vmm"]

_MAX_STATE_BYTES = 16 << 20
_LIMITS = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 256}


@dataclass(frozen=True, slots=True)
class BootFiles:
    """What a machine is made from.

    Attributes:
        binary: The QEMU program.
        disk: Read-only disk; None for a guest without an operating system.
        kernel: Kernel, for a boot.
        initrd: Its initial file system.
        firmware: Raw firmware instead of a kernel.
    """

    binary: str
    disk: Path | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    firmware: Path | None = None


@dataclass(frozen=True, slots=True)
class RawState:
    """A stopped machine as it was read: device state, and the pages that differ from its base.

    Attributes:
        device_state: What QEMU saved.
        page_numbers: Shape [n], ascending.
        pages: Shape [n, 4096].
        pause_s: Seconds that the guest stood still for it.
    """

    device_state: bytes
    page_numbers: PageNumbers
    pages: Pages
    pause_s: float


class Vmm:
    """A QEMU process. Make it with `start`; end it with `kill`.

    Attributes:
        channel: Socket to the guest's agent; whoever takes it closes it.
    """

    def __init__(
        self,
        child: Child,
        qmp: QmpClient,
        channel: socket.socket,
        state_fd: int,
        ram_fd: int,
        size_bytes: int,
        *,
        use_scan: bool,
    ) -> None:
        self.child = child
        self.channel = channel
        self._qmp = qmp
        self._state_fd = state_fd
        self._ram_fd = ram_fd
        self._size_bytes = size_bytes
        self._use_scan = use_scan
        self._memory: GuestMemory | None = None
        self._is_closed = False

    @classmethod
    def start(
        cls,
        spawner: Spawner,
        shape: MachineShape,
        files: BootFiles,
        ram_fd: int,
        *,
        make_base: bool = False,
        use_scan: bool,
        timeout_s: float,
    ) -> Vmm:
        """Starts a VMM: dormant on the base `ram_fd`, or booting into it when `make_base`.

        The memory file stays the caller's and open as long as the VMM is used.

        Raises:
            BootError: It did not come up in time; its own last words are in the message.
        """
        qmp, their_qmp = socket.socketpair()
        channel, their_channel = socket.socketpair()
        state_fd = os.memfd_create("vmm-state", os.MFD_CLOEXEC)
        write_fd = os.open(f"/proc/self/fd/{state_fd}", os.O_WRONLY | os.O_CLOEXEC)
        boots = make_base and files.kernel is not None
        start = Start(
            binary=files.binary,
            ram=Path(f"/proc/self/fd/{FIRST_FD + 3}"),
            share=make_base,
            qmp_fd=FIRST_FD,
            guest_fd=FIRST_FD + 1,
            state_fd=FIRST_FD + 2,
            disk=files.disk,
            kernel=files.kernel if boots else None,
            initrd=files.initrd if boots else None,
            tsc_khz=measure_tsc_khz() if boots and shape.accel == "tcg" else None,
            firmware=files.firmware if make_base else None,
        )
        child: Child | None = None
        client = QmpClient(qmp)
        try:
            fds = [their_qmp.fileno(), their_channel.fileno(), write_fd, ram_fd]
            child = spawner.spawn(qemu_argv(shape, start), fds, _LIMITS)
            their_qmp.close()
            their_channel.close()
            client.negotiate(timeout_s)
        except (QmpError, BootError) as error:
            their_qmp.close()
            their_channel.close()
            client.close()
            channel.close()
            os.close(state_fd)
            if child is None:
                raise
            words = child.log()
            child.kill()
            child.close()
            raise BootError(f"the VMM did not start: {error}; it said: {words}", retryable=True) from error
        finally:
            os.close(write_fd)
        return cls(child, client, channel, state_fd, ram_fd, shape.memory_bytes, use_scan=use_scan)

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
            status = os.fstat(self._ram_fd)
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
            self._qmp.forget_events()
            self._qmp.execute("getfd", {"fdname": "state"}, fds=[read_fd], timeout_s=timeout_s)
            self._qmp.execute("migrate-incoming", {"uri": "fd:state"}, timeout_s=timeout_s)
            self._qmp.wait_event("RESUME", timeout_s)
        except (QmpError, CheckpointError, OSError) as error:
            raise ForkError(f"a VMM did not become its checkpoint: {error}{self._words()}") from error
        finally:
            os.close(read_fd)
            if write_fd >= 0:
                os.close(write_fd)

    def save(self, timeout_s: float, *, resume: bool) -> RawState:
        """Reads the machine's state; it stands still only meanwhile.

        Args:
            timeout_s: Deadline of each step.
            resume: Let the vCPU run afterwards.

        Raises:
            CheckpointError: The VMM is gone or does not give its state.
        """
        begun_s = time.perf_counter()
        try:
            self._qmp.execute("stop", timeout_s=timeout_s)
            device_state = self._save_devices(timeout_s)
            numbers = self.memory.private_pages()
            pages = self.memory.read(numbers)
            if resume:
                self._qmp.execute("cont", timeout_s=timeout_s)
        except (QmpError, OSError) as error:
            raise CheckpointError(f"a VMM did not give its state: {error}{self._words()}") from error
        return RawState(device_state, numbers, pages, time.perf_counter() - begun_s)

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
        """Ends the process and closes what it held, but not the channel. Idempotent; does not wait."""
        if self._is_closed:
            return
        self._is_closed = True
        self.child.kill()
        self.child.close()
        self._qmp.close()
        os.close(self._state_fd)

    def _command(self, name: str, timeout_s: float) -> None:
        try:
            self._qmp.execute(name, timeout_s=timeout_s)
        except QmpError as error:
            raise CheckpointError(f"{error}{self._words()}") from error

    def _save_devices(self, timeout_s: float) -> bytes:
        # The descriptor set shares its file position with us, and QEMU does not truncate.
        os.lseek(self._state_fd, 0, os.SEEK_SET)
        os.ftruncate(self._state_fd, 0)
        arguments = {"filename": f"/dev/fdset/{STATE_SET}", "live": False}
        self._qmp.execute("xen-save-devices-state", arguments, timeout_s=timeout_s)
        return os.pread(self._state_fd, _MAX_STATE_BYTES, 0)

    def _words(self) -> str:
        if self._is_closed:
            return ""
        words = self.child.log()
        return f" (it said: {words})" if words else ""
