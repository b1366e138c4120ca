"""A VMM that waits, and how it becomes a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.sandbox.microvm.memory import Pages
from rollout.sandbox.microvm.snapshot import RawCache, Snapshot
from rollout.sandbox.microvm.vmm import Vmm

__all__ = ["Ready", "become"]


@dataclass(frozen=True, slots=True)
class Ready:
    """A VMM that waits.

    Attributes:
        vmm: Dormant, or stopped.
        content: What a stopped one's memory is known to hold; None if that must be read.
    """

    vmm: Vmm
    content: Snapshot | None = None


def become(ready: Ready, snapshot: Snapshot, cache: RawCache, base_pages: Pages, timeout_s: float) -> None:
    """Makes a waiting VMM into a snapshot; its vCPU runs when this returns. Blocking.

    Raises:
        CheckpointError: The snapshot is damaged.
        ForkError: The VMM does not take it.
    """
    vmm, state = ready.vmm, snapshot.unpack_device_state()
    if vmm.is_dormant:
        vmm.assign(state, snapshot.page_numbers, snapshot.unpack_pages(cache, base_pages), timeout_s)
        return
    if ready.content is not None:
        numbers, pages = snapshot.changes_since(ready.content, cache, base_pages)
    else:
        private = vmm.memory.private_pages()
        numbers, pages = snapshot.changes_from(private, vmm.memory.read(private), cache, base_pages)
    vmm.rewind(state, numbers, pages, timeout_s)
