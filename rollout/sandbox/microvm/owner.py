"""What a microVM's sandbox needs of its engine, and what it gets from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from rollout.sandbox.base import Checkpoint, PhaseTimings
from rollout.sandbox.client import GuestClient
from rollout.sandbox.microvm.snapshot import Snapshot
from rollout.sandbox.microvm.vmm import Vmm
from rollout.types import Randomness

if TYPE_CHECKING:
    from rollout.sandbox.microvm.sandbox import MicroVMSandbox

__all__ = ["Owner", "Waking"]

T = TypeVar("T")


class Owner(Protocol):
    """What a sandbox needs of its engine."""

    @property
    def timings(self) -> PhaseTimings:
        """Where time goes."""
        ...

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Runs blocking work of one VMM in a worker thread."""
        ...

    async def save(self, sandbox: MicroVMSandbox, vmm: Vmm) -> Snapshot:
        """Reads a machine and makes a snapshot of it; the machine is stopped afterwards."""
        ...

    def keep(self, sandbox: MicroVMSandbox, snapshot: Snapshot) -> Checkpoint:
        """Makes a checkpoint of a snapshot."""
        ...

    async def greet(self, sandbox: MicroVMSandbox, waking: Waking, randomness: Randomness) -> None:
        """Has a machine that goes on confirm a handshake under the sandbox's identity."""
        ...

    async def revive(self, sandbox: MicroVMSandbox, snapshot: Snapshot, randomness: Randomness) -> Waking:
        """Restores a snapshot under the sandbox's identity."""
        ...

    def forget(self, sandbox: MicroVMSandbox) -> None:
        """The sandbox is dead."""
        ...

    async def make_room(self) -> None:
        """Waits for memory for a machine that goes on."""
        ...

    async def release(self, sandbox: MicroVMSandbox, waking: Waking, content: Snapshot | None) -> None:
        """Takes the machine of a dying sandbox, for another use; nothing else uses it any more."""
        ...


@dataclass(frozen=True, slots=True)
class Waking:
    """A machine that confirmed its handshake."""

    vmm: Vmm
    client: GuestClient
