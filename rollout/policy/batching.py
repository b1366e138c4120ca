"""A queue that makes one call of many requests: so many trees share one call of a model.

Who is going to ask says so (`client`); a call is made as soon as every client waits for an answer, or enough
items wait, or the first of them has waited for `max_wait_s`. One call is made at a time; what comes meanwhile
makes up the next.

Invariants: every request gets its own answers, in its own order; an error of the call is raised in each
request that was part of it, and in no other; a request that is cancelled takes nothing from the others.

Not guaranteed: what a call is made up of, which depends on timing. A model whose answer for an item depends
on what else is in the batch gives answers that a seed does not fix.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from rollout.errors import PolicyError

__all__ = ["BatchQueue"]

T = TypeVar("T")
R = TypeVar("R")

_Request = tuple[list[T], "asyncio.Future[Sequence[R]]"]


class BatchQueue(Generic[T, R]):
    """Gathers items of many requests; belongs to one event loop.

    Args:
        call: Answers items: as many answers, in their order.
        max_items: A call is made once so many wait; a larger request is one call all the same.
        max_wait_s: How long the first request may wait for others.
    """

    def __init__(
        self, call: Callable[[list[T]], Awaitable[Sequence[R]]], *, max_items: int, max_wait_s: float
    ) -> None:
        self._call = call
        self._max_items = max_items
        self._max_wait_s = max_wait_s
        self._waiting: list[_Request[T, R]] = []
        self._num_items = 0
        self._num_clients = 0
        self._timer: asyncio.TimerHandle | None = None
        self._serving: asyncio.Task[None] | None = None
        self.num_calls = 0
        self.num_answered = 0

    @contextmanager
    def client(self) -> Generator[None]:
        """Says that the caller will ask, one request at a time, until it leaves."""
        self._num_clients += 1
        try:
            yield
        finally:
            self._num_clients -= 1
            self._consider()

    async def ask(self, items: Sequence[T]) -> Sequence[R]:
        """One answer per item, in their order.

        Raises:
            PolicyError: The call gave another number of answers.
            Exception: Whatever the call raised.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Sequence[R]] = loop.create_future()
        request = (list(items), answer)
        self._waiting.append(request)
        self._num_items += len(items)
        if self._timer is None:
            self._timer = loop.call_later(self._max_wait_s, self._on_time)
        self._consider()
        try:
            return await answer
        except asyncio.CancelledError:
            if request in self._waiting:
                self._waiting.remove(request)
                self._num_items -= len(items)
                self._stop_timer_if_idle()
            raise

    def _consider(self) -> None:
        """Makes a call if there is nothing to wait for."""
        if self._waiting and (len(self._waiting) >= self._num_clients or self._num_items >= self._max_items):
            self._begin()

    def _on_time(self) -> None:
        self._timer = None
        if self._waiting:
            self._begin()

    def _begin(self) -> None:
        if self._serving is None:
            self._serving = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        """One call of all that waits now, and then of what has come meanwhile and need not wait."""
        batch, self._waiting, self._num_items = self._waiting, [], 0
        self._stop_timer_if_idle()
        try:
            await self._answer(batch)
        finally:
            for _, answer in batch:
                answer.cancel()  # of those that have no answer: this task itself was cancelled
            self._serving = None
            if self._waiting and self._timer is None:
                self._begin()  # the wait of these was over while the call was made
            else:
                self._consider()

    async def _answer(self, batch: list[_Request[T, R]]) -> None:
        items = [item for request, _ in batch for item in request]
        self.num_calls += 1
        try:
            results = await self._call(items)
            if len(results) != len(items):
                raise PolicyError(f"{len(results)} answers for {len(items)} items")
        except Exception as error:  # it is raised where the answers are waited for
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        self.num_answered += len(items)
        first = 0
        for request, answer in batch:
            if not answer.done():
                answer.set_result(results[first : first + len(request)])
            first += len(request)

    def _stop_timer_if_idle(self) -> None:
        if not self._waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None
