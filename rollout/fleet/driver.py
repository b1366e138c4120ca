"""Plays a run: many episodes at once over a fleet, each streamed to the sink as soon as it is finished.

Invariants:

- What was finished is committed, also when the run is interrupted or fails: the sink closes before the hosts
  do.
- An episode is recorded once, as played or as failed, except when the whole run cannot go on (no host can be
  started, the disk is full): then what is missing stays missing, and the error is raised.
- SIGINT and SIGTERM end the run in order: no new episode, those in progress are given up, the sink commits,
  the hosts close, `run.json` says "interrupted".
- One process at a time plays a run. `resume_run` plays the episodes that are neither committed nor in a log
  that a dead driver left, and no others (see `rollout.fleet.resume`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import psutil

from rollout.config import RunConfig
from rollout.env import Env
from rollout.errors import BootError, RolloutError
from rollout.fleet.cluster import RayHostClient, cluster
from rollout.fleet.fleet import Fleet
from rollout.fleet.interrupt import RunInterrupted, Signals
from rollout.fleet.messages import HostInfo
from rollout.fleet.progress import Progress
from rollout.fleet.record import RunRecord, drive_alone, make_run_folder, read_description
from rollout.fleet.resume import check_engine, check_given, check_versions, count_committed, recorded_config
from rollout.loading import load_env
from rollout.policy.evaluators import make_evaluator
from rollout.runner import EpisodeSpec, Runner, episode_specs
from rollout.sandbox.base import Capabilities, PhaseTimings
from rollout.sandbox.economics import ways_record
from rollout.sandbox.engines import choose_engine_kind
from rollout.trajectory.recover import recover_run
from rollout.trajectory.rows import Trajectory
from rollout.trajectory.sink import TrajectorySink

__all__ = ["play_run", "resume_run"]

_METRIC_INTERVAL_S = 1.0


async def play_run(
    config: RunConfig,
    run_id: str,
    progress: Progress,
    *,
    clock: Callable[[], float] = time.perf_counter,
    wall_clock: Callable[[], float] = time.time,
) -> Path:
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
    with _removed_unless_begun(folder), drive_alone(folder):
        record = RunRecord.begin(folder, run_id, config, wall_clock())
        await _drive(config, env, record, progress, clock, wall_clock)
    return folder


async def resume_run(
    folder: Path,
    progress: Progress,
    *,
    given: RunConfig | None = None,
    clock: Callable[[], float] = time.perf_counter,
    wall_clock: Callable[[], float] = time.time,
) -> None:
    """Plays the missing episodes of a run that was interrupted; none if there are none.

    Args:
        folder: The run's folder.
        progress: Counts what is there already, then kept up to date.
        given: Settings that must be those of the run.
        clock: Monotonic seconds.
        wall_clock: Unix time.

    Raises:
        ConfigError: The folder holds no run, another process plays it, or a setting or a version differs.
        RunInterrupted: SIGINT or SIGTERM ended it again.
        RolloutError: It could not go on.
    """
    read_description(folder)  # what is no run is told before anything is written there
    with drive_alone(folder):
        record = RunRecord.resume(folder)
        check_versions(record.description)
        if given is not None:
            check_given(record.description, given)
        config = recorded_config(record.description)
        env = _ready(config)
        committed = recover_run(folder, config.sink)
        progress.total = config.episodes
        if committed:
            count_committed(folder, progress)
        specs = episode_specs(config, record.description["run_id"], env.tasks())
        if all(spec.episode_id in committed for spec in specs):
            if record.description.get("status") != "finished":
                record.update(status="finished", finished_at=wall_clock())
            return
        sessions = record.description.get("resumed_at", [])
        record.set(resumed_at=[*sessions, wall_clock()])
        await _drive(config, env, record, progress, clock, wall_clock)


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
                    await _Run(config, env, fleet, record, progress, timings, clock, wall_clock).play()
        except asyncio.CancelledError:
            if signals.received is None:
                raise
            done = f"{progress.done} of {progress.total} episodes are committed in {record.folder}"
            if (record.folder / "run.json").exists():
                done += f"; to finish it: rollout run --resume {record.folder}"
            raise RunInterrupted(
                f"interrupted by {signals.received.name}; {done}", signals.received
            ) from None


class _Run:
    """One run, or one session of it."""

    def __init__(
        self,
        config: RunConfig,
        env: Env,
        fleet: Fleet,
        record: RunRecord,
        progress: Progress,
        timings: PhaseTimings,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._env = env
        self._fleet = fleet
        self._record = record
        self._progress = progress
        self._timings = timings
        self._clock = clock
        self._wall_clock = wall_clock

    async def play(self) -> None:
        """Plays every episode that is not there yet."""
        engine = _common_engine(self._fleet.hosts)
        described = _describe(self._fleet.hosts[0])
        check_engine(self._record.description.get("engine"), described)
        for host in self._fleet.hosts:
            self._env.learn(host.env_description)
        self._progress.wall, self._progress.hint = engine.wall, self._fleet.hosts[0].hint
        self._progress.started_s = self._clock()
        self._record.update(
            status="running",
            engine=described,
            hosts=[{"node_id": host.node_id, "pid": host.pid, **host.machine} for host in self._fleet.hosts],
        )
        runner = Runner(
            self._env,
            self._fleet,
            self._config,
            engine=engine.engine,
            timings=self._timings,
            clock=self._clock,
            wall_clock=self._wall_clock,
        )
        run_id = str(self._record.description["run_id"])
        sink = TrajectorySink(
            self._record.folder,
            run_id=run_id,
            observation_space=self._env.observation_space,
            action_space=self._env.action_space,
            config=self._config.sink,
        )
        specs = episode_specs(self._config, run_id, self._env.tasks())
        missing = [spec for spec in specs if spec.episode_id not in sink]
        try:
            await self._play_all(runner, sink, missing)
        except BaseException as error:
            with contextlib.suppress(
                RolloutError
            ):  # a full disk fails here too; the first error is the one to tell
                status = "interrupted" if isinstance(error, asyncio.CancelledError) else "failed"
                await self._finish(sink, status)
            raise
        await self._finish(sink, "finished")

    async def _play_all(self, runner: Runner, sink: TrajectorySink, specs: Sequence[EpisodeSpec]) -> None:
        left = iter(specs)
        workers = [self._play_some(runner, sink, left) for _ in range(self._config.fleet.concurrent_episodes)]
        metrics = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as tasks:
                for worker in workers:
                    tasks.create_task(worker)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # the others were cancelled because of it
        finally:
            metrics.cancel()
        await self._fleet.refresh()
        self._measure()

    async def _play_some(self, runner: Runner, sink: TrajectorySink, specs: Iterator[EpisodeSpec]) -> None:
        """Plays episodes one after the other, as many as this worker gets."""
        for spec in specs:
            trajectory = await runner.play(spec)
            if self._fleet.broken is not None:
                raise self._fleet.broken
            await self._commit(sink, trajectory)

    async def _commit(self, sink: TrajectorySink, trajectory: Trajectory) -> None:
        """Writes and counts an episode; a cancellation waits for both: what is told is what is there."""
        start_s = self._clock()
        writing = asyncio.ensure_future(asyncio.to_thread(sink.write, trajectory))
        try:
            await asyncio.shield(writing)
        finally:
            await writing
            self._timings.add("sink", self._clock() - start_s)
            self._progress.add(trajectory.episode)

    async def _watch(self) -> None:
        """Keeps the progress fresh and writes the timeline."""
        while True:
            await asyncio.sleep(_METRIC_INTERVAL_S)
            self._measure()

    def _measure(self) -> None:
        stats = self._fleet.stats()
        self._progress.branches = stats.branches
        self._progress.live_sandboxes = stats.live_sandboxes
        self._progress.checkpoints = stats.checkpoints
        self._progress.lost_hosts = self._fleet.num_lost_hosts
        self._record.add_metric(
            {
                "t_s": round(self._record.played_s + self._clock() - (self._progress.started_s or 0.0), 3),
                "live_sandboxes": stats.live_sandboxes,
                "checkpoints": stats.checkpoints,
                "checkpoint_bytes": stats.checkpoint_bytes,
                "branches": self._record.num_branches + stats.branches,
                "failed_branches": self._record.num_failed_branches + stats.failed_branches,
                "rss_bytes": stats.rss_bytes + psutil.Process().memory_info().rss,
            }
        )

    async def _finish(self, sink: TrajectorySink, status: str) -> None:
        await asyncio.to_thread(sink.close)
        stats, progress = self._fleet.stats(), self._progress
        progress.finished_s = self._clock()
        duration_s = progress.finished_s - (progress.started_s or 0.0)
        self._timings.merge(stats.timings)
        self._record.write_timings(self._timings)
        # Of earlier sessions, unless they were killed.
        earlier = self._record.description.get("summary", {})
        self._record.update(
            status=status,
            finished_at=self._wall_clock(),
            summary={
                "episodes": progress.done,
                "failed_episodes": progress.failed,
                "mean_return": progress.mean_return,
                "branches": self._record.num_branches + stats.branches,
                "failed_branches": self._record.num_failed_branches + stats.failed_branches,
                "evicted_checkpoints": stats.evicted_checkpoints + earlier.get("evicted_checkpoints", 0),
                "remade_checkpoints": stats.remade_checkpoints + earlier.get("remade_checkpoints", 0),
                "lost_hosts": self._fleet.num_lost_hosts + earlier.get("lost_hosts", 0),
                "economics": ways_record(stats.ways, earlier.get("economics", {})),
                "duration_s": round(self._record.played_s + duration_s, 3),
            },
        )


@contextlib.contextmanager
def _removed_unless_begun(folder: Path) -> Generator[None]:
    """A run that never began leaves no folder."""
    try:
        yield
    finally:
        if not (folder / "run.json").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _common_engine(hosts: Sequence[HostInfo]) -> Capabilities:
    """The engine that all hosts have.

    Raises:
        BootError: They differ, so rows of one run would not be comparable.
    """
    kinds = sorted({host.capabilities.engine for host in hosts})
    if len(kinds) > 1:
        raise BootError(
            f"the hosts have different engines ({', '.join(kinds)}); set engine.kind to one of them"
        )
    return hosts[0].capabilities


def _describe(host: HostInfo) -> dict[str, object]:
    fingerprint = {"fingerprint": host.fingerprint, "image_digest": host.image_digest}
    return {"kind": host.capabilities.engine, **fingerprint, "capabilities": asdict(host.capabilities)}
