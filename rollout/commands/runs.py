"""`rollout runs [DIR]`: the runs in a folder, oldest first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from rollout.commands.output import estimate_text, print_json, stderr_console, stdout_console, text_table
from rollout.errors import ConfigError, RolloutError
from rollout.report.files import is_run_folder
from rollout.report.summary import RunSummary, summarise
from rollout.report.text import duration_text, printable
from rollout.trajectory.storage import Location, Storage

__all__ = ["ListedRun", "command", "list_runs"]


@dataclass(frozen=True, slots=True)
class ListedRun:
    """A run in a folder: its summary, or why it cannot be read."""

    folder: Storage
    summary: RunSummary | None
    problem: str = ""


def command(
    folder: Annotated[
        str, typer.Argument(help="Folder that holds the runs' folders, or a URI (s3://...).")
    ] = "runs",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the runs in a folder, oldest first."""
    where = Storage.of(folder)
    with stderr_console().status(f"reading {where}"):
        runs = list_runs(where)
    if json:
        print_json([_to_json(run) for run in runs])
        return
    header = ("run", "begun", "environment", "engine", "search", "episodes", "failed", "return", "time")
    rows = [_cells(run) for run in runs]
    stdout_console().print(text_table(header, rows, numbers=("episodes", "failed", "time")))


def list_runs(location: Location) -> list[ListedRun]:
    """The runs directly below a folder; one that cannot be read is listed with the reason.

    Raises:
        ConfigError: It is no folder.
        SinkError: It cannot be listed.
    """
    folder = Storage.of(location)
    if folder.local is not None and not folder.local.is_dir():
        raise ConfigError(f"cannot list the runs in {folder}: it is no folder")
    folder.check_bucket()
    candidates = [child for name in sorted(folder.names()) if is_run_folder(child := folder.child(name))]
    runs: list[ListedRun] = []
    for candidate in candidates:
        try:
            runs.append(ListedRun(candidate, summarise(candidate)))
        except RolloutError as error:
            runs.append(ListedRun(candidate, None, error.message))
    return sorted(runs, key=lambda run: (_begun(run), run.folder.name))


def _begun(run: ListedRun) -> float:
    begun = run.summary.started_at if run.summary else None
    return begun.timestamp() if begun else 0.0


def _cells(run: ListedRun) -> tuple[str, ...]:
    name, summary = printable(run.folder.name, 60), run.summary
    if summary is None:
        return (name, "", printable(run.problem, 200), "", "", "", "", "", "")
    planned = "" if summary.num_planned is None else f"/{summary.num_planned}"
    return (
        name,
        f"{summary.started_at:%Y-%m-%d %H:%M}" if summary.started_at else "-",
        *(
            printable(", ".join(summary.distinct(column)), 40) or "-"
            for column in ("env_id", "engine", "search")
        ),
        f"{summary.num_episodes}{planned}",
        str(summary.num_failed),
        estimate_text(summary.mean_return),
        duration_text(summary.wall_s) or "-",
    )


def _to_json(run: ListedRun) -> dict[str, object]:
    if run.summary is None:
        return {"folder": str(run.folder), "problem": run.problem}
    return run.summary.to_json()
