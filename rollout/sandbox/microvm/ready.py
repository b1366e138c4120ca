"""A VMM that waits, and how it becomes a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.sandbox.microvm.memory import Pages
from rollout.sandbox.microvm.snapshot import RawCache, Snapshot
from rollout.sandbox.microvm.vmm import Vmm

__all__ = ["Ready", "become", "settle"]


@dataclass(frozen=True, slots=True)
class Ready:
    """A VMM that waits.

    Attributes:
        vmm: Dormant, or stopped.
        content: What a stopped one's memory is known to hold; None if that must be read.
    """

    vmm: Vmm
    content: Snapshot | None = None


def settle(ready: Ready, content: Snapshot, cache: RawCache, base_pages: Pages, timeout_s: float) -> Ready:
    """Makes the memory of a stopped VMM a snapshot's, so that it can become another one sooner. Blocking.

    Nothing is done where it is known what it holds.

    Raises:
        RolloutError: The VMM is gone, or the snapshot damaged.
    """
    if ready.content is not None:
        return ready
    vmm = ready.vmm
    private = vmm.memory.private_pages()
    changes = content.changes_from(private, vmm.memory.read(private), cache, base_pages)
    vmm.change_memory(*changes, timeout_s)
    return Ready(vmm, content)


def become(
    ready: Ready,
    snapshot: Snapshot,
    cache: RawCache,
    base_pages: Pages,
    timeout_s: float,
    *,
    resume: bool = True,
) -> None:
    """Makes a waiting VMM into a snapshot. Blocking.

    Args:
        ready: It.
        snapshot: On its base.
        cache: Pages at hand.
        base_pages: Those of its base.
        timeout_s: Deadline of each step.
        resume: Let its vCPU run; one that has never run does in any case.

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
    vmm.rewind(state, numbers, pages, timeout_s, resume=resume)
