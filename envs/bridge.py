"""From Gymnasium's synchronous interface to the engines' asynchronous one: one event loop in one thread.

Invariant: all that belongs to an engine is touched by the bridge's thread alone. Any thread may call `run`,
except the bridge's own.

Not guaranteed: anything after `os.fork()` in a process that has a bridge; the thread is not in the child.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import tempfile
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from rollout.config import EngineConfig, ImageConfig
from rollout.sandbox.base import Engine
from rollout.sandbox.engines import make_engine

__all__ = ["Bridge", "SharedEngine"]

T = TypeVar("T")


class Bridge:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sandbox-bridge", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop and waits for its result; an interrupt of the wait cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            if not future.done():
                future.cancel()
                concurrent.futures.wait([future])
            raise

    def close(self) -> None:
        """Ends the thread; nothing may be running on the loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class SharedEngine:
    """An engine on a bridge, with a count of the environments that use it; closed with the last of them.

    Args:
        engine: Its settings.
        image: The guest image, for microVMs.

    Raises:
        BootError: This machine lacks what the engine needs.
    """

    def __init__(self, engine: EngineConfig, image: ImageConfig) -> None:
        self.image = image.name
        self._num_users = 1
        self._lock = threading.Lock()
        self._scratch = tempfile.TemporaryDirectory(prefix="rollout-", ignore_cleanup_errors=True)
        self._bridge = Bridge()
        try:
            self.engine = self.run(_make(engine, image, Path(self._scratch.name)))
        except BaseException:
            self._bridge.close()
            self._scratch.cleanup()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the engine's loop."""
        return self._bridge.run(work)

    def retain(self) -> None:
        """Counts one more user."""
        with self._lock:
            self._num_users += 1

    def release(self) -> None:
        """Counts one user less; the last one closes the engine."""
        with self._lock:
            self._num_users -= 1
            if self._num_users:
                return
        try:
            self.run(self.engine.close())
        finally:
            self._bridge.close()
            self._scratch.cleanup()


async def _make(engine: EngineConfig, image: ImageConfig, scratch_dir: Path) -> Engine:
    return make_engine(engine, image, scratch_dir)
