"""Plays a run: many episodes at once over a fleet, each streamed to the sink as soon as it is finished.

Invariants:

- What was finished is committed, also when the run is interrupted or fails: the sink closes before the hosts
  do.
- An episode is recorded once, as played or as failed, except when the whole run cannot go on (no host can be
  started, the disk is full): then what is missing stays missing, and the error is raised.
- SIGINT and SIGTERM end the run in order: no new episode, those in progress are given up, the sink commits,
  the hosts close, `run.json` says "interrupted".
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Self

import psutil

from rollout.config import RunConfig
from rollout.env import Env
from rollout.errors import BootError, RolloutError
from rollout.fleet.cluster import RayHostClient, cluster
from rollout.fleet.fleet import Fleet
from rollout.fleet.messages import HostInfo
from rollout.fleet.progress import Progress
from rollout.fleet.record import RunRecord, make_run_folder
from rollout.loading import load_env
from rollout.policy.evaluators import make_evaluator
from rollout.runner import EpisodeSpec, Runner, episode_specs
from rollout.sandbox.base import Capabilities, PhaseTimings
from rollout.sandbox.engines import choose_engine_kind
from rollout.trajectory.rows import Trajectory
from rollout.trajectory.sink import TrajectorySink

__all__ = ["RunInterrupted", "play_run"]

_METRIC_INTERVAL_S = 1.0


class RunInterrupted(RolloutError):
    """A signal ended the run before it was done; what was finished is committed."""

    boundary = "run"

    def __init__(self, message: str, by: signal.Signals) -> None:
        super().__init__(message)
        self.exit_code = 128 + by


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
    env = load_env(config.env)
    make_evaluator(config.search)  # this and a missing engine are told before Ray takes its seconds to start
    if not os.environ.get("RAY_ADDRESS"):
        choose_engine_kind(
            config.engine, config.image
        )  # a missing engine is told before Ray takes its seconds
    folder = make_run_folder(config.output, run_id)
    record = RunRecord(folder, run_id, config, wall_clock())
    timings = PhaseTimings()
    with _removed_unless_begun(folder), _Signals() as signals:
        try:
            with cluster(config.fleet.hosts) as ray_cluster:
                signals.listen()  # again: Ray has put its own handler of SIGTERM in the place of ours
                nodes = ray_cluster.node_ids
                clients = [partial(RayHostClient, config, node) for node in nodes]
                async with Fleet(config.fleet, clients, timings=timings, clock=clock) as fleet:
                    run = _Run(config, env, fleet, record, progress, timings, clock, wall_clock)
                    await run.play(run_id)
        except asyncio.CancelledError:
            if signals.received is None:
                raise
            done = f"{progress.done} of {progress.total} episodes are committed in {folder}"
            raise RunInterrupted(
                f"interrupted by {signals.received.name}; {done}", signals.received
            ) from None
    return folder


class _Run:
    """One run while its hosts are up."""

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

    async def play(self, run_id: str) -> None:
        """Plays and records everything; whatever ends it, the sink is closed and `run.json` says how."""
        hosts = self._fleet.hosts
        engine = _common_engine(hosts)
        for host in hosts:
            self._env.learn(host.env_description)
        self._progress.wall, self._progress.hint = engine.wall, hosts[0].hint
        self._progress.started_s = self._clock()
        self._record.update(
            status="running",
            engine=_describe(hosts[0]),
            hosts=[{"node_id": host.node_id, "pid": host.pid, **host.machine} for host in hosts],
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
        specs = episode_specs(self._config, run_id, self._env.tasks())
        sink = TrajectorySink(
            self._record.folder,
            run_id=run_id,
            observation_space=self._env.observation_space,
            action_space=self._env.action_space,
            config=self._config.sink,
        )
        try:
            await self._play_all(runner, sink, specs)
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
                "t_s": round(self._clock() - (self._progress.started_s or 0.0), 3),
                "live_sandboxes": stats.live_sandboxes,
                "checkpoints": stats.checkpoints,
                "checkpoint_bytes": stats.checkpoint_bytes,
                "branches": stats.branches,
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
        self._record.update(
            status=status,
            finished_at=self._wall_clock(),
            summary={
                "episodes": progress.done,
                "failed_episodes": progress.failed,
                "mean_return": progress.mean_return,
                "branches": stats.branches,
                "failed_branches": stats.failed_branches,
                "evicted_checkpoints": stats.evicted_checkpoints,
                "remade_checkpoints": stats.remade_checkpoints,
                "lost_hosts": self._fleet.num_lost_hosts,
                "duration_s": round(duration_s, 3),
            },
        )


class _Signals:
    """Turns the first SIGINT or SIGTERM into the cancellation of the task that it was made in."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self.listen()
        return self

    def listen(self) -> None:
        """Takes the signals, from whoever has them."""
        for each in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(each, self._receive, each)

    def __exit__(self, *exception: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(each)

    def _receive(self, which: signal.Signals) -> None:
        if self.received is None:
            self.received = which
            self._task.cancel()


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
