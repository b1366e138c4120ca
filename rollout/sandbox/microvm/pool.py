"""Dormant VMMs: started ahead on a base, so that a fork waits for none.

`Demand` is pure: it turns the recent takes of a base into the number of VMMs to keep ready. `DormantPool`
acts on it: it refills in worker threads, off the path of whoever takes.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from rollout.errors import BootError
from rollout.sandbox.microvm.vmm import Vmm

__all__ = ["Demand", "DormantPool"]


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


class DormantPool:
    """The dormant VMMs of one base.

    Args:
        start: Starts one; raises `BootError`.
        demand: Decides how many to keep.
    """

    def __init__(self, start: Callable[[], Awaitable[Vmm]], demand: Demand) -> None:
        self._start = start
        self._demand = demand
        self._ready: list[Vmm] = []
        self._refill: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def num_ready(self) -> int:
        """VMMs that wait."""
        return len(self._ready)

    def announce(self, n: int) -> None:
        """Says that n are about to be taken at once."""
        self._demand.note_take(asyncio.get_running_loop().time(), n)

    async def take(self) -> Vmm:
        """A dormant VMM: a ready one that still lives, or one started now. The caller owns it.

        Raises:
            BootError: It could not be started.
        """
        vmm: Vmm | None = None
        while self._ready and vmm is None:
            candidate = self._ready.pop()
            if candidate.child.has_ended:  # the kernel's out-of-memory killer, or somebody's hand
                discard(candidate)
            else:
                vmm = candidate
        self._keep_filled()
        return vmm if vmm is not None else await self._start_one()

    async def close(self) -> None:
        """Ends the dormant ones. Idempotent."""
        self._is_closed = True
        if self._refill is not None:
            await self._refill
        while self._ready:
            discard(self._ready.pop())

    def _keep_filled(self) -> None:
        if self._is_closed or (self._refill is not None and not self._refill.done()):
            return
        if len(self._ready) < self._demand.target(asyncio.get_running_loop().time()):
            self._refill = asyncio.create_task(self._fill())

    async def _fill(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._is_closed and len(self._ready) < self._demand.target(loop.time()):
            try:
                self._ready.append(await self._start_one())
            except BootError:
                return  # the next take starts its own, and reports why it cannot

    async def _start_one(self) -> Vmm:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        vmm = await self._start()
        self._demand.note_start(loop.time() - begun_s)
        if self._is_closed:
            discard(vmm)
            raise BootError("the engine is closed")
        return vmm


def discard(vmm: Vmm) -> None:
    """Ends a VMM that nobody owns, channel included."""
    vmm.kill()
    vmm.channel.close()
