"""The engines that the contract suite runs on. A new engine is one entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rollout.config import EngineConfig, ImageConfig
from rollout.sandbox.base import Engine
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.inline import InlineEngine


@dataclass(frozen=True)
class EngineUnderTest:
    """How an engine is made, given a fresh folder that the test removes; marks decide where it can run."""

    name: str
    make: Callable[[Path], Engine]
    marks: tuple[pytest.MarkDecorator, ...] = ()


def _inline(scratch_dir: Path) -> Engine:
    return InlineEngine(EngineConfig(kind="inline"))


def _process(scratch_dir: Path) -> Engine:
    from rollout.sandbox.process import ProcessEngine

    return ProcessEngine(EngineConfig(kind="process"), scratch_dir)


def _microvm(scratch_dir: Path) -> Engine:
    from rollout.sandbox.microvm.engine import MicroVMEngine

    return MicroVMEngine(EngineConfig(kind="microvm"), ImageConfig(), scratch_dir)


_no_process = what_is_missing("process", ImageConfig())
PROCESS_MARKS = (
    pytest.mark.process,
    pytest.mark.skipif(_no_process is not None, reason=_no_process or ""),
)
_no_microvm = what_is_missing("microvm", ImageConfig())
MICROVM_MARKS = (
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_no_microvm is not None, reason=_no_microvm or ""),
)

ENGINES = (
    EngineUnderTest("inline", _inline),
    EngineUnderTest("process", _process, PROCESS_MARKS),
    EngineUnderTest("microvm", _microvm, MICROVM_MARKS),
)
