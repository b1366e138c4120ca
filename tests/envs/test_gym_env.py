"""`GymEnv`: any Gymnasium environment in a sandbox, its spaces learnt from there."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator
from typing import Any, cast

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces as gym_spaces

from envs.gym import GymEnv
from rollout.branch import BranchJob
from rollout.config import EngineConfig, EnvConfig
from rollout.env import Task
from rollout.errors import ConfigError, EnvError, GuestError
from rollout.loading import load_env
from rollout.sandbox.base import Sandbox
from rollout.sandbox.branching import LocalBrancher
from rollout.sandbox.inline import InlineEngine
from rollout.types import PlayoutRequest, Randomness, Step, Value


@pytest.fixture
async def engine() -> AsyncIterator[InlineEngine]:
    async with InlineEngine(EngineConfig(kind="inline")) as made:
        yield made


async def opened(engine: InlineEngine, env: GymEnv, seed: int = 1) -> tuple[Sandbox, Step]:
    sandbox = await engine.boot("")
    await env.prepare(sandbox)
    return sandbox, await env.reset(sandbox, env.tasks()[0], seed)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"env_id": "X-v0", "kwarg": {}}, "'kwarg'"),
        ({}, "env_id"),
        ({"env_id": ""}, "env_id"),
        ({"env_id": 3}, "env_id"),
        ({"env_id": "X-v0", "kwargs": [1]}, "kwargs"),
        ({"env_id": "X-v0", "max_episode_steps": 0}, "max_episode_steps"),
        ({"env_id": "X-v0", "max_episode_steps": "9"}, "max_episode_steps"),
        ({"env_id": "X-v0", "max_episode_steps": True}, "max_episode_steps"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_env(EnvConfig(args=args))


async def test_an_environment_that_does_not_exist_is_told_with_the_nearest_name(engine: InlineEngine) -> None:
    sandbox = await engine.boot("")
    with pytest.raises(EnvError, match="did you mean 'FrozenLake-v1'"):
        await GymEnv("FrozenLake-v2").prepare(sandbox)
    with pytest.raises(EnvError, match="no_such_argument"):
        await GymEnv("FrozenLake-v1", {"no_such_argument": 1}).prepare(sandbox)
    assert await sandbox.call("ping") is None


async def test_the_spaces_are_known_once_a_sandbox_is_prepared(engine: InlineEngine) -> None:
    env = GymEnv("CartPole-v1", max_episode_steps=7)
    assert env.description is None
    for unknown in (lambda: env.observation_space, lambda: env.action_space, lambda: env.actions(Step(0))):
        with pytest.raises(EnvError, match="once a sandbox has been prepared"):
            unknown()
    await opened(engine, env)
    reference = gymnasium.make("CartPole-v1")
    assert env.observation_space == reference.observation_space
    assert env.action_space == reference.action_space
    assert env.max_episode_steps == 7
    assert env.id == "CartPole-v1"


async def test_the_description_teaches_an_equal_env_in_another_process(engine: InlineEngine) -> None:
    env, other = GymEnv("CartPole-v1"), GymEnv("CartPole-v1")
    await opened(engine, env)
    other.learn(pickle.loads(pickle.dumps(env.description)))
    assert other.observation_space == env.observation_space
    other.learn(env.description)
    different = GymEnv("FrozenLake-v1")
    await opened(engine, different)
    with pytest.raises(EnvError, match="different environments"):
        other.learn(different.description)
    for malformed in (
        None,
        {},
        [],
        {**cast("dict[str, Value]", env.description), "action_space": {"type": "?"}},
    ):
        with pytest.raises(EnvError, match="malformed"):
            GymEnv("CartPole-v1").learn(malformed)  # type: ignore[arg-type]


async def test_an_episode_is_that_of_gymnasium_itself(engine: InlineEngine) -> None:
    env = GymEnv("CartPole-v1")
    reference = gymnasium.make("CartPole-v1")
    sandbox, first = await opened(engine, env, seed=42)
    observation, _ = reference.reset(seed=42)
    assert np.array_equal(cast("Any", first.observation), observation)
    assert first.reward is None
    step = first
    for number in range(200):
        observation, reward, terminated, truncated, info = reference.step(number % 2)
        step = await env.step(sandbox, number % 2)
        assert np.array_equal(cast("Any", step.observation), observation)
        assert (step.reward, step.terminated, step.truncated, step.info) == (
            reward,
            terminated,
            truncated,
            info,
        )
        if terminated or truncated:
            break
    assert step.terminated


async def test_actions_outside_the_space_are_refused_and_nothing_is_lost(engine: InlineEngine) -> None:
    env = GymEnv("FrozenLake-v1", {"is_slippery": False})
    sandbox, _ = await opened(engine, env)
    reached = await env.step(sandbox, 2, state_hash=True)
    for action in (4, -1, "up", None, 1.0):
        with pytest.raises(EnvError, match="outside the action space"):
            await env.step(sandbox, cast("Value", action))
    assert reached.state_hash == await sandbox.call("env.state_hash")
    assert (await env.step(sandbox, 2)).observation == 2


async def test_the_time_limit_is_heeded_and_travels(engine: InlineEngine) -> None:
    env = GymEnv("FrozenLake-v1", {"is_slippery": False}, max_episode_steps=3)
    sandbox, _ = await opened(engine, env)
    await env.step(sandbox, 0)
    await env.step(sandbox, 0)
    [clone] = await engine.fork(await sandbox.checkpoint())
    assert (await env.step(clone, 0)).truncated
    played = await env.playout(sandbox, PlayoutRequest(50, 1))
    assert (played.num_steps, played.truncated) == (1, True)


def of(space: gymnasium.Space[Any]) -> GymEnv:
    from rollout import spaces

    env = GymEnv("Some-v0")
    described = spaces.describe(space)
    env.learn(
        {"observation_space": described, "action_space": described, "spec_id": "", "max_episode_steps": None}
    )
    return env


def test_legal_actions_are_enumerated() -> None:
    assert of(gym_spaces.Discrete(3, start=5)).actions(Step(0)) == [5, 6, 7]
    masked = Step(0, info={"action_mask": np.array([1, 0, 1], dtype=np.int8)})
    assert of(gym_spaces.Discrete(3, start=5)).actions(masked) == [5, 7]
    assert len(of(gym_spaces.MultiDiscrete([2, 3])).actions(Step(0))) == 6
    assert len(of(gym_spaces.MultiBinary(3)).actions(Step(0))) == 8
    for space in (gym_spaces.Box(0, 1), gym_spaces.MultiBinary(40), gym_spaces.Text(4)):
        with pytest.raises(EnvError, match=r"enumerate"):
            of(space).actions(Step(0))
    with pytest.raises(EnvError, match="mask"):
        of(gym_spaces.Discrete(3)).actions(Step(0, info={"action_mask": [1, 0]}))


async def test_branches_of_a_masked_and_of_an_arrays_environment(engine: InlineEngine) -> None:
    for env_id, num_actions in (("Blackjack-v1", 2), ("Acrobot-v1", 3)):
        env = GymEnv(env_id)
        brancher = LocalBrancher(engine, env)
        opening = await brancher.open(env.tasks()[0], seed=3)
        assert len(env.actions(opening.step)) == num_actions
        job = BranchJob(opening.checkpoint, (1,), Randomness.seeded(4), PlayoutRequest(5, 6), state_hash=True)
        first, second = await brancher.run([job, job])
        assert first.failure is None
        assert first.steps[0].state_hash == second.steps[0].state_hash
        assert str(first.steps) == str(second.steps)
        assert first.playout == second.playout
        [failed] = await brancher.run([BranchJob(opening.checkpoint, (99,), Randomness.seeded(4))])
        assert failed.failure is not None
        assert failed.failure.boundary == "env"
        assert not failed.failure.retryable


async def test_a_tasks_args_are_reset_options(engine: InlineEngine) -> None:
    env = GymEnv("CartPole-v1")
    sandbox, _ = await opened(engine, env)
    step = await env.reset(sandbox, Task("wide", {"low": 0.5, "high": 0.6}), 3)
    assert np.all(np.asarray(step.observation) >= 0.5)
    with pytest.raises(EnvError, match="reset"):
        await env.reset(sandbox, Task("bad", {"low": "x"}), 3)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {},
        {"observation": 0, "reward": "1", "terminated": False, "truncated": False, "info": {}},
        {"observation": 0, "reward": 1.0, "terminated": 0, "truncated": False, "info": {}},
        {"observation": 0, "reward": 1.0, "terminated": False, "truncated": False, "info": []},
        {
            "observation": 0,
            "reward": 1.0,
            "terminated": False,
            "truncated": False,
            "info": {},
            "state_hash": 1,
        },
    ],
    ids=str,
)
async def test_a_guest_that_answers_garbage_is_a_guest_error(answer: Value) -> None:
    class Liar:
        async def call(self, op: str, /, *, timeout_s: float = 60.0, **args: Value) -> Value:
            return answer

    liar, env = cast("Sandbox", Liar()), GymEnv("CartPole-v1")
    with pytest.raises(GuestError, match="garbage"):
        await env.step(liar, 0)
    with pytest.raises(GuestError, match="garbage"):
        await env.playout(liar, PlayoutRequest(3, 1))
    with pytest.raises(EnvError, match="malformed"):
        await env.prepare(liar)
