"""What a VMM is started with. Pure: shapes in, argument vectors and fingerprints out.

Invariants:

- The VM that makes a base and every clone of it have the same machine, devices and CPU model; they differ
  only in how guest memory is mapped (shared for the one, private for the others), and clones get no kernel:
  they need none after boot, and without one a VMM starts in half the time.
- Two machines with equal fingerprints can restore each other's checkpoints; any difference in what decides
  the layout of device state (the VMM's build, machine options, CPU model, memory size) changes the
  fingerprint.

Guest memory is `memory-backend-file`; the flags that make a device-only save loadable by `migrate-incoming`
are `suppress-vmdesc=on` and `migration.send-configuration=off` (QEMU, `migration/savevm.c`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["GUEST_PAGE_BYTES", "KERNEL_COMMAND_LINE", "BootFiles", "MachineShape", "Start", "qemu_argv"]

GUEST_PAGE_BYTES = 4096

_MACHINE = "microvm,suppress-vmdesc=on,acpi=on,rtc=on,pcie=off,memory-backend=ram"
KERNEL_COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable random.trust_cpu=on mitigations=off "
    "transparent_hugepage=never"
)
"""Of every guest. No huge pages: making one copies megabytes, now and then, in each clone for itself."""
# obsolete, elevateprivileges, spawn and resourcecontrol are QEMU's seccomp groups; a VMM needs none of them.
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn={},resourcecontrol=deny"


@dataclass(frozen=True, slots=True)
class MachineShape:
    """The machine that a guest sees.

    Attributes:
        accel: "tcg" or "kvm".
        memory_mib: Guest memory.
        cpu_model: QEMU's name of the CPU.
        translation_mib: Size of TCG's buffer of translated code; what is not used of it costs nothing.
    """

    accel: str
    memory_mib: int
    cpu_model: str = "max"
    translation_mib: int = 32

    @property
    def memory_bytes(self) -> int:
        """Guest memory in bytes."""
        return self.memory_mib << 20

    def fingerprint(self, qemu_version: str) -> str:
        """Equal for machines that can load each other's device state."""
        parts = {"qemu": qemu_version, "machine": _MACHINE, **asdict(self)}
        del parts["translation_mib"]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class BootFiles:
    """What a machine is made from.

    Attributes:
        binary: The QEMU program.
        disk: Read-only disk; None for a guest without an operating system.
        kernel: Kernel, for a boot.
        initrd: Its initial file system.
        firmware: Raw firmware instead of a kernel.
        filters_itself: See `Start`.
    """

    binary: str
    disk: Path | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    firmware: Path | None = None
    filters_itself: bool = True


@dataclass(frozen=True, slots=True)
class Start:
    """Where the pieces of one VMM are; descriptors are numbers in the VMM's own process.

    Attributes:
        binary: The QEMU program.
        ram: File of guest memory: the base, or the one being made. QEMU wants to open it for writing even to
            map it privately, so a base is a sealed memory file, which nobody can write to.
        share: Guest writes go to the file (only for the VM that makes it).
        qmp_fd: Socket of the monitor.
        guest_fd: Socket of the guest's channel.
        state_fd: Write-only file that device state is saved to.
        disk: Read-only disk, or None for a guest without one.
        kernel: Kernel to boot; None waits for a checkpoint instead.
        initrd: Initial file system of the kernel.
        tsc_khz: Rate of the time-stamp counter, told to the kernel; None lets it find out.
        firmware: Raw firmware to run instead of a kernel: guests without an operating system.
        rewind_fds: Disk of the states that it is put back to, and socket of the qtest protocol; None for the
            VM that makes a base.
        filters_itself: The program has QEMU's own filter of system calls. Debian's small KVM build has none,
            and is left to the filter that it is started under.
        has_forks: It is to be forked (see `rollout.sandbox.microvm.family`), and may make processes.
        hold_fd: Pipe that it reads before it makes its machine (see `rollout.sandbox.microvm.half_started`);
            None where nothing holds it.
    """

    binary: str
    ram: Path
    share: bool
    qmp_fd: int
    guest_fd: int
    state_fd: int
    disk: Path | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    tsc_khz: int | None = None
    firmware: Path | None = None
    rewind_fds: tuple[int, int] | None = None
    filters_itself: bool = True
    has_forks: bool = False
    hold_fd: int | None = None


