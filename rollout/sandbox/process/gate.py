"""A gate that any number of users pass together, or one passes alone. For one event loop; not thread-safe.

Whoever wants to be alone goes first: users that come later wait until it has been.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

__all__ = ["Gate"]


class Gate:
    """Shared and exclusive use of one thing."""

    def __init__(self) -> None:
        self._num_inside = 0
        self._is_taken = False
        self._waiting: deque[tuple[bool, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def shared(self) -> AsyncGenerator[None]:
        """Goes in together with others."""
        if self._is_taken or self._waiting:
            await self._wait(alone=False)
        else:
            self._num_inside += 1
        try:
            yield
        finally:
            self._num_inside -= 1
            self._let_in()

    @asynccontextmanager
    async def alone(self) -> AsyncGenerator[None]:
        """Goes in when nobody else is inside, and keeps others out."""
        if self._is_taken or self._waiting or self._num_inside:
            await self._wait(alone=True)
        else:
            self._is_taken = True
        try:
            yield
        finally:
            self._is_taken = False
            self._let_in()

    async def _wait(self, *, alone: bool) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((alone, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # let in and cancelled at the same time
                if alone:
                    self._is_taken = False
                else:
                    self._num_inside -= 1
            self._let_in()
            raise

    def _let_in(self) -> None:
        """Lets in those at the front that may go in now, and counts them as inside."""
        while self._waiting and not self._is_taken:
            alone, turn = self._waiting[0]
            if not turn.cancelled():
                if alone and self._num_inside:
                    return
                if alone:
                    self._is_taken = True
                else:
                    self._num_inside += 1
                turn.set_result(None)
            self._waiting.popleft()
