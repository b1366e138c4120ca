"""A guest without an operating system: real-mode code that answers on the serial port.

It runs wherever a virtual CPU does, also under hypervisors that boot no stock Linux, so saving and cloning
under KVM can be tried and measured there. Each byte that it gets is a command:

| byte | what it does | answer |
|---|---|---|
| `i` | adds one to its counter, at 64 KiB | the counter |
| `r` | | the counter |
| `w`, n | writes n to the first byte of the n-th page from 128 KiB on | `w` |
| other | | the same byte |

At reset it copies itself to RAM: firmware is not loaded into a clone.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from rollout.sandbox.microvm.half_started import HalfStarted
from rollout.sandbox.microvm.machine import BootFiles, MachineShape
from rollout.sandbox.microvm.memory import has_pagemap_scan, map_pages
from rollout.sandbox.microvm.memory_file import new_memory_file
from rollout.sandbox.microvm.probe import filters_itself, qemu_binary
from rollout.sandbox.microvm.prototype import Family
from rollout.sandbox.microvm.ready import Ready, become
from rollout.sandbox.microvm.snapshot import RawCache, Snapshot
from rollout.sandbox.microvm.spawner import Spawner
from rollout.sandbox.microvm.starting import start_halfway, start_vmm
from rollout.sandbox.microvm.vmm import Vmm

__all__ = ["COUNTER_PAGE", "FIRST_WRITTEN_PAGE", "MEMORY_MIB", "TinyGuests", "ask", "tiny_firmware"]

MEMORY_MIB: Final = 64
COUNTER_PAGE: Final = 0x10000 // 4096
FIRST_WRITTEN_PAGE: Final = 0x20000 // 4096
_FIRMWARE_BYTES: Final = 64 << 10
_RESET_VECTOR: Final = 0xFFF0
_RUNS_AT: Final = 0x7C00

# Offsets of the routines in the code; `_code` checks them.
_GETC, _PUTC, _MAIN = 0x40, 0x50, 0x80


_TIMEOUT_S: Final = 20.0
_SETTLE_S: Final = 0.2
_CPU: Final = "qemu64"
"""Nested hypervisors that boot no Linux often refuse registers of the newer models, too."""


class TinyGuests:
    """The tiny guest as a base, and what is made of it; blocking, for one thread. A context manager.

    Args:
        accel: "kvm" or "tcg".

    Attributes:
        base: The guest before its first command.
        cache: Pages at hand.

    Raises:
        BootError: QEMU or bubblewrap is missing, or the accelerator does not run the guest.
    """

    def __init__(self, accel: str) -> None:
        self.cache = RawCache(64 << 20)
        self._folder = tempfile.TemporaryDirectory(prefix="rollout-tiny-")
        self._shape = MachineShape(accel, MEMORY_MIB, _CPU)
        self._ram_fd = new_memory_file(self._shape.memory_bytes)
        folder, binary = Path(self._folder.name), qemu_binary(accel)
        folder.chmod(0o755)
        (folder / "tiny").write_bytes(tiny_firmware())
        devices = [Path("/dev/kvm")] if accel == "kvm" else []
        self._spawner = Spawner({"/firmware": folder}, devices, programs=[binary])
        self._files = BootFiles(
            binary, firmware=Path("/firmware/tiny"), filters_itself=filters_itself(binary)
        )
        self._origin: tuple[HalfStarted, Family] | None = None
        try:
            self.base = Snapshot.at_base(self._boot())
            if accel == "kvm":
                self._origin = start_halfway(
                    *(self._spawner, self._shape, self._files, self._ram_fd),
                    use_scan=has_pagemap_scan(),
                    timeout_s=_TIMEOUT_S,
                )
        except BaseException:
            self.close()
            raise
        self.pages = map_pages(self._ram_fd, self._shape.memory_bytes)

    def start(self) -> Vmm:
        """A dormant VMM: under KVM, as an engine starts them, a fork of one that has begun to start."""
        return self.start_program() if self._origin is None else self._origin[0].fork(self._ram_fd)

    def start_program(self) -> Vmm:
        """A dormant VMM that is started from its program's beginning."""
        return self._start(make_base=False)

    def become(self, vmm: Vmm, snapshot: Snapshot, *, content: Snapshot | None = None) -> None:
        """Makes a dormant or stopped VMM into a snapshot, and lets it run."""
        become(Ready(vmm, content), snapshot, self.cache, self.pages, _TIMEOUT_S)

    def save(self, vmm: Vmm, origin: Snapshot | None = None) -> Snapshot:
        """Stops a VMM and saves it."""
        return Snapshot.of(vmm.save(_TIMEOUT_S, resume=False), origin, self.cache, self.pages)

    def close(self) -> None:
        """Ends all VMMs."""
        if self._origin is not None:
            half_started, family = self._origin
            half_started.close()
            family.end()
        self._spawner.close()
        os.close(self._ram_fd)
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _boot(self) -> bytes:
        vmm = self._start(make_base=True)
        try:
            time.sleep(_SETTLE_S)  # what comes before the guest listens may be lost
            ask(vmm.channel, b"?")
            return vmm.save_base(_TIMEOUT_S)
        finally:
            vmm.kill()

    def _start(self, *, make_base: bool) -> Vmm:
        return start_vmm(
            *(self._spawner, self._shape, self._files, self._ram_fd),
            make_base=make_base,
            from_template=not make_base,
            use_scan=has_pagemap_scan(),
            timeout_s=_TIMEOUT_S,
        )


