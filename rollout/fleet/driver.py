"""Plays a run: many episodes at once over a fleet, each streamed to the sink as soon as it is finished.

Invariants:

- What was finished is committed, also when the run is interrupted or fails: the sink closes before the hosts
  do.
- An episode is recorded once, as played or as failed, except when the whole run cannot go on (no host can be
  started, the disk is full): then what is missing stays missing, and the error is raised.
- SIGINT and SIGTERM end the run in order: no new episode, those in progress are given up, the sink commits,
  the hosts close, `run.json` says "interrupted".
- One process at a time plays a run, as far as its storage can tell (see `rollout.fleet.ownership`).
  `resume_run` plays the episodes that are neither committed nor in a log that a dead driver left on this
  machine, and no others (see `rollout.fleet.resume`).
- A run in an object store goes on while the store is away, as far as its logs on this machine reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import time
from collections.abc import Callable, Generator
from functools import partial

from rollout.config import RunConfig
from rollout.env import Env
from rollout.errors import SinkError
from rollout.fleet.cluster import RayHostClient, cluster
from rollout.fleet.fleet import Fleet
from rollout.fleet.interrupt import RunInterrupted, Signals
from rollout.fleet.ownership import Ownership, drive_alone
from rollout.fleet.progress import Progress
from rollout.fleet.record import RunRecord, make_run_folder, read_description
from rollout.fleet.resume import check_given, check_versions, count_committed, recorded_config
from rollout.fleet.session import Session
from rollout.loading import load_env
from rollout.policy.evaluators import make_evaluator
from rollout.runner import episode_specs
from rollout.sandbox.base import PhaseTimings
from rollout.sandbox.engines import choose_engine_kind
from rollout.trajectory.recover import recover_run
from rollout.trajectory.storage import Location, Storage

__all__ = ["play_run", "resume_run"]


async def play_run(
    config: RunConfig,
    run_id: str,
    progress: Progress,
    *,
    clock: Callable[[], float] = time.perf_counter,
    wall_clock: Callable[[], float] = time.time,
) -> Storage:
    """Plays a run to its end.

    Args:
        config: The run.
        run_id: Its id, and the name of its folder in `config.output`.
        progress: Kept up to date.
        clock: Monotonic seconds.
        wall_clock: Unix time.

    Returns:
        The run's folder.

    Raises:
        RunInterrupted: SIGINT or SIGTERM ended it.
        RolloutError: It could not begin, and then left no folder, or could not go on.
    """
    env = _ready(config)
    folder = make_run_folder(config.output, run_id)
    record = RunRecord.begin(folder, run_id, config, wall_clock())
    with _removed_unless_begun(record):
        async with drive_alone(folder, config.sink.log_folder, is_new=True) as ownership:
            await _drive(config, env, record, ownership, progress, clock, wall_clock)
    return folder


async def resume_run(
    folder: Location,
    progress: Progress,
    *,
    given: RunConfig | None = None,
    clock: Callable[[], float] = time.perf_counter,
    wall_clock: Callable[[], float] = time.time,
) -> None:
    """Plays the missing episodes of a run that was interrupted; none if there are none.

    Args:
        folder: The run's folder: a local path or a URI of `pyarrow.fs`.
        progress: Counts what is there already, then kept up to date.
        given: Settings that must be those of the run.
        clock: Monotonic seconds.
        wall_clock: Unix time.

    Raises:
        ConfigError: The folder holds no run, another process plays it, or a setting or a version differs.
        RunInterrupted: SIGINT or SIGTERM ended it again.
        RolloutError: It could not go on.
    """
    storage = Storage.of(folder)
    described = read_description(storage)  # what is no run is told before anything is written there
    check_versions(described)
    if given is not None:
        check_given(described, given)
    config = recorded_config(described)

    def show_wait(text: str) -> None:
        progress.waits_for = text

    async with drive_alone(storage, config.sink.log_folder, on_wait=show_wait) as ownership:
        record = RunRecord.resume(storage)
        env = _ready(config)
        committed = recover_run(storage, config.sink)
        progress.total = config.episodes
        if committed:
            count_committed(storage, progress)
        specs = episode_specs(config, record.description["run_id"], env.tasks())
        if all(spec.episode_id in committed for spec in specs):
            if record.description.get("status") != "finished":
                record.update(status="finished", finished_at=wall_clock())
            return
        sessions = record.description.get("resumed_at", [])
        record.set(resumed_at=[*sessions, wall_clock()])
        await _drive(config, env, record, ownership, progress, clock, wall_clock)


def _ready(config: RunConfig) -> Env:
    """The environment; what is missing is told before Ray takes its seconds to start.

    Raises:
        RolloutError: The environment, the evaluator or the engine is not there.
    """
    env = load_env(config.env)
    make_evaluator(config.search)
    if not os.environ.get("RAY_ADDRESS"):
        choose_engine_kind(config.engine, config.image)
    return env


async def _drive(
    config: RunConfig,
    env: Env,
    record: RunRecord,
    ownership: Ownership,
    progress: Progress,
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
) -> None:
    """Starts Ray and the hosts, and plays what is missing.

    Raises:
        RunInterrupted: SIGINT or SIGTERM ended it.
        RolloutError: It could not begin or go on.
    """
    timings = PhaseTimings()
    with Signals() as signals:
        try:
            with cluster(config.fleet.hosts) as ray_cluster:
                signals.listen()  # again: Ray has put its own handler of SIGTERM in the place of ours
                nodes = ray_cluster.node_ids
                clients = [partial(RayHostClient, config, node) for node in nodes]
                async with Fleet(config.fleet, clients, timings=timings, clock=clock) as fleet:
                    run = Session(config, env, fleet, record, ownership, progress, timings, clock, wall_clock)
                    await run.play()
        except asyncio.CancelledError:
            if signals.received is None:
                raise
            done = f"{progress.done} of {progress.total} episodes are committed in {record.storage}"
            if record.is_begun:
                done += f"; to finish it: rollout run --resume {shlex.quote(str(record.storage))}"
            raise RunInterrupted(
                f"interrupted by {signals.received.name}; {done}", signals.received
            ) from None


@contextlib.contextmanager
def _removed_unless_begun(record: RunRecord) -> Generator[None]:
    """A run that never began leaves no folder."""
    try:
        yield
    finally:
        if not record.is_begun:
            with contextlib.suppress(SinkError):  # the error to tell is another one
                record.storage.delete_all()
