"""What a microVM checkpoint stands beside: the same guest saved and restored by QEMU's own migration."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout.errors import BootError
from rollout.sandbox.image.store import Image, ImageStore
from rollout.sandbox.microvm.probe import choose_accel, qemu_binary
from rollout.sandbox.microvm.qmp import QmpClient, QmpError
from rollout.sandbox.microvm.tsc import measure_tsc_khz
from rollout.sandbox.payload import payload_contents
from rollout.sandbox.wire import FrameDecoder, frame

__all__ = ["StockFigures", "measure_stock"]

_DEADLINE_S = 120.0
_MEMORY = "768M"


@dataclass(frozen=True, slots=True)
class StockFigures:
    """One save and one restore of all memory.

    Attributes:
        save_ms: From `stop` to the completed migration.
        restore_ms: From the start of another QEMU until its guest runs.
        file_mib: What was written.
    """

    save_ms: float
    restore_ms: float
    file_mib: float


def measure_stock(image_name: str) -> StockFigures:
    """Boots the image in a plain QEMU, with none of our settings, saves it and restores it.

    Raises:
        BootError: The image or QEMU is missing, or something did not come up in time.
    """
    image = ImageStore().find_current(image_name, payload_contents())
    binary = qemu_binary(accel := choose_accel("auto", image))
    with tempfile.TemporaryDirectory(prefix="rollout-stock-", dir="/dev/shm") as name:
        folder = Path(name)
        try:
            with _Qemu(binary, accel, image, folder / "a", _kernel(image)) as source:
                source.wait_for_agent()
                start_s = time.perf_counter()
                source.qmp.execute("stop", timeout_s=_DEADLINE_S)
                source.migrate(folder / "state")
                save_ms = (time.perf_counter() - start_s) * 1000
            start_s = time.perf_counter()
            incoming = [*_kernel(image), "-incoming", f"exec:cat {folder / 'state'}"]
            with _Qemu(binary, accel, image, folder / "b", incoming) as target:
                target.wait_until_running()
                restore_ms = (time.perf_counter() - start_s) * 1000
        except (QmpError, TimeoutError) as error:
            raise BootError(f"stock QEMU: {error}") from error
        return StockFigures(save_ms, restore_ms, (folder / "state").stat().st_size / (1 << 20))


def _kernel(image: Image) -> list[str]:
    line = f"console=ttyS0 quiet panic=-1 tsc=reliable tsc_early_khz={measure_tsc_khz()}"
    return [
        *("-kernel", str(image.file("vmlinuz")), "-initrd", str(image.file("initrd"))),
        *("-append", line),
    ]


class _Qemu:
    """A QEMU with a monitor and a guest channel; ended at the end of its context."""

    def __init__(self, binary: str, accel: str, image: Image, folder: Path, more: Sequence[str]) -> None:
        folder.mkdir()
        qmp, their_qmp = socket.socketpair()
        self._channel, their_channel = socket.socketpair()
        argv = [
            *(binary, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-M", "microvm,acpi=on,rtc=on,pcie=off", "-accel", accel, "-cpu", "max", "-m", _MEMORY),
            *("-chardev", f"socket,id=qmp,fd={their_qmp.fileno()}", "-mon", "chardev=qmp,mode=control"),
            *("-chardev", "null,id=console", "-serial", "chardev:console"),
            *("-drive", f"if=none,id=disk,file={image.file('rootfs.erofs')},format=raw,readonly=on"),
            *("-device", "virtio-blk-device,drive=disk", "-device", "virtio-serial-device,max_ports=2"),
            *("-chardev", f"socket,id=guest,fd={their_channel.fileno()}"),
            *("-device", "virtserialport,chardev=guest,name=rollout"),
            *more,
        ]
        self._process = subprocess.Popen(
            argv, pass_fds=(their_qmp.fileno(), their_channel.fileno()), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        their_qmp.close()
        their_channel.close()
        self.qmp = QmpClient(qmp)

    def __enter__(self) -> _Qemu:
        try:
            self.qmp.negotiate(_DEADLINE_S)
        except QmpError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self.qmp.close()
        self._channel.close()

    def wait_for_agent(self) -> None:
        """Waits for the answer to a call, which says that the guest has booted and imported everything."""
        self._channel.settimeout(_DEADLINE_S)
        self._channel.sendall(frame({"id": 1, "op": "ping", "args": {}}))
        decoder = FrameDecoder()
        while decoder.pop() is None:
            if not (data := self._channel.recv(1 << 16)):
                raise TimeoutError("the guest is gone")
            decoder.push(data)

    def migrate(self, file: Path) -> None:
        """Saves everything to a file."""
        self.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40}, timeout_s=_DEADLINE_S)
        self.qmp.execute("migrate", {"uri": f"exec:cat > {file}"}, timeout_s=_DEADLINE_S)
        give_up_at_s = time.monotonic() + _DEADLINE_S
        while (status := self.qmp.execute("query-migrate", timeout_s=_DEADLINE_S)["status"]) != "completed":
            if status in ("failed", "cancelled") or time.monotonic() > give_up_at_s:
                raise TimeoutError(f"migration {status}")
            time.sleep(0.001)

    def wait_until_running(self) -> None:
        """Waits until an incoming guest runs; it was saved stopped, so it is told to go on."""
        give_up_at_s = time.monotonic() + _DEADLINE_S
        while self.qmp.execute("query-status", timeout_s=_DEADLINE_S)["status"] == "inmigrate":
            if time.monotonic() > give_up_at_s:
                raise TimeoutError("the restore was not done in time")
            time.sleep(0.001)
        self.qmp.execute("cont", timeout_s=_DEADLINE_S)
