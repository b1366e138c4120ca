"""Brings sandboxes to the state of a checkpoint: cloned, continued in an heir, or played again.

| what is there | what is done |
|---|---|
| an heir | it goes on (`continue`, `inherit`), unless it is gone or does not confirm |
| the checkpoint | it is forked |
| an ancestor's checkpoint | the branches from there are played again in one sandbox, which then goes on |
| nothing | the episode is begun again first |

Invariants: the state is the same whichever way is taken, or the way is refused; no way holds more sandboxes
at once than were asked for, so slots are the caller's business; a sandbox that is not handed out is ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rollout.config import EngineConfig
from rollout.env import Env
from rollout.errors import BootError, CheckpointError, RolloutError
from rollout.sandbox.base import Checkpoint, Engine, Sandbox
from rollout.sandbox.deferral import Deferral
from rollout.sandbox.economics import Economics
from rollout.sandbox.holdings import Holdings, Pinned, Remade
from rollout.sandbox.lineage import BranchOrigin, OpeningOrigin, Origin, witness_of
from rollout.sandbox.phases import Phases
from rollout.types import Randomness, Step, derive_seed

__all__ = ["Reach"]


@dataclass(slots=True)
class _Spent:
    seconds: float = 0.0


class Reach:
    """The ways to a state on one engine; owns what is held.

    Args:
        engine: Whose sandboxes.
        env: What is played in them.
        image: The image that sandboxes boot from.
        limits: Deadlines and the checkpoint budget.
        economics: Gets what each way cost.
        deferral: Is told what states that were left unsaved cost later, and of what does not repeat.
        clock: Monotonic seconds, for durations.
    """

    def __init__(
        self,
        engine: Engine,
        env: Env,
        image: str,
        limits: EngineConfig,
        economics: Economics,
        deferral: Deferral,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._env = env
        self._image = image
        self._limits = limits
        self._economics = economics
        self._deferral = deferral
        self._clock = clock
        self._num_coming = 0
        self._prepared: Checkpoint | None = None
        self._preparing = asyncio.Lock()
        self.phases = Phases(engine, env, limits, economics, clock)
        self.holdings = Holdings(
            engine,
            limits.checkpoint_budget_bytes,
            self._replay,
            lambda origin: economics.rebuild_s(from_reset=isinstance(origin, OpeningOrigin)),
        )

    async def prepare(self) -> Checkpoint:
        """The sandbox that every episode is cloned from; see `LocalBrancher.prepare`."""
        async with self._preparing:
            if self._prepared is None:
                boot = self._engine.boot(self._image)
                sandbox = await self.phases.within(self._limits.boot_timeout_s, BootError, "the boot", boot)
                try:
                    await self.phases.call("making the environment", self._env.prepare(sandbox))
                    prepared = await self.phases.save(sandbox)
                finally:
                    await sandbox.kill()
                await self._engine.rebase(prepared)
                self._prepared = prepared
            return self._prepared

    async def begin(self, origin: OpeningOrigin) -> tuple[Step, Remade]:
        """An episode's beginning, saved, in a sandbox that is as it was saved."""
        prepared = await self.prepare()
        [sandbox] = await self.phases.clone(prepared, [Randomness.seeded(derive_seed(origin.seed, "open"))])
        try:
            step = await self.phases.call("a reset", self._env.reset(sandbox, origin.task, origin.seed))
            return step, Remade(await self.phases.save(sandbox), sandbox)
        except BaseException:
            await sandbox.kill()
            raise

    async def go_on(
        self, heir: Sandbox, checkpoint: Checkpoint, randomness: Randomness, *, gives_up: bool = False
    ) -> bool:
        """Lets the heir of a checkpoint go on as a child; False, and it is ended, if it cannot.

        A state that was left unsaved is saved first: in the heir it is still there. With `gives_up` the
        checkpoint goes, unless it is needed for something else by now: then it stays, as without.
        """
        is_held = self.holdings.is_held(checkpoint)
        num_steps = self.holdings.num_steps(checkpoint)
        try:
            if self.holdings.is_deferred(checkpoint):
                await self._save_late(heir, checkpoint)
            with self._timed(1) as spent:
                # Others may have asked for it since the way was chosen.
                gives_up = gives_up and await self.holdings.give_up(checkpoint)
                await self.phases.take_over(heir, randomness)
        except RolloutError:  # it has died meanwhile: there are other ways, and no branch has failed
            await heir.kill()
            return False
        self._economics.continued(spent.seconds, num_steps, is_held=is_held, gives_up=gives_up)
        return True

    async def clones(
        self, checkpoint: Checkpoint, randomness: Sequence[Randomness], *, continues: Callable[[], bool]
    ) -> Sequence[Sandbox]:
        """A sandbox for each randomness, without an heir; the state is made again first, if need be.

        Args:
            checkpoint: Where they begin.
            randomness: One for each, at least one.
            continues: Whether one goes on in the sandbox that the state was just made again in.

        Raises:
            RolloutError: Of the boundary that failed; then there is none.
        """
        pinned = await self._pin(checkpoint)
        reached: list[Sandbox] = []
        try:
            try:
                if pinned.sandbox is not None:
                    reached.append(pinned.sandbox)
                    if not continues() or not await self.go_on(pinned.sandbox, checkpoint, randomness[0]):
                        await reached.pop().kill()
                if missing := randomness[len(reached) :]:
                    with self._timed(len(missing)) as spent:
                        clones = await self.phases.clone(pinned.held, missing)
                    num_steps = self.holdings.num_steps(checkpoint)
                    self._economics.cloned(spent.seconds, len(clones), num_steps)
                    reached += clones
            finally:
                await self.holdings.unpin(pinned.held)
        except BaseException:
            for sandbox in reached:
                await sandbox.kill()
            raise
        return reached

    async def probe(self, parent: Checkpoint, child: Checkpoint) -> None:
        """Sees whether a branch comes out the same a second time; nothing else depends on it."""
        origin = self.holdings.origin(child)
        if not isinstance(origin, BranchOrigin):
            self._deferral.forbid()
            return
        try:
            pinned = await self.holdings.pin(parent)
            try:
                if pinned.sandbox is not None:
                    await pinned.sandbox.kill()
                start_s = self._clock()
                again = await self._play_again(origin, pinned.held)
                if again is not None:
                    await again.sandbox.kill()
                self._deferral.probed(self._clock() - start_s, is_same=again is not None)
                if again is not None:
                    await self._engine.discard(again.checkpoint)
            finally:
                await self.holdings.unpin(pinned.held)
        except RolloutError:  # a reason to defer nothing, and no failure of the branch that was probed
            self._deferral.forbid()

    async def _save_late(self, heir: Sandbox, checkpoint: Checkpoint) -> None:
        start_s = self._clock()
        await self.holdings.save_late(checkpoint, lambda: self.phases.save(heir))
        self._deferral.needed(self._clock() - start_s, has_playout=False)

    async def _pin(self, checkpoint: Checkpoint) -> Pinned:
        if not self.holdings.is_deferred(checkpoint):
            return await self.holdings.pin(checkpoint)
        start_s, origin = self._clock(), self.holdings.origin(checkpoint)
        pinned = await self.holdings.pin(checkpoint)
        has_playout = isinstance(origin, BranchOrigin) and origin.job.playout is not None
        self._deferral.needed(self._clock() - start_s, has_playout=has_playout)
        return pinned

    async def _replay(self, origin: Origin, parent: Checkpoint | Remade | None) -> Remade:
        """Makes a state again; takes no slots, because who asks has them and no clone yet."""
        start_s = self._clock()
        if isinstance(origin, OpeningOrigin):
            step, made = await self.begin(origin)
            if witness_of([step]) != origin.witness:
                await made.sandbox.kill()
                await self._engine.discard(made.checkpoint)
                raise self._not_replayable()
            self._economics.replayed(self._clock() - start_s, 0, from_reset=True)
            return made
        assert parent is not None
        made = await self._play_again(origin, parent)
        if made is None:
            raise self._not_replayable()
        self._economics.replayed(self._clock() - start_s, origin.num_steps, from_reset=False)
        return made

    async def _play_again(self, origin: BranchOrigin, parent: Checkpoint | Remade) -> Remade | None:
        """What a branch leads to, saved; None if that is not what it was."""
        sandbox = await self._child(parent, origin.job.randomness)
        try:
            steps, _ = await self.phases.apply(origin.job, sandbox)
            state_hash = steps[-1].state_hash if steps else None
            if state_hash != origin.state_hash or witness_of(steps) != origin.witness:
                await sandbox.kill()
                return None
            return Remade(await self.phases.save(sandbox), sandbox)
        except BaseException:
            await sandbox.kill()
            raise

    async def _child(self, parent: Checkpoint | Remade, randomness: Randomness) -> Sandbox:
        """A child of a state that is held, in the sandbox that was just played there if there is one."""
        if isinstance(parent, Checkpoint):
            [sandbox] = await self.phases.clone(parent, [randomness])
            return sandbox
        try:
            await self.phases.take_over(parent.sandbox, randomness)
            return parent.sandbox
        except RolloutError:
            await parent.sandbox.kill()
            [sandbox] = await self.phases.clone(parent.checkpoint, [randomness])
            return sandbox
        except BaseException:
            await parent.sandbox.kill()
            raise

    @contextmanager
    def _timed(self, n: int) -> Generator[_Spent]:
        """Times the making of n sandboxes; of a time in which others were made too, these n have a share.

        So what one costs is the same whether many were made by one call or by many at once.
        """
        spent, start_s = _Spent(), self._clock()
        self._num_coming += n
        num_at_first = self._num_coming
        try:
            yield spent
        finally:
            share = n / (0.5 * (num_at_first + self._num_coming))
            self._num_coming -= n
            spent.seconds = share * (self._clock() - start_s)

    def _not_replayable(self) -> CheckpointError:
        self.holdings.is_replayable = False
        self._deferral.forbid()
        return CheckpointError(
            "a state that was evicted or not saved, played again, came out different: this environment does "
            "not repeat, and all its states are held from now on; raise engine.checkpoint_budget_bytes"
        )
