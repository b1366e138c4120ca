"""The branch job: the unit of work that a search sends to a host, and the contract of what carries it out.

One job: clone a checkpoint (or go on in the sandbox that was saved as it), apply actions, observe, optionally
checkpoint, optionally play out, release.
Many go in one call, and their results come back in the same order. The search that asked for them is never
on that path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rollout.env import Task
from rollout.sandbox.base import Checkpoint
from rollout.types import Failure, PlayoutRequest, PlayoutResult, Randomness, Step, Value

__all__ = ["BranchJob", "BranchResult", "Brancher", "Lookahead", "LookaheadResult", "Opening"]


@dataclass(frozen=True, slots=True)
class Lookahead:
    """A short random playout that ends in an observed state: `horizon` steps at most, drawn from `seed`.

    A playout inside the guest is one call, whatever its length; here each step is one, because what a model
    values is an observation.

    Attributes:
        horizon: Steps at most.
        seed: Of the actions.
        discount: Of rewards.
        begin: Where it begins, for a job without actions of its own, which observes nothing.
    """

    horizon: int
    seed: int
    discount: float = 1.0
    begin: Step | None = None


@dataclass(frozen=True, slots=True)
class LookaheadResult:
    """What a lookahead came to.

    Attributes:
        value: Discounted rewards of its steps; a step without a reward counts as 0.
        num_steps: Steps played.
        last: What the environment said last.
        actions: The legal actions there; none where the episode has ended.
    """

    value: float
    num_steps: int
    last: Step
    actions: Sequence[Value]


@dataclass(frozen=True, slots=True)
class BranchJob:
    """One branch.

    Attributes:
        checkpoint: Where it begins.
        actions: Applied in order; the rest is skipped once the episode has ended.
        randomness: What the clone does with its generators before the first action.
        playout: Played after the actions, unless the episode has ended; spoils the clone, never the
            checkpoint.
        keep_checkpoint: Save the state after the actions (not after the playout).
        state_hash: Ask for the digest of the state after the last action.
        is_last: No later job will name the checkpoint, but for another attempt at one that failed: this one
            inherits the sandbox that was saved as it, if that is still there.
    """

    checkpoint: Checkpoint
    actions: tuple[Value, ...]
    randomness: Randomness
    playout: PlayoutRequest | Lookahead | None = None
    keep_checkpoint: bool = True
    state_hash: bool = False
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class BranchResult:
    """What became of a job. `failure` is set when any of its phases failed; then nothing of it is kept.

    Attributes:
        steps: One per action applied.
        checkpoint: The state after the last action; None when not asked for, failed, or the episode has
            ended.
        playout: None when not asked for, failed, or the episode has ended before it.
        duration_s: Seconds from clone to release.
        failure: None, or what went wrong.
    """

    steps: tuple[Step, ...] = ()
    checkpoint: Checkpoint | None = None
    playout: PlayoutResult | LookaheadResult | None = None
    duration_s: float = 0.0
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Opening:
    """The beginning of an episode.

    Its first step, and the checkpoint after it.
    """

    step: Step
    checkpoint: Checkpoint


class Brancher(Protocol):
    """Carries out jobs: in this process over one engine, or on the hosts of a fleet."""

    async def open(self, task: Task, seed: int) -> Opening:
        """Begins an episode: a prepared sandbox, reset with `seed`, saved.

        Raises:
            RolloutError: Of the boundary that failed.
        """
        ...

    async def run(self, jobs: Sequence[BranchJob]) -> list[BranchResult]:
        """Carries out all jobs. A failed job is a result: this raises only when the carrier is lost.

        Raises:
            CapacityError: The host or its lease is gone.
        """
        ...

    async def release(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Frees checkpoints that no later job will name. Idempotent."""
        ...
