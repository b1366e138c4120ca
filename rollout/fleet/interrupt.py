"""How a signal ends a run in order: it becomes the cancellation of the task that plays it."""

from __future__ import annotations

import asyncio
import signal
from typing import Self

from rollout.errors import RolloutError

__all__ = ["RunInterrupted", "Signals"]


class RunInterrupted(RolloutError):
    """A signal ended the run before it was done; what was finished is committed."""

    boundary = "run"

    def __init__(self, message: str, by: signal.Signals) -> None:
        super().__init__(message)
        self.exit_code = 128 + by


class Signals:
    """Turns the first SIGINT or SIGTERM into the cancellation of the task that it was entered in.

    Attributes:
        received: Which one came; None as long as none did.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self.listen()
        return self

    def listen(self) -> None:
        """Takes the signals, from whoever has them."""
        for each in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(each, self._receive, each)

    def __exit__(self, *exception: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(each)

    def _receive(self, which: signal.Signals) -> None:
        if self.received is None:
            self.received = which
            self._task.cancel()
