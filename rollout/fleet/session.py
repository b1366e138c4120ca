"""One session of a run: plays what is missing over a fleet that is up, and keeps the run's small files.

Invariants:

- The sink closes before the session ends, however it ends, so that what was finished is committed.
- What cannot be committed then, because an object store is away, stays in the logs of this machine; the error
  says where.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import psutil

from rollout.config import RunConfig
from rollout.env import Env
from rollout.errors import BootError, RolloutError, SinkError
from rollout.fleet.fleet import Fleet
from rollout.fleet.messages import HostInfo
from rollout.fleet.ownership import Ownership, RunTakenOver
from rollout.fleet.progress import Progress
from rollout.fleet.record import RunRecord
from rollout.fleet.resume import check_engine
from rollout.runner import EpisodeSpec, Runner, episode_specs
from rollout.sandbox.base import Capabilities, PhaseTimings
from rollout.sandbox.economics import ways_record
from rollout.trajectory.rows import Trajectory
from rollout.trajectory.sink import TrajectorySink
from rollout.trajectory.storage import Storage

__all__ = ["Session"]

_METRIC_INTERVAL_S = 1.0


class Session:
    """A run from its beginning or its last interruption to its end or its next one."""

    def __init__(
        self,
        config: RunConfig,
        env: Env,
        fleet: Fleet,
        record: RunRecord,
        ownership: Ownership,
        progress: Progress,
        timings: PhaseTimings,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._env = env
        self._fleet = fleet
        self._record = record
        self._ownership = ownership
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
            self._record.storage,
            run_id=run_id,
            observation_space=self._env.observation_space,
            action_space=self._env.action_space,
            config=self._config.sink,
        )
        specs = episode_specs(self._config, run_id, self._env.tasks())
        missing = [spec for spec in specs if spec.episode_id not in sink]
        try:
            await self._play_and_finish(runner, sink, missing)
        except SinkError as error:
            raise _with_remains(error, sink, self._record.storage) from error

    async def _play_and_finish(
        self, runner: Runner, sink: TrajectorySink, specs: Sequence[EpisodeSpec]
    ) -> None:
        try:
            await self._play_all(runner, sink, specs)
        except BaseException as error:
            # A full disk fails here too; the first error is the one to tell.
            with contextlib.suppress(RolloutError):
                if isinstance(error, RunTakenOver):  # the small files are the other's
                    await asyncio.to_thread(sink.close)
                else:
                    status = "interrupted" if isinstance(error, asyncio.CancelledError) else "failed"
                    await self._finish(sink, status)
            raise
        await self._finish(sink, "finished")

    async def _play_all(self, runner: Runner, sink: TrajectorySink, specs: Sequence[EpisodeSpec]) -> None:
        left = iter(specs)
        num_workers = self._config.fleet.concurrent_episodes
        try:
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._watch())
                workers = [tasks.create_task(self._play_some(runner, sink, left)) for _ in range(num_workers)]
                await asyncio.wait(workers)
                watching.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # the others were cancelled because of it
        await self._fleet.refresh()

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
        """Keeps the progress fresh, writes the timeline, and sees to it that the run is still ours.

        Raises:
            RunTakenOver: It is not.
        """
        while True:
            await asyncio.sleep(_METRIC_INTERVAL_S)
            self._ownership.check()
            # A timeline that cannot be written now ends no run; if it still cannot be at the end, that tells.
            with contextlib.suppress(SinkError):
                await asyncio.to_thread(self._record.add_metric, self._measure())

    def _measure(self) -> dict[str, float]:
        """Looks at the fleet: a line of the timeline."""
        stats = self._fleet.stats()
        self._progress.branches = stats.branches
        self._progress.live_sandboxes = stats.live_sandboxes
        self._progress.checkpoints = stats.checkpoints
        self._progress.lost_hosts = self._fleet.num_lost_hosts
        return {
            "t_s": round(self._record.played_s + self._clock() - (self._progress.started_s or 0.0), 3),
            "live_sandboxes": stats.live_sandboxes,
            "checkpoints": stats.checkpoints,
            "checkpoint_bytes": stats.checkpoint_bytes,
            "branches": self._record.num_branches + stats.branches,
            "failed_branches": self._record.num_failed_branches + stats.failed_branches,
            "rss_bytes": stats.rss_bytes + psutil.Process().memory_info().rss,
        }

    async def _finish(self, sink: TrajectorySink, status: str) -> None:
        await asyncio.to_thread(sink.close)
        stats, progress = self._fleet.stats(), self._progress
        progress.finished_s = self._clock()
        duration_s = progress.finished_s - (progress.started_s or 0.0)
        self._timings.merge(stats.timings)
        await asyncio.to_thread(self._record.add_metric, self._measure())
        await asyncio.to_thread(self._record.flush_metrics)
        await asyncio.to_thread(self._record.write_timings, self._timings)
        # Of earlier sessions, unless they were killed.
        earlier = self._record.description.get("summary", {})
        self._record.set(
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
        await asyncio.to_thread(self._record.update)


def _with_remains(error: SinkError, sink: TrajectorySink, storage: Storage) -> SinkError:
    """The error, and where the episodes are that were acknowledged and could not be committed."""
    if storage.local is not None or (left_in := sink.left_in) is None:
        return error
    return SinkError(
        f"{error.message}; what was finished is kept in {left_in} on this machine, and committed by "
        f"rollout run --resume {shlex.quote(str(storage))}"
    )


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
