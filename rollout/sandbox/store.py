"""What checkpoints are held, what each is worth, and which one goes when the budget is spent.

Pure bookkeeping: it decides, and whoever owns the engine discards. A pin says that a job needs the checkpoint
now; a pinned one is never chosen for eviction, nor one that was put in as not evictable. Among the others the
one of the least worth goes first (GreedyDual-Size-Frequency, Cherkasova 1998): its uses so far, because a
search comes back to where it often was, times the seconds to make it again, per byte, above the worth of what
went last. That last term ages what is no longer used. Of equals the least recently used goes.

Invariants: `held_bytes` is the sum over the held checkpoints; it exceeds the budget only by what may not go;
a checkpoint that was chosen for eviction is forgotten in the same call.

Not guaranteed: that `private_bytes`, which the budget counts, is what the machine really gives up; it is what
the engine says.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from rollout.errors import CapacityError, CheckpointError
from rollout.sandbox.base import Checkpoint

__all__ = ["CheckpointStore"]


@dataclass(slots=True)
class _Entry:
    checkpoint: Checkpoint
    rebuild_s: float
    num_uses: int = 1
    worth: float = 0.0
    tick: int = 0


class CheckpointStore:
    """The checkpoints of one engine, within a byte budget.

    Args:
        budget_bytes: The sum of `private_bytes` to stay within.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._held: dict[str, _Entry] = {}
        self._queue: list[tuple[float, int, str]] = []
        """Heap of worths; passes over what is stale, pinned or gone. A use and the end of a pin add anew."""
        self._floor = 0.0
        self._tick = 0
        self._pins: dict[str, int] = {}
        self._fixed: set[str] = set()
        self._held_bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, checkpoint_id: object) -> bool:
        return checkpoint_id in self._held

    @property
    def held_bytes(self) -> int:
        """The sum of `private_bytes` of what is held."""
        return self._held_bytes

    def put(
        self, checkpoint: Checkpoint, *, evictable: bool = True, pin: bool = False, rebuild_s: float = 0.0
    ) -> list[Checkpoint]:
        """Takes a checkpoint in; with `pin` as if `pin` had been called before anything is evicted.

        Args:
            checkpoint: Which.
            evictable: Whether it can be made again.
            pin: Whether it is needed now.
            rebuild_s: What making it again would take, in seconds.

        Returns:
            What has to go so that the budget holds; it is forgotten here, and the caller discards it. The new
            one is among them if nothing else may go.

        Raises:
            CapacityError: There is no room for one that is not evictable; nothing has changed.
        """
        if not evictable:
            fixed_bytes = sum(
                entry.checkpoint.private_bytes for id, entry in self._held.items() if not self._may_go(id)
            )
            if fixed_bytes + checkpoint.private_bytes > self._budget_bytes:
                raise CapacityError(
                    f"the checkpoint budget of {self._budget_bytes} bytes is used up by checkpoints in use "
                    "or that cannot be made again; raise engine.checkpoint_budget_bytes"
                )
            self._fixed.add(checkpoint.id)
        if checkpoint.id not in self._held:
            self._held_bytes += checkpoint.private_bytes
        self._held[checkpoint.id] = entry = _Entry(checkpoint, rebuild_s)
        self._queue_again(entry)
        if pin:
            self._pins[checkpoint.id] = self._pins.get(checkpoint.id, 0) + 1
        return self._shrink()

    def get(self, checkpoint_id: str) -> Checkpoint:
        """The checkpoint of this id, which counts as a use of it.

        Raises:
            CheckpointError: It is not held: never was, released, or evicted.
        """
        entry = self._held.get(checkpoint_id)
        if entry is None:
            raise CheckpointError(f"checkpoint {checkpoint_id} is not held")
        entry.num_uses += 1
        self._queue_again(entry)
        return entry.checkpoint

    def pin(self, checkpoint_id: str) -> Checkpoint:
        """`get`, and keeps it from eviction until a matching `unpin`.

        Raises:
            CheckpointError: It is not held.
        """
        checkpoint = self.get(checkpoint_id)
        self._pins[checkpoint_id] = self._pins.get(checkpoint_id, 0) + 1
        return checkpoint

    def unpin(self, checkpoint_id: str) -> list[Checkpoint]:
        """Takes back one `pin`; more of them than pins is an error of the caller.

        Returns:
            What has to go now, as from `put`.

        Raises:
            CheckpointError: It is not pinned.
        """
        pins = self._pins.get(checkpoint_id, 0)
        if pins == 0:
            raise CheckpointError(f"checkpoint {checkpoint_id} is not pinned")
        if pins > 1:
            self._pins[checkpoint_id] = pins - 1
            return []
        del self._pins[checkpoint_id]
        if (entry := self._held.get(checkpoint_id)) is not None:
            heapq.heappush(self._queue, (entry.worth, entry.tick, checkpoint_id))
        return self._shrink()

    def evict(self, checkpoint_id: str) -> Checkpoint | None:
        """Forgets one, pinned or not, because nobody will name it again; None if it is not held."""
        entry = self._held.pop(checkpoint_id, None)
        self._fixed.discard(checkpoint_id)
        if entry is None:
            return None
        self._held_bytes -= entry.checkpoint.private_bytes
        return entry.checkpoint

    def may_go(self, checkpoint_id: str) -> bool:
        """Whether it is held, evictable and not pinned."""
        return checkpoint_id in self._held and self._may_go(checkpoint_id)

    def _may_go(self, checkpoint_id: str) -> bool:
        return checkpoint_id not in self._pins and checkpoint_id not in self._fixed

    def _queue_again(self, entry: _Entry) -> None:
        """It was used now: it is worth that much above what went last."""
        self._tick += 1
        entry.tick = self._tick
        gain = entry.num_uses * entry.rebuild_s / max(1, entry.checkpoint.private_bytes)
        entry.worth = self._floor + gain
        if len(self._queue) > 2 * len(self._held) + 64:  # mostly stale
            self._queue = [(held.worth, held.tick, id) for id, held in self._held.items()]
            heapq.heapify(self._queue)
        else:
            heapq.heappush(self._queue, (entry.worth, entry.tick, entry.checkpoint.id))

    def _shrink(self) -> list[Checkpoint]:
        gone: list[Checkpoint] = []
        while self._held_bytes > self._budget_bytes and self._queue:
            worth, tick, checkpoint_id = heapq.heappop(self._queue)
            entry = self._held.get(checkpoint_id)
            if entry is None or entry.tick != tick or not self._may_go(checkpoint_id):
                continue
            self._floor = max(self._floor, worth)
            self.evict(checkpoint_id)
            gone.append(entry.checkpoint)
        return gone
