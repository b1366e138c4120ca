"""The phases of a branch on one engine, each with its deadline: clone, step, look ahead, save.

A synchronous engine is driven by plain awaits: nothing could interrupt it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from rollout.branch import BranchJob, Lookahead, LookaheadResult
from rollout.config import EngineConfig
from rollout.env import Env
from rollout.errors import CheckpointError, ForkError, GuestError, RolloutError
from rollout.sandbox.base import Checkpoint, Engine, Sandbox
from rollout.sandbox.economics import Economics
from rollout.sandbox.jobs import with_finite_reward
from rollout.types import Randomness, Step, derive_seed

__all__ = ["Phases"]

T = TypeVar("T")


class Phases:
    """What can be done with the sandboxes of one engine; every method raises the error of its boundary.

    Args:
        engine: Whose sandboxes.
        env: What is played in them.
        limits: Deadlines.
        economics: Gets what steps cost.
        clock: Monotonic seconds, for durations.
    """

    def __init__(
        self,
        engine: Engine,
        env: Env,
        limits: EngineConfig,
        economics: Economics,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._env = env
        self._limits = limits
        self._economics = economics
        self._clock = clock
        self._synchronous = engine.capabilities.synchronous

    async def clone(self, held: Checkpoint, randomness: Sequence[Randomness]) -> Sequence[Sandbox]:
        """A clone for each randomness."""
        fork = self._engine.fork(held, len(randomness), randomness=randomness)
        return await self.within(self._limits.fork_timeout_s, ForkError, "a fork", fork)

    async def take_over(self, sandbox: Sandbox, randomness: Randomness) -> None:
        """A saved sandbox that goes on as a clone."""
        go_on = sandbox.take_over(randomness)
        await self.within(self._limits.fork_timeout_s, ForkError, "taking a sandbox over", go_on)

    async def call(self, what: str, call: Awaitable[T]) -> T:
        """A call into a guest."""
        return await self.within(self._limits.call_timeout_s, GuestError, what, call)

    async def save(self, sandbox: Sandbox) -> Checkpoint:
        """A checkpoint of a sandbox."""
        save = sandbox.checkpoint()
        return await self.within(self._limits.checkpoint_timeout_s, CheckpointError, "a checkpoint", save)

    async def apply(self, job: BranchJob, sandbox: Sandbox) -> tuple[tuple[Step, ...], bool]:
        """The job's actions, up to the end of the episode; whether it has ended."""
        steps: list[Step] = []
        last = len(job.actions) - 1
        for index, action in enumerate(job.actions):
            want_hash = job.state_hash and index == last
            start_s = self._clock()
            step = await self.call("a step", self._env.step(sandbox, action, state_hash=want_hash))
            self._economics.add("step", self._clock() - start_s)
            steps.append(with_finite_reward(step))
            if step.terminated or step.truncated:
                return tuple(steps), True
        return tuple(steps), False

    async def look_ahead(self, request: Lookahead, sandbox: Sandbox, step: Step) -> LookaheadResult:
        """Random legal actions, each a function of the request's seed and its number."""
        value, weight, num_steps = 0.0, 1.0, 0
        while num_steps < request.horizon and not (step.terminated or step.truncated):
            actions = self._env.actions(step)
            action = actions[derive_seed(request.seed, num_steps) % len(actions)]
            step = with_finite_reward(await self.call("a step", self._env.step(sandbox, action)))
            value += weight * (step.reward if step.reward is not None else 0.0)
            weight *= request.discount
            num_steps += 1
        has_ended = step.terminated or step.truncated
        return LookaheadResult(value, num_steps, step, () if has_ended else self._env.actions(step))

    async def within(self, limit_s: float, kind: type[RolloutError], what: str, work: Awaitable[T]) -> T:
        """What the work gives; an error of that kind if it takes longer than the limit."""
        if self._synchronous:
            return await work
        try:
            async with asyncio.timeout(limit_s):
                return await work
        except TimeoutError as error:
            raise kind(f"{what} took longer than {limit_s:g} s", retryable=True) from error
