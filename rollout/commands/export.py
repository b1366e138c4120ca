"""`rollout export RUN --format F --out PATH`: a run in the format that a trainer loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rollout.commands.output import RUN_HELP, find_run, print_json, stderr_console
from rollout.errors import ConfigError
from rollout.trajectory.export.context import ExportOptions
from rollout.trajectory.export.formats import FORMATS, ExportReport, export_run
from rollout.trajectory.export.source import Selection

__all__ = ["command"]

_FORMATS_HELP = "Format: " + "; ".join(f"{name} ({form.summary})" for name, form in FORMATS.items()) + "."


def command(
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
    format_name: Annotated[str, typer.Option("--format", help=_FORMATS_HELP)],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    min_return: Annotated[
        float | None, typer.Option(help="Only episodes that returned this or more.")
    ] = None,
    max_return: Annotated[
        float | None, typer.Option(help="Only episodes that returned this or less.")
    ] = None,
    failed: Annotated[bool, typer.Option(help="Failed episodes too.")] = False,
    min_visits: Annotated[int, typer.Option(help="Only nodes with so many visits or more.")] = 1,
    max_depth: Annotated[int | None, typer.Option(help="Only nodes at this depth or above.")] = None,
    margin: Annotated[float, typer.Option(help="Least gap between the values of a preference pair.")] = 0.0,
    test_fraction: Annotated[float, typer.Option(help="Share of the tasks that go to the test split.")] = 0.0,
    split_seed: Annotated[int, typer.Option(help="Decides which tasks these are.")] = 0,
    system: Annotated[str | None, typer.Option(help="What the system says first in a conversation.")] = None,
    history: Annotated[int | None, typer.Option(help="Moves that a prompt shows; all by default.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the folder if it is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a run's trajectories in a format that a trainer loads."""
    if format_name not in FORMATS:
        raise ConfigError(f"there is no format {format_name!r}: there are {', '.join(FORMATS)}")
    options = ExportOptions(
        selection=Selection(min_return, max_return, failed),
        min_visits=min_visits,
        max_depth=max_depth,
        margin=margin,
        test_fraction=test_fraction,
        split_seed=split_seed,
        system=system,
        history=history,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr_console()) as bar:
        task = bar.add_task(f"exporting {format_name}", total=None)
        report = export_run(
            find_run(run),
            format_name,
            out,
            options,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _print(report, as_json=json)


def _print(report: ExportReport, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "folder": str(report.folder),
                "episodes": report.num_episodes,
                "records": report.num_records,
                "problems": [f"{one.kind}: {one.where}: {one.detail}" for one in report.problems],
            }
        )
        return
    records = ", ".join(f"{count} in {split}" for split, count in report.num_records.items())
    print(f"{report.folder}: {report.num_episodes} episodes, records: {records}")
    for problem in report.problems:
        print(f"skipped {problem.kind} {problem.where}: {problem.detail}")
