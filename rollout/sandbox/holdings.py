"""The checkpoints that a brancher may be asked for: held within the byte budget, made again when evicted.

`CheckpointStore` decides what has to go, `Lineage` knows how each came to be; here the engine is told to
discard, and whoever can play branches is asked to play one again.

Invariants: what is pinned is held by the engine; what cannot be made again (some `unique` randomness on the
way) is never evicted, and if the budget has no room for it a `CapacityError` says so; a state that comes out
different when it is played again is refused, and marks the environment as not replayable: from then on
nothing of it is evicted.

A state that was not saved (see `rollout.sandbox.deferral`) is as one that was evicted at once. Its parent's
checkpoint, from which it would be made, is kept after its release until the state was made or released too.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from rollout.branch import BranchJob
from rollout.errors import CapacityError, CheckpointError
from rollout.sandbox.base import Checkpoint, Engine, Sandbox
from rollout.sandbox.lineage import Lineage, OpeningOrigin, Origin
from rollout.sandbox.store import CheckpointStore
from rollout.types import RngPolicy, Step

__all__ = ["Holdings", "Pinned", "Remade", "Replay"]


@dataclass(frozen=True, slots=True)
class Remade:
    """A state that was played again: saved, and the sandbox as it was saved, which its receiver ends."""

    checkpoint: Checkpoint
    sandbox: Sandbox


@dataclass(frozen=True, slots=True)
class Pinned:
    """What the engine holds for a checkpoint.

    Attributes:
        held: The engine's own checkpoint.
        sandbox: As that was saved, if it was made again just now; its receiver ends it.
    """

    held: Checkpoint
    sandbox: Sandbox | None = None


@dataclass(slots=True)
class _Remaking:
    """The making of one state, and how many do it or wait for it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_users: int = 0


Replay = Callable[[Origin, Checkpoint | Remade | None], Awaitable[Remade]]
"""Plays an origin again from its parent (None for an opening), in its sandbox if that lives, and saves it."""


