"""`rollout run`: plays a run and shows how it goes.

Standard output gets the final table, the run's folder and the report's path; everything else goes to standard
error.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rollout.errors import RolloutError

if TYPE_CHECKING:
    from rollout.config import RunConfig
    from rollout.fleet.progress import Progress

__all__ = ["command"]


def command(
    config: Annotated[Path, typer.Argument(help="A TOML file, such as configs/frozenlake.toml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Overrides a key: search.simulations=64. Repeatable."
        ),
    ] = None,
    report: Annotated[bool, typer.Option(help="Write the HTML report at the end.")] = True,
) -> None:
    """Play episodes in sandboxes and write their trajectories."""
    from rollout.config import load_config

    resolved = load_config(config, overrides or ())
    folder, progress = asyncio.run(_play(resolved, config.stem))

    from rich.console import Console

    from rollout.commands.run_view import summary_table

    Console().print(summary_table(progress))
    print(f"run: {folder}")
    if report and importlib.util.find_spec("rollout.report.page") is not None:
        from rollout.report.page import write_report

        print(f"report: {write_report(folder)}")
    if progress.first_failure is not None and progress.failed == progress.done:
        first = progress.first_failure
        raise RolloutError(
            f"every episode failed, the first for this reason: {first.boundary}: {first.cause}"
        )


async def _play(config: RunConfig, name: str) -> tuple[Path, Progress]:
    from rollout.commands.run_view import shown
    from rollout.fleet.driver import play_run
    from rollout.fleet.progress import Progress
    from rollout.fleet.record import make_run_id

    run_id = make_run_id(name, time.strftime("%Y%m%d-%H%M%S"), uuid.uuid4().hex[:4])
    progress = Progress(config.episodes)
    async with shown(progress):
        folder = await play_run(config, run_id, progress)
    return folder, progress
