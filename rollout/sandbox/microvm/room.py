"""Keeps memory for the next machine: whoever has been idle for long, or longest, hibernates.

A parked machine costs no CPU but its memory. It is hibernated after an idle time, and earlier when the host's
memory runs short, the least recently used first. A hibernated machine comes back with its next request, so
nobody notices but by the time that it takes.

`choose` is pure; `Room` acts on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from rollout.errors import CapacityError, RolloutError

__all__ = ["MACHINE_BYTES", "Idler", "Room", "available_bytes", "choose"]

MACHINE_BYTES = 32 << 20
"""What one more machine is counted with, before it has grown to its size."""
_LOOK_S = 1.0
_STALE_S = 0.05
_PATIENCE_S, _RETRY_S = 10.0, 0.05
_CGROUP = Path("/sys/fs/cgroup")


class Idler(Protocol):
    """As much of a sandbox as matters here."""

    last_used_s: float

    @property
    def state(self) -> str:
        """`running`, `parked`, `hibernated` or `dead`."""
        ...

    async def hibernate_if_parked(self) -> bool:
        """Frees its memory, unless it is being used again; whether it did."""
        ...


def choose(idlers: Iterable[Idler], now_s: float, after_s: float | None, num_wanted: int) -> list[Idler]:
    """Who hibernates: every parked one idle for `after_s`, and in any case the `num_wanted` longest idle."""
    parked = sorted((one for one in idlers if one.state == "parked"), key=lambda one: one.last_used_s)
    overdue = 0 if after_s is None else sum(now_s - one.last_used_s >= after_s for one in parked)
    return parked[: max(overdue, num_wanted)]


def available_bytes() -> int:
    """Memory that can still be used, by the machine's count or the control group's, whichever is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    [available_kib] = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min(available_kib << 10, *_group_headrooms(), 1 << 62)


def _group_headrooms() -> Sequence[int]:
    """What this process's control groups still let it take; the cache that the kernel would drop is free."""
    found: list[int] = []
    for mount, limit, usage, cache in (
        (_CGROUP, "memory.max", "memory.current", "inactive_file"),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for group in {mount / _own_group(mount), mount}:
            with contextlib.suppress(OSError, ValueError):  # not mounted, the root group, or "max"
                used_bytes = int((group / usage).read_text()) - _counter(group / "memory.stat", cache)
                found.append(int((group / limit).read_text()) - used_bytes)
    return found


def _own_group(mount: Path) -> str:
    """This process's group below a mount of memory groups, as its control group namespace names it."""
    controllers = "memory" if mount != _CGROUP else ""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controllers in names.split(","):
            return path.strip("/")
    return ""


def _counter(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


class Room:
    """Memory for machines.

    Args:
        idlers: All sandboxes.
        reserve_bytes: Memory that stays available.
        after_s: Idle time after which a sandbox hibernates; None for never.
        available: Memory that is available now, in bytes.
    """

    def __init__(
        self,
        idlers: Callable[[], Sequence[Idler]],
        reserve_bytes: int,
        after_s: float | None,
        *,
        available: Callable[[], int] = available_bytes,
    ) -> None:
        self._idlers = idlers
        self._reserve_bytes = reserve_bytes
        self._after_s = after_s
        self._available = available
        self._num_coming = 0
        self._making = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self._looked_at_s, self._seen_bytes = -math.inf, 0
        self._num_made_since = 0

    @asynccontextmanager
    async def for_one(self) -> AsyncGenerator[None]:
        """Holds memory for one more machine while it is made.

        Raises:
            CapacityError: There is none, and nobody left who could hibernate.
        """
        if self._watch is None:
            self._watch = asyncio.create_task(self._keep_watch())
        if self._seems_short(self._num_coming + 1):
            async with self._making:
                await self._make(self._num_coming + 1)
                self._num_coming += 1
        else:
            self._num_coming += 1
        self._num_made_since += 1
        try:
            yield
        finally:
            self._num_coming -= 1

    async def to_grow(self) -> None:
        """Waits, if memory is short, until there is some for a machine that goes on: it will need more.

        Raises:
            CapacityError: There is none, and nobody left who could hibernate.
        """
        if self._seems_short(0):
            async with self._making:
                await self._make(self._num_coming)

    def has_spare(self, num_bytes: int) -> bool:
        """Whether so much memory can be taken for good, and nobody has to hibernate for it."""
        return self._available() - num_bytes >= 2 * self._reserve_bytes

    async def close(self) -> None:
        """Ends the watch. Idempotent."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])

    async def _make(self, num_machines: int) -> None:
        """Hibernates until there is memory; where nobody is idle, waits for a while for somebody to be."""
        give_up_at_s = time.monotonic() + _PATIENCE_S
        while (short := self._num_short(num_machines)) > 0:
            chosen = choose(self._idlers(), asyncio.get_running_loop().time(), None, short)
            if await _hibernate_all(chosen):
                continue
            free_bytes = self._available()
            if free_bytes >= max(MACHINE_BYTES, self._reserve_bytes // 2):
                return  # less than wished for, and enough
            if time.monotonic() > give_up_at_s:
                raise CapacityError(
                    f"no memory for one more machine: {free_bytes >> 20} MiB are available, and no sandbox "
                    "is idle",
                    retryable=True,
                )
            await asyncio.sleep(_RETRY_S)

    async def _keep_watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            now_s = asyncio.get_running_loop().time()
            short = self._num_short(self._num_coming)
            await _hibernate_all(choose(self._idlers(), now_s, self._after_s, short))

    def _seems_short(self, num_machines: int) -> bool:
        """Whether memory may be missing, by a look that is at most `_STALE_S` old: a look costs 0.2 ms."""
        now_s = time.monotonic()
        if now_s - self._looked_at_s > _STALE_S:
            self._looked_at_s, self._seen_bytes = now_s, self._available()
            self._num_made_since = 0
        wanted_bytes = (self._num_made_since + num_machines) * MACHINE_BYTES
        return self._seen_bytes - wanted_bytes < self._reserve_bytes

    def _num_short(self, num_machines: int) -> int:
        """How many machines' memory is missing, rounded up."""
        missing_bytes = self._reserve_bytes + num_machines * MACHINE_BYTES - self._available()
        return max(0, -(-missing_bytes // MACHINE_BYTES))


async def _hibernate_all(chosen: Sequence[Idler]) -> int:
    """How many did."""
    num_done = 0
    for one in chosen:
        try:
            num_done += await one.hibernate_if_parked()
        except RolloutError:  # it has ended, and its memory is free; its next request says so
            num_done += 1
    return num_done
