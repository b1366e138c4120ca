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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rollout.branch import BranchJob, BranchResult, Lookahead, LookaheadResult, Opening
from rollout.config import EngineConfig
from rollout.env import Env, Task
from rollout.errors import BootError, CheckpointError, ForkError, GuestError, RolloutError
from rollout.sandbox.base import Checkpoint, Engine, Sandbox
from rollout.sandbox.economics import Economics, WayCost
from rollout.sandbox.holdings import Holdings
from rollout.sandbox.jobs import by_checkpoint, with_finite_reward, with_finite_value
from rollout.sandbox.lineage import OpeningOrigin, Origin, witness_of
from rollout.sandbox.slots import Slots
from rollout.types import Failure, PlayoutResult, Randomness, Step, derive_seed

__all__ = ["BrancherStats", "LocalBrancher"]

T = TypeVar("T")

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
        self._holdings = Holdings(engine, self._limits.checkpoint_budget_bytes, self._replay)
        self._prepared: Checkpoint | None = None
        self._preparing = asyncio.Lock()
        self._branches = self._failed = 0
        self.economics = Economics()

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
                sandbox = await self._within(self._limits.boot_timeout_s, BootError, "the boot", boot)
                try:
                    await self._call("making the environment", self._env.prepare(sandbox))
                    self._prepared = await self._save(sandbox)
                finally:
                    await sandbox.kill()
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
        held = await self._holdings.pin(checkpoint)
        try:
            start_s = self._clock()
            fork = self._engine.fork(held, len(randomness), randomness=randomness)
            clones = await self._within(self._limits.fork_timeout_s, ForkError, "a fork", fork)
            num_steps = self._holdings.num_steps(checkpoint)
            self.economics.cloned(self._clock() - start_s, len(clones), num_steps)
            return clones
        finally:
            await self._holdings.unpin(held)

    async def _branch(
        self, job: BranchJob, sandbox: Sandbox, start_s: float, made: list[Checkpoint]
    ) -> BranchResult:
        """Everything between the clone and its release; the one place where an error becomes a failure."""
        try:
            steps, checkpoint, playout = await self._play(job, sandbox, made)
        except RolloutError as error:
            return self._failure(error, start_s)
        finally:
            await sandbox.kill()
        self._branches += 1
        return BranchResult(steps, checkpoint, playout, self._clock() - start_s)

    async def _play(
        self, job: BranchJob, sandbox: Sandbox, made: list[Checkpoint]
    ) -> tuple[tuple[Step, ...], Checkpoint | None, PlayoutResult | LookaheadResult | None]:
        steps, has_ended = await self._apply(job, sandbox)
        if has_ended:
            return steps, None, None
        checkpoint = None
        if job.keep_checkpoint:
            checkpoint = await self._save(sandbox)
            made.append(checkpoint)
            await self._holdings.keep_branch(checkpoint, job, steps)
        if job.playout is None:
            return steps, checkpoint, None
        try:
            if isinstance(job.playout, Lookahead):
                begin = steps[-1] if steps else job.playout.begin
                assert begin is not None, "a lookahead begins at a step"
                return steps, checkpoint, await self._look_ahead(job.playout, sandbox, begin)
            played = await self._call("a playout", self._env.playout(sandbox, job.playout))
            return steps, checkpoint, with_finite_value(played)
        except RolloutError:
            if checkpoint is not None:
                await self.release([checkpoint])
            raise

    async def _apply(self, job: BranchJob, sandbox: Sandbox) -> tuple[tuple[Step, ...], bool]:
        """The job's actions, up to the end of the episode; whether it has ended."""
        steps: list[Step] = []
        last = len(job.actions) - 1
        for index, action in enumerate(job.actions):
            want_hash = job.state_hash and index == last
            start_s = self._clock()
            step = await self._call("a step", self._env.step(sandbox, action, state_hash=want_hash))
            self.economics.add("step", self._clock() - start_s)
            steps.append(with_finite_reward(step))
            if step.terminated or step.truncated:
                return tuple(steps), True
        return tuple(steps), False

    async def _look_ahead(self, request: Lookahead, sandbox: Sandbox, step: Step) -> LookaheadResult:
        """Random legal actions, each a function of the request's seed and its number."""
        value, weight, num_steps = 0.0, 1.0, 0
        while num_steps < request.horizon and not (step.terminated or step.truncated):
            actions = self._env.actions(step)
            action = actions[derive_seed(request.seed, num_steps) % len(actions)]
            step = with_finite_reward(await self._call("a step", self._env.step(sandbox, action)))
            value += weight * (step.reward if step.reward is not None else 0.0)
            weight *= request.discount
            num_steps += 1
        has_ended = step.terminated or step.truncated
        return LookaheadResult(value, num_steps, step, () if has_ended else self._env.actions(step))

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
        sandbox = await self._clone_one(parent, origin.job.randomness)
        try:
            steps, _ = await self._apply(origin.job, sandbox)
            state_hash = steps[-1].state_hash if steps else None
            if state_hash != origin.state_hash or witness_of(steps) != origin.witness:
                raise self._not_replayable()
            checkpoint = await self._save(sandbox)
        finally:
            await sandbox.kill()
        self.economics.replayed(self._clock() - start_s, origin.num_steps, from_reset=False)
        return checkpoint

    def _not_replayable(self) -> CheckpointError:
        self._holdings.is_replayable = False
        return CheckpointError(
            "an evicted state, played again, came out different: this environment does not repeat, and "
            "nothing of it is evicted from now on; raise engine.checkpoint_budget_bytes"
        )

    # Phases, each with its deadline

    async def _begin(self, origin: OpeningOrigin) -> tuple[Step, Checkpoint]:
        prepared = await self.prepare()
        sandbox = await self._clone_one(prepared, Randomness.seeded(derive_seed(origin.seed, "open")))
        try:
            step = await self._call("a reset", self._env.reset(sandbox, origin.task, origin.seed))
            return step, await self._save(sandbox)
        finally:
            await sandbox.kill()

    async def _clone_one(self, held: Checkpoint, randomness: Randomness) -> Sandbox:
        fork = self._engine.fork(held, 1, randomness=[randomness])
        return (await self._within(self._limits.fork_timeout_s, ForkError, "a fork", fork))[0]

    async def _call(self, what: str, call: Awaitable[T]) -> T:
        return await self._within(self._limits.call_timeout_s, GuestError, what, call)

    async def _save(self, sandbox: Sandbox) -> Checkpoint:
        save = sandbox.checkpoint()
        return await self._within(self._limits.checkpoint_timeout_s, CheckpointError, "a checkpoint", save)

    async def _within(self, limit_s: float, kind: type[RolloutError], what: str, work: Awaitable[T]) -> T:
        if self._synchronous:
            return await work
        try:
            async with asyncio.timeout(limit_s):
                return await work
        except TimeoutError as error:
            raise kind(f"{what} took longer than {limit_s:g} s", retryable=True) from error

    def _failure(self, error: RolloutError, start_s: float) -> BranchResult:
        self._failed += 1
        return BranchResult(duration_s=self._clock() - start_s, failure=Failure.of(error))
