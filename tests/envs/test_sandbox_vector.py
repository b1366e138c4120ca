"""The batched sandboxes behind `gymnasium.make_vec`: their batches are those of Gymnasium's own."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import envs
from rollout.errors import EnvError

pytestmark = pytest.mark.process

NUM_ENVS = 3


def make_pair(env_id, mode, **kwargs):
    sandboxed = gymnasium.make_vec(
        envs.SANDBOX_ID,
        num_envs=NUM_ENVS,
        env_id=env_id,
        engine="process",
        autoreset_mode=mode,
        kwargs=kwargs,
    )
    bare = SyncVectorEnv([lambda: gymnasium.make(env_id, **kwargs)] * NUM_ENVS, autoreset_mode=mode)
    return sandboxed, bare


def assert_equal_batches(batch, expected):
    for part, expected_part in zip(batch, expected, strict=True):
        assert data_equivalence(part, expected_part, exact=True), (part, expected_part)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Blackjack-v1", "CliffWalking-v1"])
def test_batches_are_those_of_the_bare_environments(env_id, mode):
    sandboxed, bare = make_pair(env_id, mode)
    try:
        assert sandboxed.metadata["autoreset_mode"] is mode
        assert sandboxed.observation_space == bare.observation_space
        assert sandboxed.action_space == bare.action_space
        assert_equal_batches(sandboxed.reset(seed=7), bare.reset(seed=7))
        bare.action_space.seed(7)
        num_ended = 0
        for _ in range(40):
            actions = bare.action_space.sample()
            batch, expected = sandboxed.step(actions), bare.step(actions)
            assert_equal_batches(batch, expected)
            num_ended += int((expected[2] | expected[3]).sum())
        assert num_ended > 2 or env_id == "CliffWalking-v1"
    finally:
        sandboxed.close()
        bare.close()


def test_without_autoreset_ended_episodes_are_reset_by_a_mask():
    sandboxed, bare = make_pair("CartPole-v1", AutoresetMode.DISABLED)
    try:
        assert_equal_batches(sandboxed.reset(seed=1), bare.reset(seed=1))
        bare.action_space.seed(1)
        num_resets = 0
        for step in range(60):
            actions = bare.action_space.sample()
            batch, expected = sandboxed.step(actions), bare.step(actions)
            assert_equal_batches(batch, expected)
            mask = expected[2] | expected[3]
            if mask.any():
                num_resets += 1
                with pytest.raises(gymnasium.error.ResetNeeded):
                    sandboxed.step(actions)
                seeds = [step + index for index in range(NUM_ENVS)]
                again = sandboxed.reset(seed=seeds, options={"reset_mask": mask})
                assert_equal_batches(again, bare.reset(seed=seeds, options={"reset_mask": mask}))
        assert num_resets > 2
    finally:
        sandboxed.close()
        bare.close()


def test_bad_arguments():
    sandboxed, bare = make_pair("FrozenLake-v1", "NextStep", is_slippery=False)
    bare.close()
    try:
        with pytest.raises(ValueError, match="2 seeds for 3"):
            sandboxed.reset(seed=[1, 2])
        with pytest.raises(TypeError, match="boolean array"):
            sandboxed.reset(options={"reset_mask": [True, True, False]})
        for mask in (np.zeros(3, dtype=np.bool_), np.ones(2, dtype=np.bool_)):
            with pytest.raises(ValueError, match="at least one of 3"):
                sandboxed.reset(options={"reset_mask": mask})
        sandboxed.reset(seed=0)
        with pytest.raises(EnvError, match="outside the action space"):
            sandboxed.step(np.array([0, 9, 2]))
        sandboxed.reset(seed=0)
        assert sandboxed.step(np.array([2, 1, 0]))[0].tolist() == [1, 4, 0]
    finally:
        sandboxed.close()
        sandboxed.close()


def test_a_time_limit_by_the_name_that_make_vec_uses():
    sandboxed = gymnasium.make_vec(
        envs.SANDBOX_ID, num_envs=2, env_id="CartPole-v1", engine="inline", max_episode_steps=2
    )
    try:
        sandboxed.reset(seed=0)
        assert [sandboxed.step(np.array([0, 1]))[3].tolist() for _ in range(2)] == [[False] * 2, [True] * 2]
    finally:
        sandboxed.close()
