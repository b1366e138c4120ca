"""Carries out branch jobs over one engine: reach the state, apply, observe, checkpoint, play out, release.

Invariants:

- At most `concurrency` sandboxes of jobs are alive at once, heirs included; further jobs wait in order.
- Every job gives one result, in the order of the jobs; a `RolloutError` of any phase is the result's
  `failure`, and then nothing of the job is kept.
- Every sandbox is killed, whatever happened to it, but for heirs (see `rollout.sandbox.heirs`); one that was
  late is never used again. An heir goes when its child takes it, its place is needed, or its checkpoint is
  released.
- No result depends on the way by which its state was reached.
- The environment is made once; every episode begins as a clone of that prepared sandbox.
- A checkpoint lives until it is released. What the byte budget evicts meanwhile is made again when a job
  names it, by playing its branch again (see `rollout.sandbox.holdings`).

Nobody waits for a slot while he holds one, and whoever waits finds all heirs gone: so nobody waits for ever.

A synchronous engine is driven by plain awaits, one job after the other, without tasks or deadlines: there is
nothing to overlap and nothing that could be interrupted.

Not guaranteed: which of several waiting calls is served first when they ask for different numbers of clones.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from rollout.branch import BranchJob, BranchResult, Lookahead, LookaheadResult, Opening
from rollout.config import EngineConfig
from rollout.env import Env, Task
from rollout.errors import RolloutError
from rollout.sandbox.base import Checkpoint, Engine, Sandbox
from rollout.sandbox.deferral import Deferral
from rollout.sandbox.economics import Economics, WayCost
from rollout.sandbox.heirs import WAYS, Heirs
from rollout.sandbox.jobs import by_checkpoint, with_finite_value
from rollout.sandbox.lineage import OpeningOrigin, witness_of
from rollout.sandbox.reaching import Reach
from rollout.sandbox.slots import Slots
from rollout.types import Failure, PlayoutResult, Step

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
        concurrency: Sandboxes at once; of a synchronous engine one of a job, the others heirs.
        ways: The ways to a child that may be taken (see `rollout.sandbox.heirs`); a clone always may.
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
        ways: Collection[str] = WAYS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine = engine
        self._env = env
        self._synchronous = engine.capabilities.synchronous
        self._concurrency = concurrency
        self._slots = Slots(concurrency)
        self._clock = clock
        self._branches = self._failed = 0
        self._deferral = Deferral()
        self.economics = Economics()
        self._heirs = Heirs(self.economics, ways)
        limits = limits or EngineConfig()
        self._reach = Reach(engine, env, image, limits, self.economics, self._deferral, clock)
        self._phases = self._reach.phases
        self._holdings = self._reach.holdings

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
        return await self._reach.prepare()

    async def open(self, task: Task, seed: int) -> Opening:
        """Begins an episode: a clone of the prepared sandbox, reset with `seed`, saved.

        Raises:
            RolloutError: Of the boundary that failed.
        """
        await self._take_slots(1)
        stays = False
        try:
            start_s = self._clock()
            step, made = await self._reach.begin(OpeningOrigin(task, seed))
            self.economics.add("open", self._clock() - start_s)
            try:
                origin = OpeningOrigin(task, seed, witness_of([step]))
                await self._holdings.keep_opening(made.checkpoint, origin)
                stays = self._wants_heir()
                if stays:
                    self._heirs.put(made.checkpoint.id, made.sandbox)
            finally:
                if not stays:
                    await made.sandbox.kill()
            return Opening(step, made.checkpoint)
        finally:
            if not stays:
                self._slots.give_back(1)

    async def run(self, jobs: Sequence[BranchJob]) -> list[BranchResult]:
        """Carries out all jobs; a job that fails is a result with a `failure`."""
        made: list[Checkpoint] = []
        try:
            claims = self._heirs.claims(jobs, self._may_give_up)
            if self._synchronous:
                return await self._run_in_turn(jobs, claims, made)
            return await self._run_groups(jobs, claims, made)
        except BaseException:  # cancelled: nobody will learn of what was made
            await self.release(made)
            raise

    async def release(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Frees checkpoints that no later job will name, and their heirs. Idempotent."""
        for checkpoint in checkpoints:
            await self._end(self._heirs.drop(checkpoint.id))
        await self._holdings.release(checkpoints)

    async def _run_in_turn(
        self, jobs: Sequence[BranchJob], claims: Mapping[int, str], made: list[Checkpoint]
    ) -> list[BranchResult]:
        """Job after job; other tasks of this loop, such as a renewal of the lease, get turns in between."""
        results: dict[int, BranchResult] = {}
        yielded_s = self._clock()
        for index in (*claims, *(i for i in range(len(jobs)) if i not in claims)):
            [results[index]] = await self._run_group([jobs[index]], made, claims.get(index, "clone"))
            if self._clock() - yielded_s > _LONGEST_TURN_S:
                await asyncio.sleep(0)
                yielded_s = self._clock()
        return [results[i] for i in range(len(jobs))]

    async def _run_groups(
        self, jobs: Sequence[BranchJob], claims: Mapping[int, str], made: list[Checkpoint]
    ) -> list[BranchResult]:
        others = [i for i in range(len(jobs)) if i not in claims]
        groups = by_checkpoint([jobs[i] for i in others], most=max(1, self._concurrency // 2))
        # Those that go on in an heir begin first: the others may need its place.
        indices = [*([i] for i in claims), *([others[k] for k in group] for group in groups)]
        ways = [*claims.values(), *("clone" for _ in groups)]
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(self._run_group([jobs[i] for i in group], made, way))
                for group, way in zip(indices, ways, strict=True)
            ]
        results: dict[int, BranchResult] = {}
        for group, task in zip(indices, running, strict=True):
            results.update(zip(group, task.result(), strict=True))
        return [results[i] for i in range(len(jobs))]

    async def _run_group(self, jobs: list[BranchJob], made: list[Checkpoint], way: str) -> list[BranchResult]:
        """Jobs of one checkpoint, when there is room for all of them; one alone that goes on in its heir."""
        heir = None if way == "clone" else self._heirs.take(jobs[0].checkpoint.id)
        if heir is None:
            await self._take_slots(len(jobs))
        start_s = self._clock()
        sandboxes: Sequence[Sandbox] = () if heir is None else (heir,)
        stayed: list[Sandbox] = []
        try:
            sandboxes = await self._sandboxes(jobs, heir, gives_up=way == "inherit")
            if len(jobs) == 1:
                return [await self._branch(jobs[0], sandboxes[0], start_s, made, stayed)]
            async with asyncio.TaskGroup() as tasks:
                pairs = zip(jobs, sandboxes, strict=True)
                running = [
                    tasks.create_task(self._branch(job, each, start_s, made, stayed)) for job, each in pairs
                ]
            return [task.result() for task in running]
        except RolloutError as error:
            return [self._failure(error, start_s) for _ in jobs]
        finally:
            async with AsyncExitStack() as ending:  # a cancellation meanwhile skips none of it
                ending.callback(self._slots.give_back, len(jobs) - len(stayed))
                for sandbox in sandboxes:  # a task that was cancelled before it began has killed nothing
                    if not any(sandbox is each for each in stayed):
                        ending.push_async_callback(sandbox.kill)

    async def _sandboxes(
        self, jobs: Sequence[BranchJob], heir: Sandbox | None, *, gives_up: bool
    ) -> Sequence[Sandbox]:
        """A sandbox for each job of a checkpoint."""
        checkpoint, randomness = jobs[0].checkpoint, [job.randomness for job in jobs]
        if heir is not None and await self._reach.go_on(heir, checkpoint, randomness[0], gives_up=gives_up):
            return [heir]
        return await self._reach.clones(checkpoint, randomness, continues=lambda: self._heirs.continues)

    async def _branch(
        self,
        job: BranchJob,
        sandbox: Sandbox,
        start_s: float,
        made: list[Checkpoint],
        stayed: list[Sandbox],
    ) -> BranchResult:
        """Everything in the sandbox; the one place where an error becomes a failure.

        Whoever stays as an heir keeps its slot, and is noted in `stayed`.
        """
        begun_s = self._clock()
        defers = self._defers(job)
        stays = False
        try:
            steps, checkpoint, playout = await self._play(job, sandbox, made, defers=defers)
            stays = checkpoint is not None and self._may_stay(job)
            if checkpoint is not None and stays:
                self._heirs.put(checkpoint.id, sandbox)
                stayed.append(sandbox)
        except RolloutError as error:
            return self._failure(error, start_s)
        finally:
            if not stays:
                await sandbox.kill()
        if checkpoint is not None:
            await self._account(job, checkpoint, self._clock() - begun_s)
        self._branches += 1
        return BranchResult(steps, checkpoint, playout, self._clock() - start_s)

    def _may_stay(self, job: BranchJob) -> bool:
        """Whether the sandbox of a branch becomes an heir: it is as the branch left it, and there is room.

        Not while branches are played again, which would need its place.
        """
        is_probed = self._holdings.may_defer(job) and self._deferral.is_probing
        return job.playout is None and not is_probed and self._wants_heir()

    def _wants_heir(self) -> bool:
        return not self._slots.num_waiting and self._heirs.wants_one()

    def _may_give_up(self, job: BranchJob) -> bool:
        return self._deferral.is_verified and self._holdings.may_give_up(job.checkpoint)

    async def _take_slots(self, n: int) -> None:
        """Waits for n slots; heirs make room."""
        while len(self._heirs) and (missing := self._slots.num_waiting + n - self._slots.num_free) > 0:
            oldest = [self._heirs.drop_oldest() for _ in range(min(missing, len(self._heirs)))]
            if len(oldest) == 1:
                await self._end(oldest[0])
            else:
                # Shielded: one that is cancelled before it began would end nothing and give nothing back.
                await asyncio.shield(asyncio.gather(*(self._end(heir) for heir in oldest)))
        await self._slots.take(n)

    async def _end(self, heir: Sandbox | None) -> None:
        if heir is not None:
            try:
                await heir.kill()
            finally:
                self._slots.give_back(1)

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
            await self._reach.probe(job.checkpoint, checkpoint)

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

    def _failure(self, error: RolloutError, start_s: float) -> BranchResult:
        self._failed += 1
        return BranchResult(duration_s=self._clock() - start_s, failure=Failure.of(error))
