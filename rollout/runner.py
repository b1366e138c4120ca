"""Plays one task from end to end, without Ray: read this first.

    open an episode → [ choose a move → play it for real → note it ] until it ends → a trajectory

A move is chosen by a planner (a search over clones of the current checkpoint, or chance) and then played as a
branch of its own, from the same checkpoint but with a fresh seed that no branch of the search had: what the
search saw was a sample of the future, never the future itself. Only the randomness policy `inherit` breaks
that, by going on with the checkpoint's own generators in the search and in the real move alike; it is there
to show what such a search claims.

Invariants:

- An episode ends in exactly one trajectory: played to its end, or cut at `max_steps`, or failed with the
  cause on record. A failure is never a reward of 0, and a missing reward is null.
- Every checkpoint that an episode made is released when it ends, however it ends.
- Every random choice derives from the episode's seed; clocks are arguments and only reach times and
  durations.

Not guaranteed: that a failed attempt's rows are kept. The attempt that is recorded is the last one; the
failures of the earlier ones are listed in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rollout.branch import Brancher, BranchJob
from rollout.config import RunConfig
from rollout.env import Env, Task
from rollout.errors import RolloutError
from rollout.loading import load_env
from rollout.policy.evaluators import make_evaluator
from rollout.policy.planner import Move, Planner, RandomPlanner, SearchPlanner, Thread, randomness_of
from rollout.policy.trials import Position
from rollout.sandbox.base import Checkpoint, PhaseTimings
from rollout.sandbox.branching import LocalBrancher
from rollout.sandbox.engines import make_engine
from rollout.trajectory.rows import EpisodeRow, NodeRow, StepRow, Trajectory, make_episode_id
from rollout.types import Failure, Randomness, Step, derive_seed

__all__ = ["EpisodeSpec", "Runner", "episode_specs", "play_locally"]


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """Which episode is to be played.

    Attributes:
        episode_id: What it is, whoever plays it and however often (see `make_episode_id`).
        task: Where it begins.
        group_id: Episodes that are compared with each other; here, those of one task.
        sample: Its index in the group.
        seed: Every random choice in it derives from this.
    """

    episode_id: str
    task: Task
    group_id: str
    sample: int
    seed: int


def episode_specs(config: RunConfig, run_id: str, tasks: Sequence[Task]) -> list[EpisodeSpec]:
    """The episodes of a run: tasks are taken in turn.

    The seeds do not depend on the run's id, so equal configurations play equal episodes.
    """
    specs: list[EpisodeSpec] = []
    for index in range(config.episodes):
        sample, task = index // len(tasks), tasks[index % len(tasks)]
        episode_id = make_episode_id(run_id, task.id, task.id, sample)
        specs.append(
            EpisodeSpec(episode_id, task, task.id, sample, derive_seed(config.seed, task.id, sample))
        )
    return specs


class Runner:
    """Plays episodes; holds no state of any one, so many can be played at once.

    Args:
        env: What is played.
        brancher: What carries out branches.
        config: The run.
        engine: Name of the engine, for the rows.
        timings: Gets the seconds spent in the search.
        clock: Monotonic seconds, for durations.
        wall_clock: Unix time, for `started_at`.
    """

    def __init__(
        self,
        env: Env,
        brancher: Brancher,
        config: RunConfig,
        *,
        engine: str,
        timings: PhaseTimings | None = None,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._env = env
        self._brancher = brancher
        self._config = config
        self._engine = engine
        self._clock = clock
        self._wall_clock = wall_clock
        timings = timings or PhaseTimings()
        if config.search.algorithm == "random":
            self._policy = "random"
            self._planner: Planner = RandomPlanner(env)
        else:
            evaluator = make_evaluator(config.search)
            self._policy = evaluator.name
            self._planner = SearchPlanner(env, brancher, config.search, evaluator, timings, clock)

    async def play(self, spec: EpisodeSpec) -> Trajectory:
        """Plays an episode; one whose failure may pass is begun again, `max_attempts` times in all."""
        earlier: list[Failure] = []
        while True:
            trajectory = await self._attempt(spec, earlier)
            failure = trajectory.episode.failure
            if (
                failure is None
                or not failure.retryable
                or len(earlier) + 1 >= self._config.fleet.max_attempts
            ):
                return trajectory
            earlier.append(failure)

    async def _attempt(self, spec: EpisodeSpec, earlier: Sequence[Failure]) -> Trajectory:
        """One attempt; the one place where an error becomes a failed episode."""
        notes = _Notes(started_at=self._wall_clock(), start_s=self._clock())
        try:
            await self._play(spec, notes)
        except RolloutError as error:
            notes.failure = Failure.of(error)
        except _GaveUp as error:
            notes.failure = error.failure
        return self._trajectory(spec, earlier, notes)

    async def _play(self, spec: EpisodeSpec, notes: _Notes) -> None:
        opening = await self._brancher.open(spec.task, spec.seed)
        position = Position(opening.step, opening.checkpoint)
        notes.first_checkpoint = opening.checkpoint
        notes.final = opening.step
        thread: Thread | None = None
        try:
            for t in range(self._config.max_steps):
                if position.step.terminated or position.step.truncated:
                    return
                start_s = self._clock()
                going_on, thread = thread, None
                move = await self._planner.choose(position, t, derive_seed(spec.seed, t, "choose"), going_on)
                thread = move.thread
                randomness = randomness_of(self._config.search.randomness, derive_seed(spec.seed, t, "move"))
                reached, checkpoint = await self._move(position, move, randomness)
                is_last = t + 1 == self._config.max_steps and not reached.terminated
                reached = replace(reached, truncated=reached.truncated or is_last)
                notes.add(t, position, move, randomness, reached, self._clock() - start_s)
                if checkpoint is None:
                    return
                await self._brancher.release([position.checkpoint])
                position = Position(reached, checkpoint)
        finally:
            await self._planner.drop(thread)
            await self._brancher.release([position.checkpoint])

    async def _move(
        self, position: Position, move: Move, randomness: Randomness
    ) -> tuple[Step, Checkpoint | None]:
        """Plays an action for real; a branch whose failure may pass is tried again, as a search would."""
        wants_hash = self._config.search.wants_state_hash
        action = (move.action,)
        job = BranchJob(position.checkpoint, action, randomness, state_hash=wants_hash, is_last=True)
        retries = self._config.search.max_retries
        while True:
            [result] = await self._brancher.run([job])
            if result.failure is None:
                return result.steps[-1], result.checkpoint
            if not result.failure.retryable or retries == 0:
                raise _GaveUp(result.failure)
            retries -= 1

    def _trajectory(self, spec: EpisodeSpec, earlier: Sequence[Failure], notes: _Notes) -> Trajectory:
        is_graded = notes.failure is None and None not in notes.rewards
        last = notes.steps[-1] if notes.steps else None
        final, first = notes.final, notes.first_checkpoint
        episode = EpisodeRow(
            episode_id=spec.episode_id,
            task_id=spec.task.id,
            group_id=spec.group_id,
            env_id=self._env.id,
            engine=self._engine,
            search=self._config.search.algorithm,
            policy=self._policy,
            seed=spec.seed,
            return_=sum(reward for reward in notes.rewards if reward is not None) if is_graded else None,
            length=len(notes.steps),
            started_at=notes.started_at,
            duration_s=self._clock() - notes.start_s,
            sample=spec.sample,
            attempt=len(earlier),
            terminated=bool(last and last.terminated),
            truncated=bool(last and last.truncated),
            failure=notes.failure,
            earlier_failures=tuple(earlier),
            checkpoint_id=first.id if first is not None else None,
            fingerprint=first.fingerprint if first is not None else None,
            image_digest=first.image_digest if first is not None else None,
        )
        steps = notes.steps
        if is_graded:
            steps = _with_returns(steps, self._config.search.discount, self._config.search.n_step)
        if final is not None:
            last_row = StepRow(len(steps), final.observation, info=final.info, state_hash=final.state_hash)
            steps = [*steps, last_row]
        return Trajectory(episode, steps, notes.nodes)


async def play_locally(config: RunConfig, scratch_dir: Path) -> list[Trajectory]:
    """Plays the episodes of a run one after the other, in this process and without Ray or a sink.

    Args:
        config: The run; `fleet` counts only for its `concurrent_branches` and `max_attempts`.
        scratch_dir: An existing folder for the engine.

    Raises:
        RolloutError: The environment or the engine cannot be made.
    """
    env = load_env(config.env)
    async with make_engine(config.engine, config.image, scratch_dir) as engine:
        brancher = LocalBrancher(
            engine,
            env,
            image=config.image.name,
            limits=config.engine,
            concurrency=config.fleet.concurrent_branches,
        )
        await brancher.prepare()
        runner = Runner(env, brancher, config, engine=engine.capabilities.engine)
        return [await runner.play(spec) for spec in episode_specs(config, "local", env.tasks())]


class _GaveUp(Exception):
    """A branch that the episode cannot do without has failed for good."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.cause)
        self.failure = failure


