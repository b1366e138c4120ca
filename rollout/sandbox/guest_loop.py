"""A loop of one thread over descriptors and timers: what the guest agent runs on.

Not asyncio: the process must be able to fork between two events and go on in the child, which needs a loop
without threads, wake-up pipes or hidden state.
"""

from __future__ import annotations

import heapq
import selectors
import time
from collections.abc import Callable
from typing import cast

__all__ = ["Loop", "Timer"]


class Timer:
    """A callback at a time of the monotonic clock, unless it is cancelled before."""

    __slots__ = ("callback", "when_s")

    def __init__(self, when_s: float, callback: Callable[[], None]) -> None:
        self.when_s = when_s
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Takes it back. Idempotent."""
        self.callback = None

    def __lt__(self, other: Timer) -> bool:
        return self.when_s < other.when_s


class Loop:
    """Calls back when descriptors are ready or times have come, until it is stopped."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[Timer] = []
        self._running = True

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Calls back with the ready events of a descriptor; watching it again replaces what was."""
        key = self._selector.get_map().get(fd)
        if key is None:
            self._selector.register(fd, events, callback)
        elif key.events != events or key.data != callback:
            self._selector.modify(fd, events, callback)

    def unwatch(self, fd: int) -> None:
        """Ends a watch; nothing happens if there is none."""
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def call_at(self, when_s: float, callback: Callable[[], None]) -> Timer:
        """Calls back once at a time of `time.monotonic`."""
        timer = Timer(when_s, callback)
        heapq.heappush(self._timers, timer)
        return timer

    def fileno(self) -> int:
        """The loop's own descriptor."""
        return cast("selectors.EpollSelector", self._selector).fileno()

    @property
    def is_running(self) -> bool:
        """`stop` has not been called."""
        return self._running

    def run(self) -> None:
        """Runs until `stop`."""
        while self._running:
            selector = self._selector
            for key, events in selector.select(self._wait_s()):
                if selector is not self._selector:
                    break  # this is a forked child, and these events were the parent's
                if key.fd in selector.get_map():  # an earlier callback may have ended this watch
                    key.data(events)
            if self._timers:
                self._run_timers()

    def stop(self) -> None:
        """Ends `run` after the callbacks of this moment."""
        self._running = False

    def restart(self) -> None:
        """Forgets all watches and timers and runs on: for the child of a fork, whose parent keeps them."""
        self._selector.close()  # this process's copy of the descriptor
        self._selector = selectors.DefaultSelector()
        self._timers.clear()
        self._running = True

    def close(self) -> None:
        """Frees the selector; the descriptors are their owners'."""
        self._selector.close()

    def _wait_s(self) -> float | None:
        while self._timers and self._timers[0].callback is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0].when_s - time.monotonic()) if self._timers else None

    def _run_timers(self) -> None:
        now_s = time.monotonic()
        while self._timers and self._timers[0].when_s <= now_s:
            callback = heapq.heappop(self._timers).callback
            if callback is not None:
                callback()
