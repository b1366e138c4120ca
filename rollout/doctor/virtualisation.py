"""Probes of what microVMs need: QEMU's binaries and the KVM device.

That the device answers does not say that it boots Linux: a hypervisor below may run only guests that know
its paravirtual interface. Only a boot tells, which is the microVM engine's own prober's business; see
`rollout.commands.doctor`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path

from rollout.doctor.finding import Finding, Status

__all__ = ["kvm_device", "qemu", "qemu_for_kvm", "virtualisation_findings"]

QEMU = "qemu-system-x86_64"
QEMU_FOR_KVM = "qemu-system-x86_64-microvm"
MINIMUM_QEMU = (7, 2)

_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
_KVM_API_VERSION = 12
_PROBE_TIMEOUT_S = 10.0


def virtualisation_findings() -> list[Finding]:
    """All probes of this module."""
    return [qemu(), qemu_for_kvm(), kvm_device()]


def qemu(binary: str = QEMU) -> Finding:
    """The build that can translate (TCG), its version, and its microvm machine."""
    name = "QEMU"
    path = shutil.which(binary)
    if path is None:
        return Finding(name, Status.MISSING, f"no {binary}", "apt-get install qemu-system-x86", ("microvm",))
    version = qemu_version(path)
    if version is None:
        return Finding(
            name,
            Status.MISSING,
            f"{path} does not tell its version",
            "reinstall qemu-system-x86",
            ("microvm",),
        )
    detail = f"{'.'.join(str(part) for part in version)} at {path}"
    if version < MINIMUM_QEMU:
        wanted = ".".join(str(part) for part in MINIMUM_QEMU)
        return Finding(name, Status.MISSING, detail, f"version {wanted} or later is needed", ("microvm",))
    machines = _output([path, "-machine", "help"])
    if not re.search(r"^microvm\s", machines, re.MULTILINE):
        return Finding(
            name, Status.MISSING, f"{detail}, without the microvm machine", "use a full build", ("microvm",)
        )
    return Finding(name, Status.OK, f"{detail}, with the microvm machine")


def qemu_for_kvm(binary: str = QEMU_FOR_KVM) -> Finding:
    """The small KVM-only build, which takes less memory a clone."""
    name = "QEMU, KVM-only build"
    path = shutil.which(binary)
    if path is None:
        return Finding(
            name,
            Status.WARN,
            f"no {binary}: KVM clones take about 15 MB more each",
            "apt-get install qemu-system-x86",
        )
    version = qemu_version(path)
    if version is None:
        return Finding(name, Status.WARN, f"{path} does not tell its version", "reinstall qemu-system-x86")
    return Finding(name, Status.OK, f"{'.'.join(str(part) for part in version)} at {path}")


def kvm_device(device: Path = Path("/dev/kvm")) -> Finding:
    """Opens the device, asks for its version and makes an empty VM."""
    name = "KVM device"
    slower = "microVMs then run under TCG, translated: safe, and several times slower"
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return Finding(
                name,
                Status.WARN,
                f"no {device}: {slower}",
                "turn virtualisation on in the firmware or the VM's host",
            )
        return Finding(
            name, Status.WARN, f"{device}: {error.strerror}; {slower}", "add the user to the group kvm"
        )
    try:
        version = fcntl.ioctl(descriptor, _KVM_GET_API_VERSION, 0)
        if version != _KVM_API_VERSION:
            return Finding(
                name, Status.WARN, f"interface version {version} is not {_KVM_API_VERSION}; {slower}"
            )
        os.close(fcntl.ioctl(descriptor, _KVM_CREATE_VM, 0))
    except OSError as error:
        return Finding(name, Status.WARN, f"{device} makes no VM: {error.strerror}; {slower}")
    finally:
        os.close(descriptor)
    return Finding(name, Status.OK, f"{device} answers and makes VMs")


def qemu_version(path: str) -> tuple[int, ...] | None:
    """Major, minor and patch of a QEMU binary, or None when it does not tell."""
    found = re.search(r"version (\d+)\.(\d+)\.(\d+)", _output([path, "--version"]))
    return tuple(int(part) for part in found.groups()) if found else None


def _output(argv: list[str]) -> str:
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")