def tiny_firmware() -> bytes:
    """64 KiB of firmware, to be mapped so that they end at the reset vector's segment."""
    image = bytearray(_FIRMWARE_BYTES)
    code = _code()
    image[: len(code)] = code
    image[_RESET_VECTOR : _RESET_VECTOR + 5] = bytes.fromhex("ea 00 00 00 f0")  # jmp 0xf000:0
    return bytes(image)


def ask(channel: socket.socket, request: bytes, timeout_s: float = 10.0) -> int:
    """Sends a command and returns the byte that comes back.

    Raises:
        TimeoutError: None did.
    """
    channel.settimeout(timeout_s)
    channel.sendall(request)
    return channel.recv(1)[0]


def _code() -> bytes:
    start = bytes.fromhex(
        "fa 31c0 8ec0 8cc8 8ed8"  # cli; es = 0; ds = cs
        "31f6 bf007c b90001 fc f3a5"  # 512 bytes from ds:0 to 0x7c00
    )
    start += b"\xea" + (_RUNS_AT + _MAIN).to_bytes(2, "little") + b"\0\0"  # jmp 0:main
    getc = bytes.fromhex("bafd03 ec a801 74fb baf803 ec c3")  # wait for a byte; al = it
    putc = bytes.fromhex("88c1 bafd03 ec a820 74fb baf803 88c8 ee c3")  # wait for room; send al
    parts = [(0, start), (_GETC, getc), (_PUTC, putc), (_MAIN, _main())]
    code = bytearray(512)
    for place, part in parts:
        assert not any(code[place : place + len(part)]), "routines overlap"
        code[place : place + len(part)] = part
    return bytes(code)


def _main() -> bytes:
    code = bytearray.fromhex("31c0 8ed0 bc007c")  # a stack below the code
    loop = len(code)

    def call(routine: int) -> None:
        distance = routine - (_MAIN + len(code) + 3)
        code.extend(b"\xe8" + distance.to_bytes(2, "little", signed=True))

    def again() -> None:
        distance = loop - (len(code) + 2)
        code.extend(b"\xeb" + distance.to_bytes(1, "little", signed=True))

    def on(command: bytes, body: bytes, *, argument: bool = False) -> None:
        code.extend(b"\x3c" + command + b"\x75\0")  # cmp al, command; jne next
        jump = len(code)
        if argument:
            call(_GETC)
        code.extend(body)
        call(_PUTC)
        again()
        code[jump - 1] = len(code) - jump

    call(_GETC)
    counter = bytes.fromhex("b80010 8ed8")  # ds = 0x1000
    on(b"i", counter + bytes.fromhex("fe060000 a00000"))  # inc byte [0]; al = it
    on(b"r", counter + bytes.fromhex("a00000"))
    # bl = al; ds = 0x2000 + al * 0x100; byte [0] = bl; al = 'w'
    on(b"w", bytes.fromhex("88c3 88c4 80c420 b000 8ed8 881e0000 b077"), argument=True)
    call(_PUTC)
    again()
    return bytes(code)