@dataclass(slots=True)
class _Notes:
    """What one attempt has come to so far."""

    started_at: float
    start_s: float
    first_checkpoint: Checkpoint | None = None
    steps: list[StepRow] = field(default_factory=list[StepRow])
    nodes: list[NodeRow] = field(default_factory=list[NodeRow])
    rewards: list[float | None] = field(default_factory=list["float | None"])
    final: Step | None = None
    failure: Failure | None = None

    def add(
        self, t: int, before: Position, move: Move, randomness: Randomness, reached: Step, duration_s: float
    ) -> None:
        """Notes move `t`: what was seen before it, what was played, what it brought."""
        self.steps.append(
            StepRow(
                t=t,
                observation=before.step.observation,
                action=move.action,
                reward=reached.reward,
                terminated=reached.terminated,
                truncated=reached.truncated,
                info=before.step.info,
                state_hash=before.step.state_hash,
                checkpoint_id=before.checkpoint.id,
                node_id=move.node_id,
                visits=move.visits,
                value=move.value,
                legal_actions=move.legal_actions,
                action_visits=move.action_visits,
                policy_target=move.policy_target,
                rng_policy=randomness.policy.value,
                rng_seed=randomness.seed,
                duration_s=duration_s,
            )
        )
        self.nodes.extend(move.nodes)
        self.rewards.append(reached.reward)
        self.final = reached


def _with_returns(steps: Sequence[StepRow], discount: float, n: int) -> list[StepRow]:
    """Adds to each step the discounted return from there on.

    With n = 0 that of all rewards; else that of n of them and the search's value of the state after these, or
    of all that are left, where there are fewer or the state was not searched.
    """
    rewards = [step.reward or 0.0 for step in steps]
    whole = [0.0]
    for reward in reversed(rewards):
        whole.append(reward + discount * whole[-1])
    whole.reverse()
    done: list[StepRow] = []
    for t, step in enumerate(steps):
        value = steps[t + n].value if n and t + n < len(steps) else None
        if value is None:
            value = whole[t]
        else:
            for reward in reversed(rewards[t : t + n]):
                value = reward + discount * value
        done.append(replace(step, n_step_return=value))
    return done
