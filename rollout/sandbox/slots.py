"""Room for a fixed number of things, given out several at a time, in the order of asking.

Unlike a semaphore that is taken n times, `take(n)` waits for all n at once, so two callers can never hold a
part each and wait for the other's.
"""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["Slots"]


class Slots:
    """A counter of what is free; whoever wants n waits in line until n are.

    Args:
        free: How many there are; a `take` of more would wait for ever.
    """

    def __init__(self, free: int) -> None:
        self._free = free
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def num_free(self) -> int:
        """How many can be taken at once by somebody who is first in line."""
        return self._free

    @property
    def num_waiting(self) -> int:
        """How many are asked for by those who wait."""
        return sum(wanted for wanted, _ in self._line)

    async def take(self, n: int) -> None:
        """Waits for n and takes them; taken back if it is cancelled."""
        if not self._line and self._free >= n:
            self._free -= n
            return
        turn = asyncio.get_running_loop().create_future()
        self._line.append((n, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # granted and cancelled in the same tick
                self.give_back(n)
            else:
                self._line = deque(entry for entry in self._line if entry[1] is not turn)
                self.give_back(0)  # what was too little for this one may do for the next
            raise

    def give_back(self, n: int) -> None:
        """Frees n and serves who waits, first come first."""
        self._free += n
        while self._line and self._line[0][0] <= self._free:
            wanted, turn = self._line.popleft()
            if not turn.cancelled():
                self._free -= wanted
                turn.set_result(None)
