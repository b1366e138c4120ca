"""Which host gets which work. Pure: no clock, no I/O; it decides, and the fleet acts.

Invariants: work that names a checkpoint goes to the host that holds it, and nowhere else, because a
checkpoint does not leave its host; other work goes to the host with the most room, and among equals to the
one that holds least; no host ever has more than `room` in flight; a checkpoint whose host is gone is gone
too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rollout.errors import CapacityError

__all__ = ["Placement"]


@dataclass(slots=True)
class _Load:
    in_flight: int = 0
    held: set[str] = field(default_factory=set[str])


class Placement:
    """Room and holdings of the hosts that serve.

    Args:
        room: Branches that one host may have in flight.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._loads: dict[str, _Load] = {}
        self._holders: dict[str, str] = {}

    @property
    def hosts(self) -> list[str]:
        """Those that serve, in the order in which they came."""
        return list(self._loads)

    @property
    def in_flight(self) -> int:
        """Branches in flight on all hosts."""
        return sum(load.in_flight for load in self._loads.values())

    def add(self, host: str) -> None:
        """A host begins to serve."""
        self._loads[host] = _Load()

    def remove(self, host: str) -> None:
        """A host is gone, with all that it held. Idempotent."""
        load = self._loads.pop(host, None)
        for checkpoint_id in load.held if load else ():
            del self._holders[checkpoint_id]

    def holder(self, checkpoint_id: str) -> str | None:
        """The host that holds a checkpoint; None if none does any more."""
        return self._holders.get(checkpoint_id)

    def place(self, checkpoint_id: str | None, n: int) -> str | None:
        """Takes room for n branches.

        Returns:
            The host, or None while there is no room for so many.

        Raises:
            CapacityError: The host that held the checkpoint is gone (`retryable`: the episode can be begun
                again), or n is more than a host ever has room for.
        """
        if n > self._room:
            raise CapacityError(f"{n} branches at once never fit a host with room for {self._room}")
        if checkpoint_id is not None:
            host = self._holders.get(checkpoint_id)
            if host is None:
                raise CapacityError(f"no host holds checkpoint {checkpoint_id} any more", retryable=True)
        else:
            host = min(self._loads, key=self._busyness, default=None)
        if host is None or self._loads[host].in_flight + n > self._room:
            return None
        self._loads[host].in_flight += n
        return host

    def _busyness(self, host: str) -> tuple[int, int, str]:
        load = self._loads[host]
        return load.in_flight, len(load.held), host

    def finish(self, host: str, n: int) -> None:
        """Gives back room for n; a host that is gone has none to give."""
        if load := self._loads.get(host):
            load.in_flight -= n

    def hold(self, checkpoint_ids: Iterable[str], host: str) -> None:
        """Checkpoints were made on a host; on one that is gone meanwhile they do not exist."""
        if load := self._loads.get(host):
            for checkpoint_id in checkpoint_ids:
                load.held.add(checkpoint_id)
                self._holders[checkpoint_id] = host

    def drop(self, checkpoint_ids: Iterable[str]) -> dict[str, list[str]]:
        """Forgets checkpoints; returns them by the host that has to free them. Unknown ones are left out."""
        by_host: dict[str, list[str]] = {}
        for checkpoint_id in checkpoint_ids:
            host = self._holders.pop(checkpoint_id, None)
            if host is not None:
                self._loads[host].held.discard(checkpoint_id)
                by_host.setdefault(host, []).append(checkpoint_id)
        return by_host
