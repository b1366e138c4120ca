"""Hosts in the test's own process: a whole fleet without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rollout.branch import BranchJob, BranchResult, Opening
from rollout.config import RunConfig
from rollout.env import Task
from rollout.errors import BootError
from rollout.fleet.client import HostLostError
from rollout.fleet.host import Host
from rollout.fleet.messages import HostInfo, HostStats, Reply
from rollout.sandbox.base import Checkpoint


def run_config(**fleet: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "env": {"args": {"env_id": "FrozenLake-v1"}},
            "engine": {"kind": "inline"},
            "search": {"simulations": 8, "wave": 4, "playout_horizon": 5},
            "episodes": 4,
            "fleet": {"lease_s": 60.0} | fleet,  # a lease that runs out ends the test process
        }
    )


class InProcessHost:
    """A `HostClient` of a `Host` right here, which can die, hang or refuse to start.

    Its own lease is long, whatever the fleet's is: its reaper would end the test's process.
    """

    def __init__(self, config: RunConfig, *, refuses_to_start: bool = False) -> None:
        fleet = config.fleet.model_copy(update={"lease_s": 600.0})
        self.host = Host(config.model_copy(update={"fleet": fleet}))
        self.is_dead = False
        self.is_deaf = False
        self.refuses_to_start = refuses_to_start
        self.num_runs = 0
        self.gate: asyncio.Event | None = None
        self.most_jobs = 0
        self._jobs = 0

    async def start(self, epoch: int) -> HostInfo:
        if self.refuses_to_start:
            raise BootError("no such machine")
        return await self.host.start(epoch)

    async def open(self, epoch: int, key: str, task: Task, seed: int) -> Reply[Opening]:
        await self._reach()
        return await self.host.open(epoch, key, task, seed)

    async def run(self, epoch: int, key: str, jobs: Sequence[BranchJob]) -> Reply[list[BranchResult]]:
        self.num_runs += 1
        self._jobs += len(jobs)
        self.most_jobs = max(self.most_jobs, self._jobs)
        try:
            await self._reach()
            reply = await self.host.run(epoch, key, jobs)
            await self._reach()
            return reply
        finally:
            self._jobs -= len(jobs)

    async def release(self, epoch: int, checkpoints: Sequence[Checkpoint]) -> None:
        await self._reach()
        await self.host.release(epoch, checkpoints)

    async def renew(self, epoch: int) -> HostStats:
        if self.is_deaf:
            await asyncio.Event().wait()
        await self._reach()
        return await self.host.renew(epoch)

    async def close(self) -> None:
        await self.host.close()

    def kill(self) -> None:
        self.is_dead = True

    async def _reach(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.is_dead:
            raise HostLostError("the host is gone")
