"""What tests of VMMs look at: descriptors of this process, memory of another, and where VMMs come from."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from rollout.errors import BootError
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.source import VmmSource


def source_for(engine: MicroVMEngine, place: int = 0) -> VmmSource:
    return list(engine.stocks._stocks.values())[place].source


def own_descriptors() -> set[int]:
    """Numbers of what this process has open."""
    found: set[int] = set()
    for number in range(1024):
        with contextlib.suppress(OSError):
            os.fstat(number)
            found.add(number)
    return found


def check_without_descriptors(fork: Callable[[], object], num_needed: int) -> None:
    """Whatever number of descriptors is left, too few are an error that leaves none open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = own_descriptors()
    free = [number for number in range(1024) if number not in before]
    try:
        for num_free in range(num_needed):
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[num_free], limits[1]))
            with pytest.raises(BootError, match="Too many open files"):
                fork()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert own_descriptors() == before


def private_kib(pid: int) -> int:
    """Memory that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))
