"""What a run shows, on a terminal and elsewhere."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import select
import sys
import time

import pytest
from rich.console import Console

from rollout.commands import run_view
from rollout.commands.run_view import RunView, shown
from rollout.fleet.progress import Progress
from rollout.trajectory.rows import EpisodeRow
from rollout.types import Failure


def episode(return_: float | None, failure: Failure | None = None) -> EpisodeRow:
    return EpisodeRow(
        "id", "task", "group", "env", "inline", "uct", "playout", 0, return_, 4, 0.0, 1.0, failure=failure
    )


def halfway() -> Progress:
    progress = Progress(8, wall="a wall", hint="for microVMs: install QEMU", branches=120)
    progress.started_s = time.perf_counter() - 10.0
    progress.finished_s = progress.started_s + 10.0
    progress.add(episode(1.0))
    progress.add(episode(0.0))
    progress.add(episode(None, Failure("gone", "guest", False)))
    return progress


def test_the_view_shows_where_the_run_is() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(RunView(Progress(8)))
    console.print(RunView(Progress(8, waits_for="looking for another driver ...")))
    console.print(RunView(halfway()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "starting Ray",
        "looking for another driver ...",
        "wall: a wall (for microVMs: install QEMU)",
        "3/8 episodes",
        "3 of 8, 1 failed",
        "0.500",
        "4.0 moves",
        "120, 12.0/s",
    ):
        assert part in text


async def test_elsewhere_it_prints_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_view, "_LOOK_INTERVAL_S", 0.001)
    progress = Progress(8)
    async with shown(progress):
        await asyncio.sleep(0.01)
        progress.waits_for = "looking for another driver ..."
        await asyncio.sleep(0.05)
        for name in ("wall", "hint", "started_s"):
            setattr(progress, name, getattr(halfway(), name))
        await asyncio.sleep(0.05)
        progress.add(episode(1.0))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["starting Ray and the hosts ...", "looking for another driver ..."]
    assert lines[2] == "wall: a wall (for microVMs: install QEMU)"
    assert lines[-1].startswith("episodes 1 of 8; mean return 1.000; ")
    assert len(lines) <= 5, "a line every few seconds, not at every look"


async def test_on_a_terminal_it_is_live_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    try:
        with os.fdopen(theirs, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            async with shown(halfway()):
                await asyncio.sleep(0)
            terminal.flush()
            drawn = b""
            while select.select([ours], [], [], 0.2)[0]:  # a terminal hands its output on in pieces
                drawn += os.read(ours, 65536)
    finally:
        os.close(ours)
    assert b"3/8 episodes" in drawn
    assert drawn.rstrip().endswith(b"\x1b[2K"), "the last thing is the erasing of the view"
