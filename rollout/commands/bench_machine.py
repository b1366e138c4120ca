"""The machine that a benchmark ran on, as it is printed beside the figures."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata

from rollout.doctor.machine import cpu_model, memory_bytes
from rollout.doctor.virtualisation import QEMU, qemu_version

__all__ = ["describe_machine"]

_PACKAGES = ("rollout", "gymnasium", "numpy", "pyarrow", "ray")


def describe_machine() -> dict[str, str]:
    """Processor, cores, memory, kernel, QEMU, load before the benchmark, and versions, by name."""
    machine = {
        "CPU": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{(memory_bytes('MemTotal') or 0) / (1 << 30):.0f} GiB",
        "kernel": platform.release(),
        "Python": platform.python_version(),
    }
    qemu = shutil.which(QEMU)
    version = qemu_version(qemu) if qemu else None
    machine["QEMU"] = "none" if version is None else ".".join(str(part) for part in version)
    machine["load"] = f"{os.getloadavg()[0]:.1f}"  # figures of a busy machine are no figures of the code
    for package in _PACKAGES:
        machine[package] = metadata.version(package)
    return machine
