"""What a sandbox of the inline engine needs of its engine, and what a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rollout.sandbox.base import Checkpoint, PhaseTimings
from rollout.sandbox.global_rng import GlobalState
from rollout.sandbox.inline_copy import Saved
from rollout.sandbox.inline_fidelity import Recipe, Trust
from rollout.sandbox.inline_files import FrozenFolder, ScratchFolder

if TYPE_CHECKING:
    from rollout.sandbox.inline_sandbox import InlineSandbox

__all__ = ["InlineOwner", "Record"]


@dataclass(frozen=True, slots=True)
class Record:
    """What a checkpoint holds."""

    saved: Saved
    recipe: Recipe | None
    trust: Trust | None
    globals: GlobalState | None
    folder: FrozenFolder | None


class InlineOwner(Protocol):
    """What a sandbox needs of its engine."""

    @property
    def timings(self) -> PhaseTimings:
        """Where time is counted."""
        ...

    @property
    def scratch(self) -> ScratchFolder:
        """Where folders are made."""
        ...

    def trust(self, recipe: Recipe) -> Trust:
        """How environments of a kind are copied.

        Raises:
            CheckpointError: Copies do not behave as the original.
            EnvError: The environment cannot be made a second time.
        """
        ...

    def keep(self, record: Record, parent_id: str | None) -> Checkpoint:
        """Takes in a record and names it."""
        ...

    def forget(self, sandbox: InlineSandbox) -> None:
        """A sandbox has ended."""
        ...
