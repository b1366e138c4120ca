"""What `rollout run` shows: a live view on a terminal, plain lines elsewhere; and the table at the end.

Everything goes to standard error, so that standard output has the result alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncGenerator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rollout.fleet.progress import Progress

__all__ = ["RunView", "shown", "summary_table"]

_REFRESHES_PER_S = 4
_LINE_INTERVAL_S = 5.0
_LOOK_INTERVAL_S = 0.2
_BAR_WIDTH = 40
_STARTING = "starting Ray and the hosts ..."


@contextlib.asynccontextmanager
async def shown(progress: Progress) -> AsyncGenerator[None]:
    """Shows a run's progress on standard error for as long as the context lasts."""
    if sys.stderr.isatty():
        view = RunView(progress)
        console = Console(stderr=True)
        with Live(view, console=console, refresh_per_second=_REFRESHES_PER_S, transient=True):
            yield
        return
    lines = asyncio.create_task(_print_lines(progress))
    try:
        yield
    finally:
        lines.cancel()
        _print(_line(progress))


def summary_table(progress: Progress) -> Table:
    """The counts of a finished run."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(progress):
        table.add_row(name, value)
    return table


class RunView:
    """Draws the progress as it is at the moment of drawing."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __rich__(self) -> RenderableType:
        progress = self._progress
        if progress.started_s is None:
            return Text(progress.waits_for or _STARTING)
        bar = Table.grid(padding=(0, 1))
        counts = f"{progress.done}/{progress.total} episodes"
        bar.add_row(ProgressBar(progress.total, progress.done, width=_BAR_WIDTH), counts)
        return Group(Text(_wall(progress)), bar, summary_table(progress))


async def _print_lines(progress: Progress) -> None:
    _print(_STARTING)
    said = ""
    is_announced = False
    printed_s = 0.0
    while True:
        await asyncio.sleep(_LOOK_INTERVAL_S)
        if progress.started_s is None:
            if progress.waits_for != said:
                said = progress.waits_for
                _print(said or _STARTING)
            continue
        if not is_announced:
            is_announced = True
            _print(_wall(progress))
        if _elapsed_s(progress) - printed_s >= _LINE_INTERVAL_S:
            printed_s = _elapsed_s(progress)
            _print(_line(progress))


def _wall(progress: Progress) -> str:
    return f"wall: {progress.wall}" + (f" ({progress.hint})" if progress.hint is not None else "")


def _rows(progress: Progress) -> list[tuple[str, str]]:
    elapsed_s = _elapsed_s(progress)
    mean = progress.mean_return
    length = sum(progress.lengths) / len(progress.lengths) if progress.lengths else None
    rows = [
        (
            "episodes",
            f"{progress.done} of {progress.total}"
            + (f", {progress.failed} failed" if progress.failed else ""),
        ),
        ("mean return", "-" if mean is None else f"{mean:.3f}"),
        ("mean length", "-" if length is None else f"{length:.1f} moves"),
        ("branches", f"{progress.branches}, {progress.branches / elapsed_s:.1f}/s" if elapsed_s else "-"),
        ("live sandboxes", f"{progress.live_sandboxes}, {progress.checkpoints} checkpoints"),
        ("wall time", f"{elapsed_s:.1f} s"),
    ]
    if progress.lost_hosts:
        rows.append(("lost hosts", f"{progress.lost_hosts}, replaced"))
    return rows


def _line(progress: Progress) -> str:
    return "; ".join(f"{name} {value}" for name, value in _rows(progress))


def _elapsed_s(progress: Progress) -> float:
    if progress.started_s is None:
        return 0.0
    return (progress.finished_s or time.perf_counter()) - progress.started_s


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
