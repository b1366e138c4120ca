"""`rollout report RUN`: the run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rollout.commands.output import RUN_HELP, find_run, stderr_console
from rollout.report import write_report

__all__ = ["command"]


def command(
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; report.html in the run's folder.")
    ] = None,
) -> None:
    """Write a run as one self-contained HTML page, and print its path."""
    folder = find_run(run)
    with stderr_console().status(f"reading {folder}"):
        page = write_report(folder, output)
    print(page)
