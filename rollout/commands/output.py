"""How commands find runs and print: tables for a terminal or a pipe, and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from rollout.errors import ConfigError
from rollout.report.stats import Estimate
from rollout.report.text import number_text, printable
from rollout.trajectory.storage import Storage
from rollout.uris import is_uri

__all__ = [
    "RUN_HELP",
    "estimate_text",
    "find_run",
    "print_json",
    "stderr_console",
    "stdout_console",
    "text_table",
]

PIPE_WIDTH = 160
"""Columns of a table that goes to a file or a pipe, which has no width of its own."""


RUN_HELP = "The run: its folder, its name below runs/, or a URI (s3://...)."


def find_run(run: str) -> Storage:
    """The folder of a run: a path, the name of a folder below `runs`, or a URI, which may hold no run.

    Raises:
        ConfigError: There is no such folder.
        SinkError: The URI names no file system that this machine can reach.
    """
    if is_uri(run):
        return Storage.of(run)
    for folder in (Path(run), Path("runs") / run):
        if folder.is_dir():
            return Storage.of(folder)
    name = printable(run)
    raise ConfigError(f"there is no run '{name}': neither that folder nor runs/{name}")


def stdout_console() -> Console:
    """Writes tables to standard output; nothing in them is taken as markup."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(markup=False, highlight=False, emoji=False, width=width)


def stderr_console() -> Console:
    """Shows progress on standard error, and nothing where that is no terminal."""
    return Console(stderr=True, markup=False, highlight=False, quiet=not sys.stderr.isatty())


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))


def text_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[str] = (), title: str = ""
) -> RenderableType:
    """A table of plain text.

    Args:
        header: Names of the columns.
        rows: Cells, as many as the header has.
        numbers: Columns that are aligned to the right and never wrapped.
        title: Shown above, after an empty line, if not empty.
    """
    table = Table(header_style="bold", box=None, show_header=any(header))
    for name in header:
        is_number = name in numbers
        table.add_column(
            name,
            justify="right" if is_number else "left",
            no_wrap=is_number,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return Group(Text(f"\n{title}", style="bold"), table) if title else table


def estimate_text(value: Estimate | None) -> str:
    """A mean with its 95% interval."""
    if value is None:
        return "-"
    if value.low is None or value.high is None:
        return f"{number_text(value.mean)} (n={value.count:,})"
    low, high = number_text(value.low, 3), number_text(value.high, 3)
    return f"{number_text(value.mean)} [{low}, {high}] (n={value.count:,})"