class Holdings:
    """What one engine holds for a brancher.

    Args:
        engine: Discards.
        budget_bytes: For all checkpoints together.
        replay: Makes an evicted one again.
        rebuild_s: What that would take.
    """

    def __init__(
        self, engine: Engine, budget_bytes: int, replay: Replay, rebuild_s: Callable[[Origin], float]
    ) -> None:
        self._engine = engine
        self._rebuild_s = rebuild_s
        self._replay = replay
        self._store = CheckpointStore(budget_bytes)
        self._lineage = Lineage()
        self._remaking: dict[str, _Remaking] = {}
        self._deferred_parents: dict[str, str] = {}
        self._num_deferred: dict[str, int] = {}
        self._leaving: dict[str, Checkpoint] = {}
        self._token = secrets.token_hex(4)
        self._num_made_up = 0
        self.is_replayable = True
        self.num_evicted = 0
        self.num_remade = 0

    def __len__(self) -> int:
        return len(self._store)

    @property
    def held_bytes(self) -> int:
        """What they cost together."""
        return self._store.held_bytes

    async def keep_opening(self, checkpoint: Checkpoint, origin: OpeningOrigin) -> None:
        """Takes in the beginning of an episode."""
        self._lineage.record(checkpoint, origin)
        await self._keep(checkpoint, origin)

    def num_steps(self, checkpoint: Checkpoint) -> int:
        """Actions between the reset and a checkpoint; 0 when it is unknown."""
        origin = self._lineage.origin(checkpoint.id)
        return 0 if origin is None else origin.num_steps

    async def keep_branch(self, checkpoint: Checkpoint, job: BranchJob, steps: Sequence[Step]) -> None:
        """Takes in what a job led to.

        Raises:
            CapacityError: There is no room, and it could not be made again. It is discarded.
        """
        origin = self._lineage.derive(job, steps)
        await self._keep(checkpoint, origin)
        if origin is not None:
            self._lineage.record(checkpoint, origin)

    def may_defer(self, job: BranchJob) -> bool:
        """Whether what a job leads to could be made later as it would be now."""
        origin = self._lineage.origin(job.checkpoint.id)
        return (
            self.is_replayable
            and origin is not None
            and origin.repeatable
            and bool(job.actions)
            and job.randomness.policy is RngPolicy.SEEDED
            and job.checkpoint.id not in self._leaving
        )

    def defer(self, job: BranchJob, steps: Sequence[Step]) -> Checkpoint | None:
        """A name for what a job led to, which nobody has saved; None if it could not be made later."""
        if not self.may_defer(job):
            return None
        origin = self._lineage.derive(job, steps)
        assert origin is not None
        parent_id = job.checkpoint.id
        self._num_made_up += 1
        name = f"unsaved-{self._token}-{self._num_made_up}"
        checkpoint = replace(job.checkpoint, id=name, parent_id=parent_id, private_bytes=0)
        self._lineage.record(checkpoint, origin)
        self._deferred_parents[name] = parent_id
        self._num_deferred[parent_id] = self._num_deferred.get(parent_id, 0) + 1
        return checkpoint

    def is_deferred(self, checkpoint: Checkpoint) -> bool:
        """Whether it was never saved so far."""
        return checkpoint.id in self._deferred_parents

    def origin(self, checkpoint: Checkpoint) -> Origin | None:
        """How it came to be; None if unknown or forgotten."""
        return self._lineage.origin(checkpoint.id)

    def is_held(self, checkpoint: Checkpoint) -> bool:
        """Whether the engine holds it now."""
        return self._lineage.current(checkpoint).id in self._store

    def may_give_up(self, checkpoint: Checkpoint) -> bool:
        """Whether it is held, could be made again, and is needed for nothing else now."""
        return (
            self.is_replayable
            and checkpoint.id not in self._leaving
            and not self._num_deferred.get(checkpoint.id)
            and (self.is_deferred(checkpoint) or self._store.may_go(self._lineage.current(checkpoint).id))
        )

    async def give_up(self, checkpoint: Checkpoint) -> bool:
        """Lets one go before its release, because its last child goes on with it; as if it was evicted.

        Returns:
            Whether it may go; if not, nothing has changed.
        """
        if not self.may_give_up(checkpoint):
            return False
        if (gone := self._store.evict(self._lineage.current(checkpoint).id)) is not None:
            await self._engine.discard(gone)
        return True

    async def pin(self, checkpoint: Checkpoint) -> Pinned:
        """What the engine holds for a checkpoint, safe from eviction until `unpin`; made again if need be.

        Raises:
            CheckpointError: It was released or never held, or cannot be made again as it was.
            RolloutError: Playing it again failed.
        """
        origin = self._lineage.origin(checkpoint.id)
        if checkpoint.id in self._leaving:
            raise CheckpointError(f"checkpoint {checkpoint.id} was released")
        held = self._lineage.current(checkpoint)
        if held.id in self._store:
            return Pinned(self._store.pin(held.id))
        if origin is None:
            raise CheckpointError(f"checkpoint {checkpoint.id} is unknown here: released, or of another host")
        if not self.is_replayable and not self.is_deferred(checkpoint):
            raise CheckpointError(
                f"checkpoint {checkpoint.id} was evicted, and this environment does not repeat: raise "
                "engine.checkpoint_budget_bytes"
            )
        async with self._alone(checkpoint.id):
            held = self._lineage.current(checkpoint)
            if held.id in self._store:  # made again while we waited
                return Pinned(self._store.pin(held.id))
            made = await self._make_again(origin)
            try:
                self._lineage.remade(checkpoint.id, made.checkpoint)
                await self._keep(made.checkpoint, origin, pin=True)
                await self._need_no_parent(checkpoint.id)
            except BaseException:
                await made.sandbox.kill()
                raise
        return Pinned(made.checkpoint, made.sandbox)

    async def save_late(self, checkpoint: Checkpoint, save: Callable[[], Awaitable[Checkpoint]]) -> None:
        """Has a state that was left unsaved saved from a sandbox that is still in it, unless it is held now.

        Raises:
            RolloutError: It could not be saved, or there is no room for it.
        """
        origin = self._lineage.origin(checkpoint.id)
        async with self._alone(checkpoint.id):
            if self.is_held(checkpoint):  # made again while we waited
                return
            held = await save()
            self._lineage.remade(checkpoint.id, held)
            await self._keep(held, origin)
        await self._need_no_parent(checkpoint.id)

    async def unpin(self, held: Checkpoint) -> None:
        """Takes back one `pin`."""
        if gone := self._store.unpin(held.id):
            await self._discard(gone)

    async def release(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Frees what nobody will name again. Idempotent."""
        for checkpoint in checkpoints:
            if self._num_deferred.get(checkpoint.id):
                self._leaving[checkpoint.id] = checkpoint
            else:
                await self._forget(checkpoint)
                await self._need_no_parent(checkpoint.id)

    @asynccontextmanager
    async def _alone(self, checkpoint_id: str) -> AsyncGenerator[None]:
        """One after the other; the lock stays until nobody waits for it, or a newcomer would have another."""
        remaking = self._remaking.setdefault(checkpoint_id, _Remaking())
        remaking.num_users += 1
        try:
            async with remaking.lock:
                yield
        finally:
            remaking.num_users -= 1
            if not remaking.num_users:
                del self._remaking[checkpoint_id]

    async def _forget(self, checkpoint: Checkpoint) -> None:
        held = self._lineage.forget(checkpoint)
        if self._store.evict(held.id) is not None:
            await self._engine.discard(held)

    async def _need_no_parent(self, checkpoint_id: str) -> None:
        """A state that was not saved is held now, or gone: its parent may go, if it was released."""
        parent_id = self._deferred_parents.pop(checkpoint_id, None)
        if parent_id is None:
            return
        self._num_deferred[parent_id] -= 1
        if self._num_deferred[parent_id] == 0:
            del self._num_deferred[parent_id]
            if (parent := self._leaving.pop(parent_id, None)) is not None:
                await self._forget(parent)
                await self._need_no_parent(parent.id)

    async def _keep(self, checkpoint: Checkpoint, origin: Origin | None, *, pin: bool = False) -> None:
        evictable = self.is_replayable and origin is not None and origin.repeatable
        try:
            rebuild_s = 0.0 if origin is None else self._rebuild_s(origin)
            gone = self._store.put(checkpoint, evictable=evictable, pin=pin, rebuild_s=rebuild_s)
        except CapacityError:
            await self._engine.discard(checkpoint)
            raise
        if gone:
            await self._discard(gone)

    async def _discard(self, gone: Sequence[Checkpoint]) -> None:
        for checkpoint in gone:
            self.num_evicted += 1
            await self._engine.discard(checkpoint)

    async def _make_again(self, origin: Origin) -> Remade:
        """From the nearest ancestor that is still held."""
        self.num_remade += 1
        if isinstance(origin, OpeningOrigin):
            return await self._replay(origin, None)
        parent = self._lineage.current(origin.job.checkpoint)
        if parent.id in self._store:
            self._store.pin(parent.id)
            try:
                return await self._replay(origin, parent)
            finally:
                await self.unpin(parent)
        made = await self._make_again(origin.parent)
        try:
            return await self._replay(origin, made)
        finally:
            await self._engine.discard(made.checkpoint)
