"""What must be the same on two machines for one to restore the other's checkpoints, and what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from rollout.errors import CheckpointError
from rollout.sandbox.microvm.machine import MachineShape

__all__ = ["machine_of", "require_same"]

_NAMES = {
    "qemu": "the QEMU build",
    "accel": "the accelerator",
    "cpu": "the CPU model",
    "memory_mib": "the guest memory (engine.memory_mib)",
    "fingerprint": "the machine's options",
}


def machine_of(shape: MachineShape, qemu_version: str) -> dict[str, str]:
    """A machine by its parts: under KVM the guest's processor is the host's own."""
    cpu = shape.cpu_model if shape.accel == "tcg" else f"{shape.cpu_model} of {_processor()}"
    return {
        "qemu": qemu_version,
        "accel": shape.accel,
        "cpu": cpu,
        "memory_mib": str(shape.memory_mib),
        "fingerprint": shape.fingerprint(qemu_version),
    }


def require_same(wanted: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Refuses a checkpoint of another machine.

    Raises:
        CheckpointError: They differ; the message says in what.
    """
    for part, name in _NAMES.items():
        if wanted.get(part) != here[part]:
            raise CheckpointError(
                f"this checkpoint is of another machine: {name} is {here[part]!r} here, "
                f"and was {str(wanted.get(part))[:120]!r} there"
            )


def _processor() -> str:
    """Model and features of the host's processor, short."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    features = hashlib.sha256(" ".join(sorted(fields.get("flags", "").split())).encode()).hexdigest()[:12]
    return f"{fields.get('model name', 'an unknown processor')} ({features})"
