"""VMMs that wait to become a checkpoint of their base, so that a fork waits for none.

Three kinds wait, taken in this order. Retired ones were left by a sandbox that ended: what guests do is
translated in them, and putting one back is cheap. Warm ones were started ahead, and have what a clone does
first translated. Dormant ones were started ahead and have never run.

`Demand` is pure: it turns the recent takes of a base into the number of VMMs to keep ready. `VmmPool`
acts on it: it refills in worker threads, off the path of whoever takes.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Protocol

from rollout.errors import BootError, RolloutError
from rollout.sandbox.microvm.ready import Ready

__all__ = ["Demand", "Source", "VmmPool"]


@dataclass(slots=True)
class Demand:
    """How many VMMs to keep ready, from the takes of the last `window_s` seconds.

    Enough for what is taken while one VMM starts (Little's law: rate x start time), and for the largest
    burst seen in the window, between `low` and `high`.
    """

    low: int
    high: int
    window_s: float = 10.0
    start_s: float = 0.05
    _takes: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])

    def note_take(self, now_s: float, num_taken: int) -> None:
        """Counts VMMs that were asked for at once."""
        self._takes.append((now_s, num_taken))

    def note_start(self, duration_s: float) -> None:
        """Counts a start; the estimate moves by an eighth, as TCP's round trips do."""
        self.start_s += (duration_s - self.start_s) / 8

    def target(self, now_s: float) -> int:
        """VMMs to keep ready now."""
        while self._takes and self._takes[0][0] < now_s - self.window_s:
            self._takes.popleft()
        rate_per_s = sum(count for _, count in self._takes) / self.window_s
        burst = max((count for _, count in self._takes), default=0)
        return min(self.high, max(self.low, math.ceil(rate_per_s * self.start_s), burst))


class Source(Protocol):
    """Where VMMs come from; see `rollout.sandbox.microvm.source`. All raise `BootError`."""

    async def start(self) -> Ready:
        """A VMM, as soon as there can be one."""
        ...

    async def start_ahead(self) -> Ready:
        """A VMM that costs its user as little as possible; raises other `RolloutError`, too."""
        ...

    async def start_dormant(self) -> Ready:
        """A VMM that has never run."""
        ...


class VmmPool:
    """The waiting VMMs of one base.

    Args:
        source: Where they come from.
        demand: Decides how many to keep.
    """

    def __init__(self, source: Source, demand: Demand) -> None:
        self._source = source
        self._demand = demand
        self._dormant: list[Ready] = []
        self._warm: list[Ready] = []
        self._retired: list[Ready] = []
        self._refill: asyncio.Task[None] | None = None
        self._is_closed = False
        self._is_draining = False

    @property
    def num_ready(self) -> int:
        """VMMs that wait."""
        return len(self._dormant) + len(self._warm) + len(self._retired)

    def announce(self, n: int) -> None:
        """Says that n are about to be taken at once."""
        self._demand.note_take(asyncio.get_running_loop().time(), n)

    async def take(self, *, dormant: bool = False) -> Ready:
        """A waiting VMM that still lives, or one started now. The caller owns it.

        Args:
            dormant: Only one that has never run.

        Raises:
            BootError: It could not be started.
        """
        found = None if dormant else _pop_living(self._retired) or _pop_living(self._warm)
        found = found or _pop_living(self._dormant)
        if found is None:  # before others are started ahead, which would take their turn first
            found = await self._held(self._source.start_dormant() if dormant else self._source.start())
        self._keep_filled()
        return found

    def give_back(self, ready: Ready) -> None:
        """Takes a VMM that its user has no more use for; ends the oldest ones that are more than enough."""
        if self._is_closed:
            ready.vmm.kill()
            return
        self._retired.append(ready)
        enough = max(self._demand.target(asyncio.get_running_loop().time()), 1)
        while self.num_ready > enough:
            waiting = self._dormant or self._warm or self._retired
            waiting.pop(0).vmm.kill()

    async def drain(self) -> None:
        """Ends those that wait, and lets no more be started ahead until the next take."""
        if self._refill is not None:
            self._is_draining = True
            await asyncio.wait([self._refill])
            self._is_draining = False
        for waiting in (self._dormant, self._warm, self._retired):
            while waiting:
                waiting.pop().vmm.kill()

    async def close(self) -> None:
        """Ends those that wait. Idempotent."""
        self._is_closed = True
        await self.drain()

    def _keep_filled(self) -> None:
        if self._is_closed or (self._refill is not None and not self._refill.done()):
            return
        if self.num_ready < self._demand.target(asyncio.get_running_loop().time()):
            self._refill = asyncio.create_task(self._fill())

    async def _fill(self) -> None:
        loop = asyncio.get_running_loop()
        while not (self._is_closed or self._is_draining) and self.num_ready < self._demand.target(
            loop.time()
        ):
            begun_s = loop.time()
            try:
                await self._start_ahead()
            except RolloutError:
                return  # the next take starts its own, and reports why it cannot
            self._demand.note_start(loop.time() - begun_s)

    async def _start_ahead(self) -> None:
        ready = await self._held(self._source.start_ahead())
        (self._dormant if ready.vmm.is_dormant else self._warm).append(ready)

    async def _held(self, starting: Awaitable[Ready]) -> Ready:
        """What is being started, unless nobody may have it any more."""
        ready = await starting
        if self._is_closed:
            ready.vmm.kill()
            raise BootError("the engine is closed")
        return ready


def _pop_living(waiting: list[Ready]) -> Ready | None:
    """The last one that the kernel's out-of-memory killer, or somebody's hand, has not ended."""
    while waiting:
        ready = waiting.pop()
        if not ready.vmm.child.has_ended:
            return ready
        ready.vmm.kill()
    return None
