"""Which accelerator and which QEMU binary a machine can use: found out by booting.

`/dev/kvm` can be there and still boot no Linux (nested hypervisors that only take guests which know their
interface), so the probe boots the image's kernel under KVM until its first program asks for the machine's
end. The answer is kept in the cache until the kernel, the QEMU build or the image changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from rollout.errors import BootError
from rollout.sandbox.image.store import Image, cache_dir

__all__ = ["AccelProbe", "choose_accel", "filters_itself", "probe_kvm", "qemu_binary"]

_KVM_DEVICE = Path("/dev/kvm")
_BOOT_DEADLINE_S = 12.0
_FULL_BINARY = "qemu-system-x86_64"
_SMALL_KVM_BINARY = "qemu-system-x86_64-microvm"
"""Debian's KVM-only build of the microvm machine: half the resident memory of the full one."""
_SIGN_OF_LIFE = "Run /init as init process"
_PANIC_OFF = "Kernel panic"


@dataclass(frozen=True, slots=True)
class AccelProbe:
    """What a probe of KVM found.

    Attributes:
        works: It booted Linux.
        reason: One line.
    """

    works: bool
    reason: str


def qemu_binary(accel: str) -> str:
    """Path of the QEMU program for an accelerator.

    Raises:
        BootError: QEMU is not installed.
    """
    names = (_SMALL_KVM_BINARY, _FULL_BINARY) if accel == "kvm" else (_FULL_BINARY,)
    for name in names:
        if (path := shutil.which(name)) is not None:
            return path
    raise BootError(f"{_FULL_BINARY} is not installed; install it with: apt-get install qemu-system-x86")


def filters_itself(binary: str) -> bool:
    """Whether a QEMU program can filter its own system calls (`-sandbox`)."""
    argv = [binary, "-sandbox", "on", "-machine", "help"]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def choose_accel(wanted: str, image: Image) -> str:
    """The accelerator to use: "kvm" or "tcg".

    Args:
        wanted: "kvm", "tcg", or "auto", which takes KVM where it boots Linux.
        image: Whose kernel is booted for the probe.

    Raises:
        BootError: KVM was asked for by name and does not boot Linux here, or QEMU is missing.
    """
    if wanted == "tcg":
        return wanted
    probe = probe_kvm(image)
    if probe.works:
        return "kvm"
    if wanted == "kvm":
        raise BootError(f"engine.accel is 'kvm', but {probe.reason}; set it to 'tcg' or 'auto'")
    return "tcg"


def probe_kvm(image: Image) -> AccelProbe:
    """Boots the image's kernel under KVM, or recalls what came of it."""
    if platform.machine() != "x86_64":
        return AccelProbe(False, f"this build knows x86_64 machines only, not {platform.machine()}")
    if not _KVM_DEVICE.exists():
        return AccelProbe(False, "there is no /dev/kvm (enable virtualisation, or load the kvm module)")
    if not os.access(_KVM_DEVICE, os.R_OK | os.W_OK):
        return AccelProbe(False, "/dev/kvm may not be opened by this user (add it to the group kvm)")
    binary = qemu_binary("kvm")
    record = _record_path(binary, image)
    try:
        return AccelProbe(**json.loads(record.read_text()))
    except (OSError, ValueError, TypeError):
        pass  # never probed, or an unreadable record: probe now
    probe = _boot_under_kvm(binary, image)
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(asdict(probe)))
    except OSError as error:
        return AccelProbe(probe.works, f"{probe.reason} (and the cache is not writable: {error.strerror})")
    return probe


def _boot_under_kvm(binary: str, image: Image) -> AccelProbe:
    argv = [
        *(binary, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-M", "microvm,acpi=on,rtc=on,pcie=off", "-accel", "kvm", "-cpu", "max", "-smp", "1", "-m", "256M"),
        *("-kernel", str(image.file("vmlinuz")), "-initrd", str(image.file("initrd"))),
        *("-append", "console=ttyS0 panic=-1 reboot=t"),
        *("-chardev", "stdio,id=console", "-serial", "chardev:console"),
    ]
    try:
        # Without its disk the guest waits after its first program: the deadline ends a good boot too.
        done = subprocess.run(
            argv, capture_output=True, timeout=_BOOT_DEADLINE_S, stdin=subprocess.DEVNULL, check=False
        )
        output, ended = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        output, ended = late.stdout or b"", b""
    console = output.decode(errors="replace")
    if _SIGN_OF_LIFE in console and _PANIC_OFF not in console:
        return AccelProbe(True, "KVM boots Linux")
    words = ended.decode(errors="replace").strip() or console.strip() or "nothing"
    last = words.splitlines()[-1]
    return AccelProbe(
        False, f"KVM does not boot Linux within {_BOOT_DEADLINE_S:.0f} s here (it said: {last[:120]})"
    )


def _record_path(binary: str, image: Image) -> Path:
    status = Path(binary).stat()
    parts = (platform.release(), binary, status.st_size, status.st_mtime_ns, image.digest)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return cache_dir() / "probes" / f"kvm-{key}.json"
