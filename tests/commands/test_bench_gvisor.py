"""gVisor as a rival: measured with the real runsc where that is installed, and a plain reason elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rollout.commands.bench_gvisor import GvisorFigures, GvisorRival, measure_gvisor
from rollout.errors import BootError

DEADLINE_S = 120.0
GONE_S = 15.0
"""Less than the samples take that were asked for: a sandbox that lives on is not taken for one that ended."""
FIGURES = {"checkpoint_ms": [3, 1], "restore_ms": [4], "private_mib": [80.5], "file_mib": 5, "version": "1"}

pytestmark = pytest.mark.xdist_group("gvisor")  # each counts the processes of gVisor on this machine
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gVisor is measured by root only")
needs_gvisor = pytest.mark.skipif(
    shutil.which("runsc") is None, reason="gVisor is not installed: apt-get install runsc"
)


def processes_of_gvisor() -> list[psutil.Process]:
    return [
        each for each in psutil.process_iter(["cmdline"]) if "rollout-gvisor" in str(each.info["cmdline"])
    ]


def folders_of_gvisor() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("rollout-gvisor-*"))


def test_figures_are_read() -> None:
    figures = GvisorFigures.parse(json.dumps(FIGURES))
    assert figures == GvisorFigures((3.0, 1.0), (4.0,), (80.5,), 5.0, "1")
    assert "numpy and gymnasium imported" in figures.note


@pytest.mark.parametrize("text", ["", "{}", "[]", "nonsense", json.dumps({**FIGURES, "restore_ms": None})])
def test_what_is_no_figures_is_refused(text: str) -> None:
    with pytest.raises(BootError, match="no figures"):
        GvisorFigures.parse(text)


def test_without_gvisor_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BootError, match="is not installed"):
        measure_gvisor(1)
    assert GvisorRival(1).figures() == "gVisor is not installed: there is no runsc on the path"


@as_root
@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (
            "echo runsc version 1; case $* in *run*detach*) echo it is broken >&2; exit 3;; esac",
            "it is broken",
        ),
        ("exit 3", "gVisor: .*exit status 3"),
    ],
)
def test_a_runsc_that_fails_is_a_reason(
    script: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runsc = tmp_path / "runsc"
    runsc.write_text(f"#!/bin/sh\n{script}\n")
    runsc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(BootError, match=complaint):
        measure_gvisor(1)
    assert folders_of_gvisor() == processes_of_gvisor() == []


@as_root
@needs_gvisor
@pytest.mark.slow
def test_a_sandbox_is_saved_and_restored_and_nothing_is_left() -> None:
    figures = GvisorRival(1).figures()
    assert isinstance(figures, GvisorFigures), figures
    assert len(figures.checkpoint_ms) == len(figures.restore_ms) == len(figures.private_mib) == 1
    assert min(figures.checkpoint_ms[0], figures.restore_ms[0]) > 0
    assert 10 < figures.private_mib[0] < 500  # Python, numpy and gymnasium are in it
    assert 1 < figures.file_mib < 500
    assert folders_of_gvisor() == processes_of_gvisor() == []


@as_root
@needs_gvisor
@pytest.mark.slow
def test_killing_who_measures_ends_the_sandbox(tmp_path: Path) -> None:
    code = "from rollout.commands.bench_gvisor import measure_gvisor; measure_gvisor(10)"
    with subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as process:
        wait_until(lambda: any("ready" in path.read_text() for path in tmp_path.glob("*/first-0.out")))
        assert any("runsc-sandbox" in each.info["cmdline"][0] for each in processes_of_gvisor())
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not processes_of_gvisor(), GONE_S)


def wait_until(holds: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    give_up_at_s = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < give_up_at_s
        time.sleep(0.05)
