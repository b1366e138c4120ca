"""Which engine is taken, and what is said where one is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import BootError
from rollout.sandbox.engines import choose_engine_kind, make_engine, what_is_missing
from rollout.sandbox.inline import InlineEngine

IMAGE = ImageConfig()


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no programs but what a test puts here, and without guest images."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("ROLLOUT_CACHE", str(tmp_path / "cache"))
    return folder


def put(folder: Path, name: str, script: str = "exit 0") -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_auto_without_programs_says_all_that_is_missing(programs: Path) -> None:
    with pytest.raises(BootError, match=r"qemu-system-x86.*bubblewrap.*'inline'"):
        choose_engine_kind(EngineConfig(), IMAGE)


def test_auto_takes_processes_and_says_how_to_get_microvms(programs: Path) -> None:
    put(programs, "bwrap")
    choice = choose_engine_kind(EngineConfig(), IMAGE)
    assert choice.kind == "process"
    assert choice.hint == "for microVMs: QEMU is not installed; run: apt-get install qemu-system-x86"
    put(programs, "qemu-system-x86_64")
    choice = choose_engine_kind(EngineConfig(), IMAGE)
    assert choice.kind == "process"
    assert choice.hint is not None
    assert "rollout image build" in choice.hint


def test_namespaces_that_are_not_allowed_are_named(programs: Path) -> None:
    put(programs, "bwrap", "echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
    missing = what_is_missing("process", IMAGE)
    assert missing is not None
    assert "No permissions to create new namespace" in missing
    assert "sysctl" in missing


def test_inline_is_taken_only_by_name(programs: Path, tmp_path: Path) -> None:
    put(programs, "bwrap", "exit 1")
    with pytest.raises(BootError):
        choose_engine_kind(EngineConfig(kind="auto"), IMAGE)
    assert choose_engine_kind(EngineConfig(kind="inline"), IMAGE).hint is None
    assert isinstance(make_engine(EngineConfig(kind="inline"), IMAGE, tmp_path), InlineEngine)


@pytest.mark.process
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_the_probe_passes_where_the_engine_runs() -> None:
    assert what_is_missing("process", IMAGE) is None
