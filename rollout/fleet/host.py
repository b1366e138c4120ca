"""One host: owns an engine and its sandboxes, and carries out branch jobs that name checkpoints by id.

In a run it is an async Ray actor, one a node; nothing here imports Ray, so it can be tested as it is.

Invariants:

- Fencing: every call carries an epoch. One that is lower than the host's is refused: its sender was replaced.
  Only `start` raises the epoch, and everything of the earlier one is ended first.
- Idempotency: a mutating call carries a key. A call with a key that is known gives the first call's answer,
  also while that one is still going on.
- Back-pressure: jobs beyond `max_queued` are refused with a retryable `CapacityError`; senders wait for room
  before they send, so this is for those who do not.
- The lease: `renew` must come more often than every `lease_s`; otherwise a process of its own kills this one
  and everything that it started (see `rollout.fleet.reaper`), whatever Ray does.

Not guaranteed: that keys are known for ever; the last `REMEMBERED_CALLS` are.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from rollout.branch import BranchJob, BranchResult, Opening
from rollout.config import RunConfig
from rollout.env import Task
from rollout.errors import BootError, CapacityError
from rollout.fleet.messages import HostInfo, HostStats, Reply
from rollout.fleet.reaper import OWNER_MARK, Reaper, owned_folder, sweep
from rollout.loading import load_env
from rollout.sandbox.base import Checkpoint, Engine, PhaseTimings
from rollout.sandbox.branching import LocalBrancher
from rollout.sandbox.engines import choose_engine_kind, make_engine

__all__ = ["REMEMBERED_CALLS", "Host", "scratch_parent"]

REMEMBERED_CALLS = 1024
_MIN_SHM_BYTES = 1 << 30

T = TypeVar("T")


class Host:
    """Owns the sandboxes of one node.

    Args:
        config: The run.
        node_id: Where it is, for `HostInfo`.
        clock: Monotonic seconds.
    """

    def __init__(
        self, config: RunConfig, node_id: str = "", clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._config = config
        self._node_id = node_id
        self._clock = clock
        self._epoch = 0
        self._starting = asyncio.Lock()
        self._info: HostInfo | None = None
        self._engine: Engine | None = None
        self._brancher: LocalBrancher | None = None
        self._reaper: Reaper | None = None
        self._calls: OrderedDict[str, asyncio.Task[Any]] = OrderedDict()
        self._num_queued = 0
        self.max_queued = 4 * config.fleet.concurrent_branches + config.fleet.batch

    async def start(self, epoch: int) -> HostInfo:
        """Makes the engine and the prepared sandbox; begins the lease. Idempotent within an epoch.

        Raises:
            ConfigError: The environment cannot be imported.
            EnvError: It cannot be made.
            BootError: The engine is missing here or does not boot.
            CapacityError: A later epoch has begun.
        """
        async with self._starting:
            if epoch < self._epoch:
                raise _fenced(epoch, self._epoch)
            if epoch > self._epoch or self._info is None:
                await self._end()
                self._epoch = epoch
                try:
                    self._info = await self._begin()
                except BaseException:
                    await self._end()
                    raise
            return self._info

    async def open(self, epoch: int, key: str, task: Task, seed: int) -> Reply[Opening]:
        """Begins an episode (see `Brancher.open`)."""
        brancher = self._brancher_of(epoch)
        return await self._once(key, lambda: self._timed(brancher.open(task, seed)))

    async def run(self, epoch: int, key: str, jobs: Sequence[BranchJob]) -> Reply[list[BranchResult]]:
        """Carries out jobs (see `Brancher.run`).

        Raises:
            CapacityError: The queue is full, or the epoch is over.
        """
        brancher = self._brancher_of(epoch)
        if key not in self._calls and self._num_queued + len(jobs) > self.max_queued:
            raise CapacityError(
                f"{len(jobs)} more branch jobs do not fit the host's queue of {self.max_queued}",
                retryable=True,
            )
        return await self._once(key, lambda: self._timed(self._counted(brancher, jobs)))

    async def release(self, epoch: int, checkpoints: Sequence[Checkpoint]) -> None:
        """Frees checkpoints (see `Brancher.release`); idempotent by nature."""
        await self._brancher_of(epoch).release(checkpoints)

    async def renew(self, epoch: int) -> HostStats:
        """Renews the lease; says how the host is."""
        brancher = self._brancher_of(epoch)
        assert self._reaper is not None
        assert self._engine is not None
        self._reaper.renew()
        stats, timings = brancher.stats, self._engine.timings
        return HostStats(
            branches=stats.branches,
            failed_branches=stats.failed_branches,
            live_sandboxes=stats.live_sandboxes,
            checkpoints=stats.checkpoints,
            checkpoint_bytes=stats.checkpoint_bytes,
            evicted_checkpoints=stats.evicted_checkpoints,
            remade_checkpoints=stats.remade_checkpoints,
            rss_bytes=await asyncio.to_thread(_resident_bytes),
            timings=PhaseTimings(dict(timings.seconds), dict(timings.calls)),
            ways=dict(stats.ways),
        )

    async def close(self) -> None:
        """Ends everything and removes every file. Idempotent."""
        async with self._starting:
            await self._end()

    async def _begin(self) -> HostInfo:
        token = uuid.uuid4().hex[:12]
        parent = scratch_parent()
        sweep(parent)
        try:
            scratch = owned_folder(parent, token)
        except OSError as error:
            raise BootError.wrap(error, f"cannot make a scratch folder in {parent}") from error
        os.environ[OWNER_MARK] = token
        self._reaper = Reaper(token, [scratch], self._config.fleet.lease_s)
        config = self._config
        env = load_env(config.env)
        choice = choose_engine_kind(config.engine, config.image)
        engine_config = config.engine.model_copy(update={"kind": choice.kind})
        self._engine = make_engine(engine_config, config.image, scratch)
        self._brancher = LocalBrancher(
            self._engine,
            env,
            image=config.image.name,
            limits=config.engine,
            concurrency=config.fleet.concurrent_branches,
        )
        renewing = asyncio.create_task(self._renew_while_starting())
        try:
            prepared = await self._brancher.prepare()
        finally:
            renewing.cancel()
        return HostInfo(
            capabilities=self._engine.capabilities,
            hint=choice.hint,
            fingerprint=prepared.fingerprint,
            image_digest=prepared.image_digest,
            node_id=self._node_id,
            pid=os.getpid(),
            machine=_machine(),
            env_description=env.description,
        )

    async def _renew_while_starting(self) -> None:
        """A boot may take longer than the lease, and has a deadline of its own."""
        while self._reaper is not None:
            self._reaper.renew()
            await asyncio.sleep(self._config.fleet.lease_s / 4)

    async def _end(self) -> None:
        calls = list(self._calls.values())
        self._calls.clear()
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        self._brancher, self._info = None, None
        engine, self._engine = self._engine, None
        reaper, self._reaper = self._reaper, None
        try:
            if engine is not None:
                await engine.close()
        finally:
            if reaper is not None:
                os.environ.pop(OWNER_MARK, None)
                await asyncio.to_thread(reaper.close)

    def _brancher_of(self, epoch: int) -> LocalBrancher:
        if self._brancher is None or epoch != self._epoch:
            raise _fenced(epoch, self._epoch)
        return self._brancher

    async def _once(self, key: str, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Runs a call unless one of that key runs or ran already; a caller that goes away does not end it."""
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = asyncio.get_running_loop().create_task(make())
            while len(self._calls) > REMEMBERED_CALLS and next(iter(self._calls.values())).done():
                self._calls.popitem(last=False)
        return await asyncio.shield(call)

    async def _counted(self, brancher: LocalBrancher, jobs: Sequence[BranchJob]) -> list[BranchResult]:
        self._num_queued += len(jobs)
        try:
            return await brancher.run(jobs)
        finally:
            self._num_queued -= len(jobs)

    async def _timed(self, work: Coroutine[Any, Any, T]) -> Reply[T]:
        start_s = self._clock()
        return Reply(await work, self._clock() - start_s)


def _fenced(epoch: int, current: int) -> CapacityError:
    return CapacityError(
        f"the host serves epoch {current}, not {epoch}: the call's sender was replaced", retryable=True
    )


def scratch_parent() -> Path:
    """Memory if there is enough of it, because every branch writes there; else the temporary folder."""
    shm = Path("/dev/shm")
    if shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free >= _MIN_SHM_BYTES:
        return shm
    return Path(tempfile.gettempdir())


def _resident_bytes() -> int:
    """Resident memory of this process and all below it; shared pages count once for each."""
    total = 0
    process = psutil.Process()
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_info().rss
        except psutil.Error:
            continue  # it ended while we looked
    return total


def _machine() -> dict[str, str | int | float]:
    return {
        "host_name": platform.node(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
    }
