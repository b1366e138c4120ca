"""Carries out branch jobs over one engine: clone, apply, observe, checkpoint, play out, release.

Invariants:

- At most `concurrency` sandboxes of jobs are alive at once; further jobs wait in order.
- Every job gives one result, in the order of the jobs; a `RolloutError` of any phase is the result's
  `failure`, and then nothing of the job is kept.
- Every clone is killed, whatever happened to it; one that was late is never used again.
- The environment is made once; every episode begins as a clone of that prepared sandbox.
- A checkpoint lives until it is released. What the byte budget evicts meanwhile is made again when a job
  names it, by playing its branch again (see `rollout.sandbox.holdings`).

A synchronous engine is driven by plain awaits, one job after the other, without tasks or deadlines: there is
nothing to overlap and nothing that could be interrupted.

Not guaranteed: which of several waiting calls is served first when they ask for different numbers of clones.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rollout.branch import BranchJob, BranchResult, Lookahead, LookaheadResult, Opening
from rollout.config import EngineConfig
from rollout.env import Env, Task
from rollout.errors import BootError, CheckpointError, RolloutError
from rollout.sandbox.base import Checkpoint, Engine, Sandbox
from rollout.sandbox.deferral import Deferral
from rollout.sandbox.economics import Economics, WayCost
from rollout.sandbox.holdings import Holdings
from rollout.sandbox.jobs import by_checkpoint, with_finite_value
from rollout.sandbox.lineage import BranchOrigin, OpeningOrigin, Origin, witness_of
from rollout.sandbox.phases import Phases
from rollout.sandbox.slots import Slots
from rollout.types import Failure, PlayoutResult, Randomness, Step, derive_seed

__all__ = ["BrancherStats", "LocalBrancher"]

_LONGEST_TURN_S = 0.05


@dataclass(frozen=True, slots=True)
class BrancherStats:
    """What a brancher did since it was made, and what it holds now."""

    branches: int
    failed_branches: int
    evicted_checkpoints: int
    remade_checkpoints: int
    live_sandboxes: int
    checkpoints: int
    checkpoint_bytes: int
    is_replayable: bool
    ways: Mapping[str, WayCost]


class LocalBrancher:
    """A `Brancher` over one engine, which belongs to the caller: closing the engine ends everything here.

    Args:
        engine: Whose sandboxes.
        env: What is played in them.
        image: The image that sandboxes boot from; ignored by engines without images.
        limits: Deadlines and the checkpoint budget.
        concurrency: Sandboxes at once; a synchronous engine has one, whatever is asked for.
        clock: Monotonic seconds, for durations.
    """

    def __init__(
        self,
        engine: Engine,
        env: Env,
        *,
        image: str = "default",
        limits: EngineConfig | None = None,
        concurrency: int = 8,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine = engine
        self._env = env
        self._image = image
        self._limits = limits or EngineConfig()
        self._synchronous = engine.capabilities.synchronous
        self._concurrency = concurrency
        self._slots = Slots(concurrency)
        self._clock = clock
        self._prepared: Checkpoint | None = None
        self._preparing = asyncio.Lock()
        self._branches = self._failed = 0
        self._deferral = Deferral()
        self.economics = Economics()
        self._holdings = Holdings(
            engine,
            self._limits.checkpoint_budget_bytes,
            self._replay,
            lambda origin: self.economics.rebuild_s(from_reset=isinstance(origin, OpeningOrigin)),
        )
        self._phases = Phases(engine, env, self._limits, self.economics, clock)

    @property
    def stats(self) -> BrancherStats:
        """Counts since it was made, and what it holds now."""
        return BrancherStats(
            branches=self._branches,
            failed_branches=self._failed,
            evicted_checkpoints=self._holdings.num_evicted,
            remade_checkpoints=self._holdings.num_remade,
            live_sandboxes=self._engine.num_sandboxes,
            checkpoints=len(self._holdings),
            checkpoint_bytes=self._holdings.held_bytes,
            is_replayable=self._holdings.is_replayable,
            ways=self.economics.ways,
        )

    async def prepare(self) -> Checkpoint:
        """The sandbox that every episode is cloned from: booted, with the environment made. Idempotent.

        Raises:
            BootError: It did not boot.
            EnvError: The environment does not exist or cannot be made.
            CheckpointError: It could not be saved.
        """
        async with self._preparing:
            if self._prepared is None:
                boot = self._engine.boot(self._image)
                sandbox = await self._phases.within(self._limits.boot_timeout_s, BootError, "the boot", boot)
                try:
                    await self._phases.call("making the environment", self._env.prepare(sandbox))
                    prepared = await self._phases.save(sandbox)
                finally:
                    await sandbox.kill()
                await self._engine.rebase(prepared)
                self._prepared = prepared
            return self._prepared

    async def open(self, task: Task, seed: int) -> Opening:
        """Begins an episode: a clone of the prepared sandbox, reset with `seed`, saved.

        Raises:
            RolloutError: Of the boundary that failed.
        """
        await self._slots.take(1)
        try:
            start_s = self._clock()
            step, checkpoint = await self._begin(OpeningOrigin(task, seed))
            self.economics.add("open", self._clock() - start_s)
        finally:
            self._slots.give_back(1)
        await self._holdings.keep_opening(checkpoint, OpeningOrigin(task, seed, witness_of([step])))
        return Opening(step, checkpoint)

    async def run(self, jobs: Sequence[BranchJob]) -> list[BranchResult]:
        """Carries out all jobs; a job that fails is a result with a `failure`."""
        made: list[Checkpoint] = []
        try:
            if self._synchronous:
                return await self._run_in_turn(jobs, made)
            return await self._run_groups(jobs, made)
        except BaseException:  # cancelled: nobody will learn of what was made
            await self.release(made)
            raise

    async def release(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Frees checkpoints that no later job will name. Idempotent."""
        await self._holdings.release(checkpoints)

    async def _run_in_turn(self, jobs: Sequence[BranchJob], made: list[Checkpoint]) -> list[BranchResult]:
        """Job after job; other tasks of this loop, such as a renewal of the lease, get turns in between."""
        results: list[BranchResult] = []
        yielded_s = self._clock()
        for job in jobs:
            results.append(await self._run_alone(job, made))
            if self._clock() - yielded_s > _LONGEST_TURN_S:
                await asyncio.sleep(0)
                yielded_s = self._clock()
        return results

    async def _run_groups(self, jobs: Sequence[BranchJob], made: list[Checkpoint]) -> list[BranchResult]:
        groups = by_checkpoint(jobs, most=max(1, self._concurrency // 2))
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._run_group([jobs[i] for i in group], made)) for group in groups]
        results: dict[int, BranchResult] = {}
        for group, task in zip(groups, running, strict=True):
            results.update(zip(group, task.result(), strict=True))
        return [results[i] for i in range(len(jobs))]

    async def _run_group(self, jobs: list[BranchJob], made: list[Checkpoint]) -> list[BranchResult]:
        """Jobs of one checkpoint, cloned by one call, when there is room for all of them."""
        await self._slots.take(len(jobs))
        start_s = self._clock()
        sandboxes: Sequence[Sandbox] = ()
        try:
            sandboxes = await self._clone(jobs[0].checkpoint, [job.randomness for job in jobs])
            async with asyncio.TaskGroup() as tasks:
                pairs = zip(jobs, sandboxes, strict=True)
                running = [tasks.create_task(self._branch(job, clone, start_s, made)) for job, clone in pairs]
            return [task.result() for task in running]
        except RolloutError as error:
            return [self._failure(error, start_s) for _ in jobs]
        finally:
            for sandbox in sandboxes:  # a task that was cancelled before it began has killed nothing
                await sandbox.kill()
            self._slots.give_back(len(jobs))

    async def _run_alone(self, job: BranchJob, made: list[Checkpoint]) -> BranchResult:
        """One job on a synchronous engine."""
        start_s = self._clock()
        try:
            sandboxes = await self._clone(job.checkpoint, [job.randomness])
        except RolloutError as error:
            return self._failure(error, start_s)
        return await self._branch(job, sandboxes[0], start_s, made)

    async def _clone(self, checkpoint: Checkpoint, randomness: Sequence[Randomness]) -> Sequence[Sandbox]:
        held = await self._pin(checkpoint)
        try:
            start_s = self._clock()
            clones = await self._phases.clone(held, randomness)
            num_steps = self._holdings.num_steps(checkpoint)
            self.economics.cloned(self._clock() - start_s, len(clones), num_steps)
            return clones
        finally:
            await self._holdings.unpin(held)

    async def _pin(self, checkpoint: Checkpoint) -> Checkpoint:
        if not self._holdings.is_deferred(checkpoint):
            return await self._holdings.pin(checkpoint)
        start_s, origin = self._clock(), self._holdings.origin(checkpoint)
        held = await self._holdings.pin(checkpoint)
        has_playout = isinstance(origin, BranchOrigin) and origin.job.playout is not None
        self._deferral.needed(self._clock() - start_s, has_playout=has_playout)
        return held

    async def _branch(
        self, job: BranchJob, sandbox: Sandbox, start_s: float, made: list[Checkpoint]
    ) -> BranchResult:
        """Everything between the clone and its release; the one place where an error becomes a failure."""
        begun_s = self._clock()
        defers = self._defers(job)
        try:
            steps, checkpoint, playout = await self._play(job, sandbox, made, defers=defers)
        except RolloutError as error:
            return self._failure(error, start_s)
        finally:
            await sandbox.kill()
        if checkpoint is not None:
            await self._account(job, checkpoint, self._clock() - begun_s)
        self._branches += 1
        return BranchResult(steps, checkpoint, playout, self._clock() - start_s)

    def _defers(self, job: BranchJob) -> bool:
        """Whether the state that a job leads to is left unsaved."""
        has_playout = job.playout is not None
        return self._holdings.may_defer(job) and self._deferral.defers(has_playout=has_playout)

    async def _account(self, job: BranchJob, checkpoint: Checkpoint, duration_s: float) -> None:
        """Takes in what a branch cost; now and then plays one that was saved again."""
        is_deferred, has_playout = self._holdings.is_deferred(checkpoint), job.playout is not None
        saved_s = self._deferral.branched(duration_s, has_playout=has_playout, is_deferred=is_deferred)
        if is_deferred:
            self.economics.deferred(duration_s, saved_s)
        elif self._holdings.may_defer(job) and self._deferral.begins_probe():
            await self._probe(job.checkpoint, checkpoint)

    async def _probe(self, parent: Checkpoint, child: Checkpoint) -> None:
        """Sees whether a branch comes out the same a second time; nothing else depends on it."""
        origin = self._holdings.origin(child)
        if not isinstance(origin, BranchOrigin):
            self._deferral.forbid()
            return
        try:
            held = await self._holdings.pin(parent)
            try:
                start_s = self._clock()
                again = await self._play_again(origin, held)
                self._deferral.probed(self._clock() - start_s, is_same=again is not None)
                if again is not None:
                    await self._engine.discard(again)
            finally:
                await self._holdings.unpin(held)
        except RolloutError:  # a reason to defer nothing, and no failure of the branch that was probed
            self._deferral.forbid()

    async def _play(
        self, job: BranchJob, sandbox: Sandbox, made: list[Checkpoint], *, defers: bool
    ) -> tuple[tuple[Step, ...], Checkpoint | None, PlayoutResult | LookaheadResult | None]:
        steps, has_ended = await self._phases.apply(job, sandbox)
        if has_ended:
            return steps, None, None
        checkpoint = None
        if job.keep_checkpoint:
            checkpoint = self._holdings.defer(job, steps) if defers else None
            if checkpoint is None:
                checkpoint = await self._save_branch(sandbox)
                made.append(checkpoint)
                await self._holdings.keep_branch(checkpoint, job, steps)
            else:
                made.append(checkpoint)
        if job.playout is None:
            return steps, checkpoint, None
        try:
            if isinstance(job.playout, Lookahead):
                begin = steps[-1] if steps else job.playout.begin
                assert begin is not None, "a lookahead begins at a step"
                return steps, checkpoint, await self._phases.look_ahead(job.playout, sandbox, begin)
            played = await self._phases.call("a playout", self._env.playout(sandbox, job.playout))
            return steps, checkpoint, with_finite_value(played)
        except RolloutError:
            if checkpoint is not None:
                await self.release([checkpoint])
            raise

    async def _save_branch(self, sandbox: Sandbox) -> Checkpoint:
        try:
            return await self._phases.save(sandbox)
        except RolloutError:
            self._deferral.forbid()  # it must be seen here, not where something begins from it
            raise

    async def _replay(self, origin: Origin, parent: Checkpoint | None) -> Checkpoint:
        """Makes an evicted checkpoint again; takes no slots, because who asks has them and no clone yet."""
        start_s = self._clock()
        if isinstance(origin, OpeningOrigin):
            step, checkpoint = await self._begin(origin)
            if witness_of([step]) != origin.witness:
                await self._engine.discard(checkpoint)
                raise self._not_replayable()
            self.economics.replayed(self._clock() - start_s, 0, from_reset=True)
            return checkpoint
        assert parent is not None
        checkpoint = await self._play_again(origin, parent)
        if checkpoint is None:
            raise self._not_replayable()
        self.economics.replayed(self._clock() - start_s, origin.num_steps, from_reset=False)
        return checkpoint

    async def _play_again(self, origin: BranchOrigin, parent: Checkpoint) -> Checkpoint | None:
        """What a branch leads to, saved; None if that is not what it was."""
        [sandbox] = await self._phases.clone(parent, [origin.job.randomness])
        try:
            steps, _ = await self._phases.apply(origin.job, sandbox)
            state_hash = steps[-1].state_hash if steps else None
            if state_hash != origin.state_hash or witness_of(steps) != origin.witness:
                return None
            return await self._phases.save(sandbox)
        finally:
            await sandbox.kill()

    def _not_replayable(self) -> CheckpointError:
        self._holdings.is_replayable = False
        self._deferral.forbid()
        return CheckpointError(
            "a state that was evicted or not saved, played again, came out different: this environment does "
            "not repeat, and all its states are held from now on; raise engine.checkpoint_budget_bytes"
        )

    async def _begin(self, origin: OpeningOrigin) -> tuple[Step, Checkpoint]:
        prepared = await self.prepare()
        [sandbox] = await self._phases.clone(prepared, [Randomness.seeded(derive_seed(origin.seed, "open"))])
        try:
            step = await self._phases.call("a reset", self._env.reset(sandbox, origin.task, origin.seed))
            return step, await self._phases.save(sandbox)
        finally:
            await sandbox.kill()

    def _failure(self, error: RolloutError, start_s: float) -> BranchResult:
        self._failed += 1
        return BranchResult(duration_s=self._clock() - start_s, failure=Failure.of(error))
