"""How the fleet reaches one host, whatever carries the calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rollout.branch import BranchJob, BranchResult, Opening
from rollout.env import Task
from rollout.errors import CapacityError
from rollout.fleet.messages import HostInfo, HostStats, Reply
from rollout.sandbox.base import Checkpoint

__all__ = ["HostClient", "HostLostError"]


class HostLostError(CapacityError):
    """The host that a call went to is gone, with all its sandboxes and checkpoints."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)


class HostClient(Protocol):
    """How the fleet reaches one host. Every call raises `HostLostError` when its process is gone."""

    async def start(self, epoch: int) -> HostInfo:
        """See `Host.start`."""
        ...

    async def open(self, epoch: int, key: str, task: Task, seed: int) -> Reply[Opening]:
        """See `Host.open`."""
        ...

    async def run(self, epoch: int, key: str, jobs: Sequence[BranchJob]) -> Reply[list[BranchResult]]:
        """See `Host.run`."""
        ...

    async def release(self, epoch: int, checkpoints: Sequence[Checkpoint]) -> None:
        """See `Host.release`."""
        ...

    async def renew(self, epoch: int) -> HostStats:
        """See `Host.renew`."""
        ...

    async def close(self) -> None:
        """See `Host.close`."""
        ...

    def kill(self) -> None:
        """Ends its process at once. Idempotent."""
        ...
