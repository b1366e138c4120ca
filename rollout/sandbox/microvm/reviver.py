"""Brings snapshots to life, and takes machines back: what a fork and the end of a sandbox have in common.

A VMM that waits becomes the snapshot, its guest confirms a handshake, and only then is it handed out; one
that does not is killed. When its sandbox ends, the VMM waits again, stopped and emptied, unless anything
about it is in doubt.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from rollout.config import EngineConfig
from rollout.errors import ForkError, RolloutError
from rollout.sandbox.base import PhaseTimings
from rollout.sandbox.client import GuestClient
from rollout.sandbox.microvm.boot import InThread
from rollout.sandbox.microvm.limits import VmmLimits
from rollout.sandbox.microvm.owner import Waking
from rollout.sandbox.microvm.ready import Ready, become, settle
from rollout.sandbox.microvm.room import Idler, Room
from rollout.sandbox.microvm.sandbox import MicroVMSandbox
from rollout.sandbox.microvm.snapshot import RawCache, Snapshot
from rollout.sandbox.microvm.stock import Stock
from rollout.types import Randomness

__all__ = ["Reviver"]


class Reviver:
    """Makes machines of snapshots for one engine.

    Args:
        config: Deadlines and limits.
        cache: Pages at hand.
        timings: Gets the phases "start" (a VMM that waits, or a new one), "restore" (it becomes the snapshot
            for the first time), "rewind" (it becomes another) and "handshake".
        in_thread: Runs blocking work.
        idlers: All sandboxes, of which some may hibernate for others.

    Raises:
        BootError: A limit cannot be enforced here.
    """

    def __init__(
        self,
        config: EngineConfig,
        cache: RawCache,
        timings: PhaseTimings,
        in_thread: InThread,
        idlers: Callable[[], Sequence[Idler]],
    ) -> None:
        self._config = config
        self._cache = cache
        self._timings = timings
        self._in_thread = in_thread
        self._limits = VmmLimits(config)
        self._room = Room(idlers, config.memory_reserve_mib << 20, config.hibernate_after_s)
        self._retiring: set[asyncio.Task[None]] = set()
        self._is_stopping = False

    @property
    def limits(self) -> Sequence[str]:
        """Control groups that are in force, by controller."""
        return self._limits.names

    @property
    def room(self) -> Room:
        """Memory for machines."""
        return self._room

    async def revive(
        self, sandbox: MicroVMSandbox, stock: Stock, snapshot: Snapshot, randomness: Randomness
    ) -> Waking:
        """Restores a snapshot under a sandbox's identity.

        Raises:
            CapacityError: There is no memory for it.
            ForkError: No VMM could be started or took the state, or the guest did not confirm its handshake.
        """
        async with self._room.for_one():
            ready = await self._take(stock)
            if not ready.vmm.is_dormant:
                try:
                    return await self._shake_hands(sandbox, stock, ready, snapshot, randomness)
                except ForkError:  # whatever its earlier life left in it: a new one has none
                    ready = await self._take(stock, dormant=True)
            return await self._shake_hands(sandbox, stock, ready, snapshot, randomness)

    async def greet(self, sandbox: MicroVMSandbox, client: GuestClient, randomness: Randomness) -> None:
        """Has a running machine confirm a handshake under a sandbox's identity.

        Raises:
            GuestError: It did not.
        """
        begun_s = time.perf_counter()
        sandbox.generation += 1
        timeout_s = self._config.fork_timeout_s
        await client.hello(sandbox.generation, randomness, hostname=sandbox.id, timeout_s=timeout_s)
        self._timings.add("handshake", time.perf_counter() - begun_s)

    async def release(self, stock: Stock | None, waking: Waking, content: Snapshot | None) -> None:
        """Takes the machine of a sandbox that has ended.

        Args:
            stock: What it was made from; None if nobody knows, and it is killed.
            waking: The machine.
            content: What its memory is known to hold; None if it ran since.
        """
        await waking.client.close()
        if self._is_stopping or stock is None or not self._config.reuse_vmms:
            waking.vmm.kill()
            return
        retiring = asyncio.create_task(self._retire(stock, Ready(waking.vmm, content)))
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)

    async def stop(self) -> None:
        """Lets nothing hibernate or retire any more."""
        self._is_stopping = True
        await self._room.close()
        if self._retiring:
            await asyncio.wait(self._retiring)

    def close(self) -> None:
        """Removes the limits, once every VMM has ended."""
        self._limits.close()

    async def _take(self, stock: Stock, *, dormant: bool = False) -> Ready:
        begun_s = time.perf_counter()
        try:
            return await stock.pool.take(dormant=dormant)
        finally:
            self._timings.add("start", time.perf_counter() - begun_s)

    async def _shake_hands(
        self,
        sandbox: MicroVMSandbox,
        stock: Stock,
        ready: Ready,
        snapshot: Snapshot,
        randomness: Randomness,
    ) -> Waking:
        """Makes a waiting VMM into a snapshot that has confirmed its handshake; kills it if that fails."""
        vmm, timeout_s = ready.vmm, self._config.fork_timeout_s
        phase = "restore" if vmm.is_dormant else "rewind"
        begun_s = time.perf_counter()
        try:
            self._limits.put_on(vmm)
            await self._in_thread(lambda: become(ready, snapshot, self._cache, stock.pages, timeout_s))
            client = await GuestClient.connect(vmm.channel.dup())
        except BaseException:
            vmm.kill()
            raise
        self._timings.add(phase, time.perf_counter() - begun_s)
        try:
            await self.greet(sandbox, client, randomness)
        except BaseException as error:
            vmm.kill()
            await asyncio.shield(client.close())
            if isinstance(error, RolloutError):
                raise ForkError(
                    f"a clone did not confirm its handshake: {error.message}", retryable=True
                ) from error
            raise
        return Waking(vmm, client)

    async def _retire(self, stock: Stock, ready: Ready) -> None:
        timeout_s, recent = self._config.fork_timeout_s, stock.recent

        def work() -> Ready | None:
            if not ready.vmm.retire(timeout_s):
                return None
            return settle(ready, recent, self._cache, stock.pages, timeout_s)

        try:
            settled = await self._in_thread(work)
        except (RolloutError, OSError):  # it has ended, or will now
            settled = None
        if settled is not None:
            stock.pool.give_back(settled)
        else:
            ready.vmm.kill()
