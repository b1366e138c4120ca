"""How each checkpoint came to be, so that one that was evicted can be made again.

A checkpoint is an opening (a task and a seed) or a branch (a parent, actions, a randomness). Playing that
again gives the same state unless some randomness on the way was `unique`. Pure: who plays it again is the
brancher.

Invariant: the origin of a checkpoint keeps those of its ancestors alive, also after these were forgotten,
because a descendant may need them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from rollout.branch import BranchJob
from rollout.env import Task
from rollout.sandbox import wire
from rollout.sandbox.base import Checkpoint
from rollout.types import RngPolicy, Step, Value

__all__ = ["BranchOrigin", "Lineage", "OpeningOrigin", "Origin", "witness_of"]


@dataclass(frozen=True, slots=True)
class OpeningOrigin:
    """The beginning of an episode.

    Attributes:
        task: Which.
        seed: Of the reset.
        witness: Digest of what was observed.
        num_steps: From the reset: none.
    """

    task: Task
    seed: int
    witness: bytes | None = None
    num_steps: int = 0

    @property
    def repeatable(self) -> bool:
        """Whether it can be made again."""
        return True


@dataclass(frozen=True, slots=True)
class BranchOrigin:
    """A branch of an earlier checkpoint.

    Attributes:
        parent: How the checkpoint that it began from came to be.
        job: What was done, without its playout.
        state_hash: Digest of the state that it led to; None when it was not asked for.
        repeatable: Whether it can be made again: no `unique` randomness on the way.
        witness: Digest of what was observed, the reward and the flags included; None without an action.
        num_steps: Actions since the reset.
    """

    parent: Origin
    job: BranchJob
    state_hash: str | None
    repeatable: bool
    witness: bytes | None
    num_steps: int


Origin = OpeningOrigin | BranchOrigin


def witness_of(steps: Sequence[Step]) -> bytes | None:
    """Digest of what was observed last, with the rewards of all steps; None without steps.

    It costs less than a digest of the state, is there for every environment, and sees less.
    """
    if not steps:
        return None
    last = steps[-1]
    rewards: list[Value] = [step.reward for step in steps]
    seen = wire.pack([last.observation, rewards, last.terminated, last.truncated])
    return hashlib.blake2b(seen, digest_size=16).digest()


class Lineage:
    """The origins of the checkpoints that may still be named, and where the ones made again are now."""

    def __init__(self) -> None:
        self._origins: dict[str, Origin] = {}
        self._remade: dict[str, Checkpoint] = {}

    def record(self, checkpoint: Checkpoint, origin: Origin) -> None:
        """Records how a checkpoint came to be."""
        self._origins[checkpoint.id] = origin

    def derive(self, job: BranchJob, steps: Sequence[Step]) -> BranchOrigin | None:
        """The origin of a branch of a known checkpoint; None when that one was forgotten already."""
        parent = self._origins.get(job.checkpoint.id)
        if parent is None:
            return None
        repeatable = parent.repeatable and job.randomness.policy is not RngPolicy.UNIQUE
        state_hash = steps[-1].state_hash if steps else None
        num_steps = parent.num_steps + len(steps)
        return BranchOrigin(parent, job, state_hash, repeatable, witness_of(steps), num_steps)

    def origin(self, checkpoint_id: str) -> Origin | None:
        """How it came to be; None if unknown or forgotten."""
        return self._origins.get(checkpoint_id)

    def remade(self, checkpoint_id: str, now: Checkpoint) -> None:
        """Records that the engine now holds this state as `now`."""
        self._remade[checkpoint_id] = now

    def current(self, checkpoint: Checkpoint) -> Checkpoint:
        """The engine's own checkpoint of that state: itself unless it was made again."""
        return self._remade.get(checkpoint.id, checkpoint)

    def forget(self, checkpoint: Checkpoint) -> Checkpoint:
        """Drops what is known of it; returns what the engine holds for it."""
        self._origins.pop(checkpoint.id, None)
        return self._remade.pop(checkpoint.id, checkpoint)
