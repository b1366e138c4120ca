"""What checkpoints are held, in what order they were used, and which one goes when the budget is spent.

Pure bookkeeping: it decides, and whoever owns the engine discards. A pin says that a job needs the checkpoint
now; a pinned one is never chosen for eviction, nor one that was put in as not evictable. Among the others the
least recently used goes first.

Invariants: `held_bytes` is the sum over the held checkpoints; it exceeds the budget only by what may not go;
a checkpoint that was chosen for eviction is forgotten in the same call.

Not guaranteed: that `private_bytes`, which the budget counts, is what the machine really gives up; it is what
the engine says.
"""

from __future__ import annotations

from collections import OrderedDict

from rollout.errors import CapacityError, CheckpointError
from rollout.sandbox.base import Checkpoint

__all__ = ["CheckpointStore"]


class CheckpointStore:
    """The checkpoints of one engine, within a byte budget.

    Args:
        budget_bytes: The sum of `private_bytes` to stay within.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._held: OrderedDict[str, Checkpoint] = OrderedDict()  # least recently used first
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

    def put(self, checkpoint: Checkpoint, *, evictable: bool = True, pin: bool = False) -> list[Checkpoint]:
        """Takes a checkpoint in; with `pin` as if `pin` had been called before anything is evicted.

        Returns:
            What has to go so that the budget holds; it is forgotten here, and the caller discards it. The new
            one is among them if nothing else may go.

        Raises:
            CapacityError: There is no room for one that is not evictable; nothing has changed.
        """
        if not evictable:
            fixed_bytes = sum(c.private_bytes for c in self._held.values() if not self._may_go(c.id))
            if fixed_bytes + checkpoint.private_bytes > self._budget_bytes:
                raise CapacityError(
                    f"the checkpoint budget of {self._budget_bytes} bytes is used up by checkpoints in use "
                    "or that cannot be made again; raise engine.checkpoint_budget_bytes"
                )
            self._fixed.add(checkpoint.id)
        if checkpoint.id not in self._held:
            self._held_bytes += checkpoint.private_bytes
        self._held[checkpoint.id] = checkpoint
        self._held.move_to_end(checkpoint.id)
        if pin:
            self._pins[checkpoint.id] = self._pins.get(checkpoint.id, 0) + 1
        return self._shrink()

    def get(self, checkpoint_id: str) -> Checkpoint:
        """The checkpoint of this id, which counts as a use of it.

        Raises:
            CheckpointError: It is not held: never was, released, or evicted.
        """
        try:
            self._held.move_to_end(checkpoint_id)
        except KeyError:
            raise CheckpointError(f"checkpoint {checkpoint_id} is not held") from None
        return self._held[checkpoint_id]

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
        return self._shrink()

    def evict(self, checkpoint_id: str) -> Checkpoint | None:
        """Forgets one, pinned or not, because nobody will name it again; None if it is not held."""
        checkpoint = self._held.pop(checkpoint_id, None)
        self._fixed.discard(checkpoint_id)
        if checkpoint is not None:
            self._held_bytes -= checkpoint.private_bytes
        return checkpoint

    def _may_go(self, checkpoint_id: str) -> bool:
        return checkpoint_id not in self._pins and checkpoint_id not in self._fixed

    def _shrink(self) -> list[Checkpoint]:
        excess_bytes = self._held_bytes - self._budget_bytes
        if excess_bytes <= 0:
            return []
        gone: list[Checkpoint] = []
        for checkpoint in self._held.values():
            if excess_bytes <= 0:
                break
            if self._may_go(checkpoint.id):
                gone.append(checkpoint)
                excess_bytes -= checkpoint.private_bytes
        for checkpoint in gone:
            self.evict(checkpoint.id)
        return gone
