"""VMMs that wait to become a checkpoint of their base, so that a fork waits for none.

Two kinds wait. Dormant ones were started ahead and have never run. Retired ones have: a sandbox that ended
left them, or they were started ahead and warmed up, so that a VMM that translates code has what the guest
runs first translated. Putting one back is far cheaper then, so they are taken first.

`Demand` is pure: it turns the recent takes of a base into the number of VMMs to keep ready. `VmmPool`
acts on it: it refills in worker threads, off the path of whoever takes.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from rollout.errors import BootError, RolloutError
from rollout.sandbox.microvm.memory import Pages
from rollout.sandbox.microvm.snapshot import RawCache, Snapshot
from rollout.sandbox.microvm.vmm import Vmm

__all__ = ["Demand", "Ready", "VmmPool", "become"]


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


@dataclass(frozen=True, slots=True)
class Ready:
    """A VMM that waits.

    Attributes:
        vmm: Dormant, or stopped.
        content: What a stopped one's memory is known to hold; None if that must be read.
    """

    vmm: Vmm
    content: Snapshot | None = None


class VmmPool:
    """The waiting VMMs of one base.

    Args:
        start: Starts one; raises `BootError`.
        demand: Decides how many to keep.
        warm_up: Lets a dormant one run and stops it; raises `RolloutError`. None where it gains nothing.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[Vmm]],
        demand: Demand,
        warm_up: Callable[[Vmm], Awaitable[None]] | None = None,
    ) -> None:
        self._start = start
        self._warm_up = warm_up
        self._demand = demand
        self._dormant: list[Ready] = []
        self._retired: list[Ready] = []
        self._refill: asyncio.Task[None] | None = None
        self._is_closed = False
        self._is_draining = False

    @property
    def num_ready(self) -> int:
        """VMMs that wait."""
        return len(self._dormant) + len(self._retired)

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
        found = None if dormant else _pop_living(self._retired)
        found = found or _pop_living(self._dormant)
        self._keep_filled()
        return found or Ready(await self._start_one())

    def give_back(self, ready: Ready) -> None:
        """Takes a VMM that its user has no more use for; ends the oldest ones that are more than enough."""
        if self._is_closed:
            ready.vmm.kill()
            return
        self._retired.append(ready)
        enough = max(self._demand.target(asyncio.get_running_loop().time()), 1)
        while self.num_ready > enough:
            waiting = self._dormant or self._retired
            waiting.pop(0).vmm.kill()

    async def drain(self) -> None:
        """Ends those that wait, and lets no more be started ahead until the next take."""
        if self._refill is not None:
            self._is_draining = True
            await asyncio.wait([self._refill])
            self._is_draining = False
        for waiting in (self._dormant, self._retired):
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
        vmm = await self._start_one()
        if self._warm_up is None:
            self._dormant.append(Ready(vmm))
            return
        try:
            await self._warm_up(vmm)
        except BaseException:
            vmm.kill()
            raise
        self._retired.append(Ready(vmm))

    async def _start_one(self) -> Vmm:
        vmm = await self._start()
        if self._is_closed:
            vmm.kill()
            raise BootError("the engine is closed")
        return vmm


def _pop_living(waiting: list[Ready]) -> Ready | None:
    """The last one that the kernel's out-of-memory killer, or somebody's hand, has not ended."""
    while waiting:
        ready = waiting.pop()
        if not ready.vmm.child.has_ended:
            return ready
        ready.vmm.kill()
    return None


def become(ready: Ready, snapshot: Snapshot, cache: RawCache, base_pages: Pages, timeout_s: float) -> None:
    """Makes a waiting VMM into a snapshot; its vCPU runs when this returns. Blocking.

    Raises:
        CheckpointError: The snapshot is damaged.
        ForkError: The VMM does not take it.
    """
    vmm, state = ready.vmm, snapshot.unpack_device_state()
    if vmm.is_dormant:
        vmm.assign(state, snapshot.page_numbers, snapshot.unpack_pages(cache, base_pages), timeout_s)
        return
    if ready.content is not None:
        numbers, pages = snapshot.changes_since(ready.content, cache, base_pages)
    else:
        private = vmm.memory.private_pages()
        numbers, pages = snapshot.changes_from(private, vmm.memory.read(private), cache, base_pages)
    vmm.rewind(state, numbers, pages, timeout_s)
