"""`rollout run`: plays a run, or the rest of one that was interrupted, and shows how it goes.

Standard output gets the final table, the run's folder and the report's path; everything else goes to standard
error.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rollout.errors import ConfigError, RolloutError

if TYPE_CHECKING:
    from rollout.config import RunConfig
    from rollout.fleet.progress import Progress
    from rollout.trajectory.storage import Storage

__all__ = ["command"]


def command(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file, such as configs/frozenlake.toml.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Overrides a key: search.simulations=64. Repeatable."
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Finish an interrupted run: its folder, its name below runs/, or a URI (s3://...). It needs "
            "no CONFIG, and refuses one that is not its own.",
        ),
    ] = None,
    report: Annotated[bool, typer.Option(help="Write the HTML report at the end.")] = True,
) -> None:
    """Play episodes in sandboxes and write their trajectories."""
    from rollout.config import load_config

    if config is None and overrides:
        raise ConfigError("--set needs a CONFIG that it overrides; a run that is resumed keeps its settings")
    resolved = None if config is None else load_config(config, overrides or ())
    if resume is not None:
        folder, progress = asyncio.run(_resume(resume, resolved))
    elif config is not None and resolved is not None:
        folder, progress = asyncio.run(_play(resolved, config.stem))
    else:
        raise ConfigError("there is nothing to run: give a CONFIG, or --resume RUN")
    _show(folder, progress, with_report=report)


def _show(folder: Storage, progress: Progress, *, with_report: bool) -> None:
    from rich.console import Console

    from rollout.commands.run_view import summary_table

    for note in progress.notes:
        print(f"note: {note}", file=sys.stderr)
    if progress.started_s is None:
        print(f"nothing to play: {progress.done} of {progress.total} episodes are there")
    else:
        Console().print(summary_table(progress))
    print(f"run: {folder}")
    if with_report and importlib.util.find_spec("rollout.report.page") is not None:
        from rollout.report.page import write_report

        print(f"report: {write_report(folder)}")
    if progress.first_failure is not None and progress.failed == progress.done:
        first = progress.first_failure
        raise RolloutError(
            f"every episode failed, the first for this reason: {first.boundary}: {first.cause}"
        )


async def _play(config: RunConfig, name: str) -> tuple[Storage, Progress]:
    from rollout.commands.run_view import shown
    from rollout.fleet.driver import play_run
    from rollout.fleet.progress import Progress
    from rollout.fleet.record import make_run_id

    run_id = make_run_id(name, time.strftime("%Y%m%d-%H%M%S"), uuid.uuid4().hex[:4])
    progress = Progress(config.episodes)
    async with shown(progress):
        folder = await play_run(config, run_id, progress)
    return folder, progress


async def _resume(run: str, given: RunConfig | None) -> tuple[Storage, Progress]:
    from rollout.commands.output import find_run
    from rollout.commands.run_view import shown
    from rollout.fleet.driver import resume_run
    from rollout.fleet.progress import Progress

    folder, progress = find_run(run), Progress(0)
    async with shown(progress):
        await resume_run(folder, progress, given=given)
    return folder, progress
