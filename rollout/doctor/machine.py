"""Probes of the machine's size, limits and software."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from importlib import metadata
from pathlib import Path

from rollout.doctor.finding import Finding, Status

__all__ = [
    "disk_space",
    "machine_findings",
    "memory",
    "open_files",
    "operating_system",
    "processes",
    "processors",
    "python_version",
    "ray_version",
    "shared_memory",
]

_GIB = 1 << 30


def machine_findings(runs_folder: Path, cache_folder: Path) -> list[Finding]:
    """All probes of this module; the folders are those that get runs and guest images."""
    return [
        operating_system(),
        processors(),
        memory(),
        disk_space(runs_folder, "disk for runs"),
        disk_space(cache_folder, "disk for images"),
        shared_memory(),
        open_files(),
        processes(),
        python_version(),
        ray_version(),
    ]


def operating_system() -> Finding:
    """Linux on x86-64 is what engines with a wall are written for."""
    system, arch, release = platform.system(), platform.machine(), platform.release()
    detail = f"{system} {release} on {arch}"
    if system != "Linux":
        return Finding("system", Status.MISSING, detail, "use Linux", ("process", "microvm"))
    if arch != "x86_64":
        return Finding("system", Status.MISSING, detail, "use an x86-64 machine", ("microvm",))
    return Finding("system", Status.OK, detail)


def processors() -> Finding:
    """Processors that this process may use."""
    count = len(os.sched_getaffinity(0))
    model = cpu_model()
    detail = f"{count} of {os.cpu_count()}, {model}"
    if count < 2:
        return Finding("processors", Status.WARN, detail, "2 or more keep the driver out of sandboxes' way")
    return Finding("processors", Status.OK, detail)


def cpu_model(proc: Path = Path("/proc")) -> str:
    """The processor's name."""
    try:
        lines = (proc / "cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or "unknown model"


def memory(proc: Path = Path("/proc")) -> Finding:
    """Memory that is free for sandboxes, at about 20 MB a microVM."""
    total, available = (memory_bytes(field, proc) for field in ("MemTotal", "MemAvailable"))
    if total is None or available is None:
        return Finding("memory", Status.WARN, "unknown: /proc/meminfo cannot be read")
    detail = f"{available / _GIB:.1f} GiB free of {total / _GIB:.1f}"
    if available < 2 * _GIB:
        return Finding(
            "memory", Status.WARN, detail, "at least 2 GiB free are needed for a base and its clones"
        )
    return Finding("memory", Status.OK, detail)


def memory_bytes(field: str, proc: Path = Path("/proc")) -> int | None:
    """One field of /proc/meminfo in bytes, or None."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, rest = line.partition(":")
        if key == field:
            return int(rest.split()[0]) * 1024
    return None


def disk_space(folder: Path, name: str, *, wanted_bytes: int = 4 * _GIB) -> Finding:
    """Free space where `folder` is, or would be made, and whether it may be written."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        free_bytes = shutil.disk_usage(existing).free
    except OSError as error:
        return Finding(name, Status.WARN, f"{folder}: {error.strerror}", "choose another folder")
    detail = f"{free_bytes / _GIB:.1f} GiB free at {folder}"
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding(name, Status.WARN, f"{existing} is not writable", "choose another folder")
    if free_bytes < wanted_bytes:
        return Finding(name, Status.WARN, detail, f"{wanted_bytes / _GIB:.0f} GiB are wanted")
    return Finding(name, Status.OK, detail)


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Ray's object store is there, and bases are where they fit."""
    if not folder.is_dir():
        return Finding(
            "/dev/shm", Status.WARN, "not mounted: Ray falls back to disk", f"mount -t tmpfs tmpfs {folder}"
        )
    return disk_space(folder, "/dev/shm", wanted_bytes=2 * _GIB)


def open_files() -> Finding:
    """A sandbox costs up to about ten descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{_limit(soft)} (may be raised to {_limit(hard)})"
    if hard != resource.RLIM_INFINITY and hard < 4096:
        return Finding(
            "open files", Status.WARN, detail, "ulimit -Hn 65536 as root, for hundreds of sandboxes"
        )
    return Finding("open files", Status.OK, detail)


def processes(proc: Path = Path("/proc")) -> Finding:
    """A sandbox costs one or a few processes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    ceilings = [soft] if soft != resource.RLIM_INFINITY else []
    for name in ("sys/kernel/pid_max", "sys/kernel/threads-max"):
        try:
            ceilings.append(int((proc / name).read_text()))
        except (OSError, ValueError):
            continue  # the other ceilings still tell
    if not ceilings:
        return Finding("processes", Status.OK, "unlimited")
    detail = f"at most {min(ceilings):,}"
    if min(ceilings) < 4096:
        return Finding("processes", Status.WARN, detail, "ulimit -u 16384, for hundreds of sandboxes")
    return Finding("processes", Status.OK, detail)


def python_version() -> Finding:
    """The Python that this runs on."""
    detail = f"{platform.python_version()} at {sys.executable}"
    return Finding("Python", Status.OK, detail)


def ray_version() -> Finding:
    """The fleet needs Ray; a single episode does not."""
    try:
        return Finding("Ray", Status.OK, metadata.version("ray"))
    except metadata.PackageNotFoundError:
        return Finding(
            "Ray", Status.WARN, "not installed: `rollout run` needs it", "pip install 'ray[default]'"
        )


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"