def qemu_argv(shape: MachineShape, start: Start) -> list[str]:
    """The arguments of a VMM that boots (with a kernel) or waits to become a checkpoint (without)."""
    accel = f"tcg,tb-size={shape.translation_mib}" if shape.accel == "tcg" else shape.accel
    share = "on" if start.share else "off"
    spawn = "allow" if start.has_forks else "deny"
    argv = [
        *(start.binary, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-M", _MACHINE, "-global", "migration.send-configuration=off"),
        *("-accel", accel, "-cpu", shape.cpu_model, "-smp", "1", "-m", f"{shape.memory_mib}M"),
        "-object",
        f"memory-backend-file,id=ram,size={shape.memory_mib}M,mem-path={start.ram},share={share}",
        *("-chardev", f"socket,id=qmp,fd={start.qmp_fd}", "-mon", "chardev=qmp,mode=control"),
        *("-add-fd", f"fd={start.state_fd},set=1"),
        *(("-sandbox", _SANDBOX.format(spawn)) if start.filters_itself else ()),
    ]
    if start.hold_fd is not None:
        argv += ["-object", f"secret,id=hold,format=base64,file=/proc/self/fd/{start.hold_fd}"]
    argv += _devices(start)
    if start.rewind_fds is not None:
        argv += _rewinding(*start.rewind_fds)
    if start.firmware is not None:
        argv += ["-bios", str(start.firmware)]
    if start.kernel is None:
        return [*argv, "-incoming", "defer"] if not start.share else argv
    rate = f" tsc_early_khz={start.tsc_khz}" if start.tsc_khz is not None else ""
    argv += ["-kernel", str(start.kernel), "-append", KERNEL_COMMAND_LINE + rate]
    return [*argv, "-initrd", str(start.initrd)] if start.initrd else argv


def _devices(start: Start) -> list[str]:
    """Device order is part of the machine: it decides the slots, and with them the layout of device state."""
    if start.disk is None:
        return ["-chardev", f"socket,id=guest,fd={start.guest_fd}", "-serial", "chardev:guest"]
    # While it boots, the guest's console goes where the VMM's own messages go: the reason of a failed boot.
    boots = start.kernel is not None
    console = "file,id=console,path=/proc/self/fd/2,append=on" if boots else "null,id=console"
    return [
        *("-chardev", console, "-serial", "chardev:console"),
        *("-drive", f"if=none,id=disk,file={start.disk},format=raw,readonly=on"),
        *("-device", "virtio-blk-device,drive=disk"),
        *("-chardev", f"socket,id=guest,fd={start.guest_fd}"),
        *("-device", "virtio-serial-device,max_ports=2"),
        *("-device", "virtserialport,chardev=guest,name=rollout"),
    ]


def _rewinding(disk_fd: int, memset_fd: int) -> list[str]:
    """What `Rewinder` needs: no device among them, so the guest sees nothing of it."""
    file = f"file.driver=file,file.locking=off,file.filename=/dev/fdset/{_DISK_SET}"
    disk = f"driver=qcow2,node-name=states,{file}"
    return [
        *("-add-fd", f"fd={disk_fd},set={_DISK_SET}", "-blockdev", disk),
        *("-chardev", f"socket,id=qtest,fd={memset_fd}"),
        *("-qtest", "chardev:qtest", "-qtest-log", "/dev/null"),
    ]


_DISK_SET = 2
STATE_SET = 1
"""QEMU's descriptor set of the file that device state is saved to: `/dev/fdset/1`."""
