"""Many hosts as one brancher: leases of room, restarts, and the pulse that keeps hosts alive.

Invariants:

- Work waits for room (back-pressure) and goes where its checkpoint is (see `rollout.fleet.placement`).
- A host that does not answer its pulse within the lease, or whose process is gone, is lost: it is killed, its
  checkpoints are gone, its calls fail with a retryable `CapacityError`, and another takes its place under a
  higher epoch. So an episode that was on it is begun again; nothing else notices.
- When a host cannot be replaced the fleet is broken: everything that waits fails with the reason.

Not guaranteed: that a host which was lost is dead at once. It is when its lease has run out; until then its
epoch keeps it from being believed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

from rollout.branch import BranchJob, BranchResult, Opening
from rollout.config import FleetConfig
from rollout.env import Task
from rollout.errors import CapacityError, RolloutError
from rollout.fleet.client import HostClient, HostLostError
from rollout.fleet.messages import HostInfo, HostStats, Reply
from rollout.fleet.placement import Placement
from rollout.sandbox.base import Checkpoint, PhaseTimings

__all__ = ["Fleet", "Lease"]

T = TypeVar("T")


PULSES_PER_LEASE = 4
LONGEST_PULSE_S = 1.0
RESTART_ATTEMPTS = 3
CLOSE_TIMEOUT_S = 20.0


@dataclass(slots=True)
class _Member:
    name: str
    number: int
    client: HostClient
    epoch: int
    stats: HostStats = field(default_factory=HostStats)


@dataclass(frozen=True, slots=True)
class Lease:
    """Room for n branches on one host, until the end of the `async with`, or until the host is lost."""

    host: str
    n: int
    member: _Member


class Fleet:
    """A `Brancher` over hosts. An async context manager: leaving it closes them.

    Args:
        config: How many hosts, how much room on each, and the lease.
        make_clients: One for each node: makes the client of a new host there. Hosts are spread over them in
            turn.
        timings: Gets the seconds that calls took beyond the hosts' own work, as "ray".
        clock: Monotonic seconds.

    Attributes:
        hosts: What was started.
        broken: Why the fleet cannot go on; None while it can.
        num_lost_hosts: Hosts that died or fell silent.
    """

    def __init__(
        self,
        config: FleetConfig,
        make_clients: Sequence[Callable[[], HostClient]],
        *,
        timings: PhaseTimings | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config = config
        self._make_clients = make_clients
        self._timings = timings or PhaseTimings()
        self._clock = clock
        self._placement = Placement(2 * config.concurrent_branches)
        self._members: dict[str, _Member] = {}
        self._changed = asyncio.Condition()
        self._background: set[asyncio.Task[None]] = set()
        self._epoch = 0
        self._retired = HostStats()
        self.broken: RolloutError | None = None
        self.hosts: list[HostInfo] = []
        self._is_draining = False
        self.num_lost_hosts = 0

    async def start(self) -> list[HostInfo]:
        """Starts all hosts.

        Raises:
            RolloutError: One cannot start: nothing is left of the others.
        """
        starting = [asyncio.ensure_future(self._start_host(number)) for number in range(self._config.hosts)]
        try:
            self.hosts = [await future for future in starting]
            return self.hosts
        except BaseException:
            for future in starting:
                future.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            await self.close()
            raise

    async def open(self, task: Task, seed: int) -> Opening:
        """Begins an episode on the host with the most room."""
        async with self.lease(None, 1) as lease:
            member = lease.member
            call = member.client.open(member.epoch, uuid.uuid4().hex, task, seed)
            opening = await self._call(member, call)
            self._placement.hold([opening.checkpoint.id], lease.host)
            return opening

    async def run(self, jobs: Sequence[BranchJob]) -> list[BranchResult]:
        """Carries out jobs on the hosts that hold their checkpoints, in batches.

        Raises:
            CapacityError: A host was lost; jobs of other hosts were carried out and nothing of them is kept.
        """
        batches = self._batches(jobs)
        if len(batches) == 1:
            return await self._run_batch(jobs)
        running = [asyncio.ensure_future(self._run_batch([jobs[i] for i in batch])) for batch in batches]
        try:
            done = await asyncio.gather(*running, return_exceptions=True)
        except asyncio.CancelledError:
            for future in running:
                future.cancel()
            raise
        results: dict[int, BranchResult] = {}
        errors: list[BaseException] = []
        for batch, outcome in zip(batches, done, strict=True):
            if isinstance(outcome, BaseException):
                errors.append(outcome)
            else:
                results.update(zip(batch, outcome, strict=True))
        if errors:
            await self.release([r.checkpoint for r in results.values() if r.checkpoint is not None])
            raise errors[0]
        return [results[i] for i in range(len(jobs))]

    async def release(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Frees checkpoints; those of hosts that are gone are free already. Idempotent."""
        by_id = {checkpoint.id: checkpoint for checkpoint in checkpoints}
        for host, ids in self._placement.drop(by_id).items():
            member = self._members[host]
            with contextlib.suppress(CapacityError):  # the host is lost, and the checkpoints with it
                await member.client.release(member.epoch, [by_id[i] for i in ids])

    @contextlib.asynccontextmanager
    async def lease(self, checkpoint: Checkpoint | None, n: int) -> AsyncGenerator[Lease]:
        """Waits for room for n branches, on the host that holds the checkpoint or on any.

        Raises:
            CapacityError: The host that held it is gone, or the fleet is draining.
            RolloutError: The fleet is broken: why.
        """
        checkpoint_id = checkpoint.id if checkpoint is not None else None
        async with self._changed:
            while True:
                if self.broken is not None:
                    raise self.broken
                if self._is_draining:
                    raise CapacityError("the fleet is draining: it takes no more work")
                host = self._placement.place(checkpoint_id, n)
                if host is not None:
                    break
                await self._changed.wait()
        try:
            yield Lease(host, n, self._members[host])
        finally:
            self._placement.finish(host, n)
            await self._notify()

    def stats(self) -> HostStats:
        """The sum over all hosts as of their last pulse; counts include hosts that were lost."""
        total = self._retired
        for member in self._members.values():
            total = total.plus(member.stats)
        return total

    async def refresh(self) -> None:
        """Asks every host how it is, now; one that does not answer keeps its last word."""
        for member in list(self._members.values()):
            with contextlib.suppress(CapacityError):
                member.stats = await member.client.renew(member.epoch)

    async def drain(self) -> None:
        """Takes no more work and waits until what is in flight is done."""
        async with self._changed:
            self._is_draining = True
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._placement.in_flight == 0)

    async def close(self) -> None:
        """Closes every host, and kills those that do not answer. Idempotent."""
        background = list(self._background)
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        members = list(self._members.values())
        self._members.clear()
        await asyncio.gather(*(self._close_member(member) for member in members))

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _batches(self, jobs: Sequence[BranchJob]) -> list[list[int]]:
        """Indices of jobs that go in one call: of one holder, and no more than a call takes."""
        most = min(self._config.batch, 2 * self._config.concurrent_branches)
        batches: dict[tuple[str | None, int], list[int]] = {}
        counts: dict[str | None, int] = {}
        for index, job in enumerate(jobs):
            host = self._placement.holder(job.checkpoint.id)
            number = counts.get(host, 0)
            counts[host] = number + 1
            batches.setdefault((host, number // most), []).append(index)
        return list(batches.values())

    async def _run_batch(self, jobs: Sequence[BranchJob]) -> list[BranchResult]:
        async with self.lease(jobs[0].checkpoint, len(jobs)) as lease:
            member = lease.member
            results = await self._call(member, member.client.run(member.epoch, uuid.uuid4().hex, jobs))
            made = [result.checkpoint.id for result in results if result.checkpoint is not None]
            self._placement.hold(made, lease.host)
            return results

    async def _call(self, member: _Member, call: Coroutine[Any, Any, Reply[T]]) -> T:
        start_s = self._clock()
        try:
            reply = await call
        except HostLostError:
            await self._lose(member)
            raise
        self._timings.add("ray", max(0.0, self._clock() - start_s - reply.duration_s))
        return reply.value

    # Hosts: starting, pulse, loss

    async def _start_host(self, number: int) -> HostInfo:
        self._epoch += 1
        member = _Member(
            f"host-{number}.{self._epoch}",
            number,
            self._make_clients[number % len(self._make_clients)](),
            self._epoch,
        )
        self._members[member.name] = member
        try:
            info = await member.client.start(member.epoch)
        except BaseException:
            del self._members[member.name]
            await self._close_member(member)
            raise
        self._placement.add(member.name)
        self._in_background(self._pulse(member))
        await self._notify()
        return info

    async def _pulse(self, member: _Member) -> None:
        """Renews a host's lease until it does not answer."""
        while True:
            try:
                async with asyncio.timeout(self._config.lease_s):
                    member.stats = await member.client.renew(member.epoch)
            except (CapacityError, TimeoutError):
                await self._lose(member)
                return
            await asyncio.sleep(min(LONGEST_PULSE_S, self._config.lease_s / PULSES_PER_LEASE))

    async def _lose(self, member: _Member) -> None:
        """A host is gone: its work fails, and another takes its place. Idempotent."""
        if self._members.pop(member.name, None) is None:
            return
        self.num_lost_hosts += 1
        self._retired = self._retired.plus(member.stats.counts_only())
        self._placement.remove(member.name)
        member.client.kill()
        self._in_background(self._replace(member.number))
        await self._notify()

    async def _replace(self, number: int) -> None:
        error: RolloutError | None = None
        for _ in range(RESTART_ATTEMPTS):
            try:
                await self._start_host(number)
                return
            except RolloutError as failed:
                error = failed
        self.broken = error
        await self._notify()

    async def _close_member(self, member: _Member) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await member.client.close()
        except (CapacityError, TimeoutError):
            pass  # it is gone or hangs; either way it is killed, and its reaper cleans up behind it
        finally:
            member.client.kill()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
