"""`rollout/Sandbox-v0`: it passes Gymnasium's checker, plays as the bare environment does, can be forked."""

import subprocess
import sys
import threading

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence

import envs
from rollout.errors import BootError, CheckpointError, ConfigError, EnvError
from rollout.types import Randomness

pytestmark = pytest.mark.process

MAX_STEPS = 60


@pytest.fixture
def make():
    made = []

    def make_env(env_id, **settings):
        env = gymnasium.make(envs.SANDBOX_ID, env_id=env_id, **{"engine": "process", **settings})
        made.append(env)
        return env

    yield make_env
    for env in made:
        env.close()
    assert "sandbox-bridge" not in {thread.name for thread in threading.enumerate()}


def play(env, seed):
    """A seeded episode: every observation, reward and flag; the actions are a function of the seed."""
    observation, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    steps = [(observation, 0.0, False, False)]
    for _ in range(MAX_STEPS):
        steps.append(env.step(env.action_space.sample())[:4])
        if steps[-1][2] or steps[-1][3]:
            break
    return steps


@pytest.mark.parametrize("engine", ["process", "inline"])
def test_the_checker_has_nothing_to_say(make, engine):
    check_env(make("FrozenLake-v1", engine=engine))


def test_the_checker_has_nothing_to_say_about_arrays_either(make):
    check_env(make("MountainCarContinuous-v0"))


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("FrozenLake-v1", {"map_name": "8x8", "is_slippery": True}),
        ("Taxi-v4", {}),
        ("CliffWalking-v1", {}),
        ("Blackjack-v1", {}),
        ("CartPole-v1", {}),
        ("MountainCar-v0", {}),
        ("Acrobot-v1", {}),
        ("Pendulum-v1", {}),
    ],
)
def test_whole_seeded_episodes_are_those_of_the_bare_environment(make, env_id, kwargs):
    bare, sandboxed = gymnasium.make(env_id, **kwargs), make(env_id, kwargs=kwargs)
    assert sandboxed.observation_space == bare.observation_space
    assert sandboxed.action_space == bare.action_space
    for seed in range(3):
        expected, played = play(bare, seed), play(sandboxed, seed)
        assert len(played) == len(expected)
        for step, expected_step in zip(played, expected, strict=True):
            assert data_equivalence(step[0], expected_step[0], exact=True)
            assert step[1:] == expected_step[1:]
    bare.close()


def test_the_same_on_every_engine(make):
    inline, process = make("FrozenLake-v1", engine="inline"), make("FrozenLake-v1")
    assert play(inline, 5) == play(process, 5)


def test_a_time_limit_is_inside_and_travels_with_a_checkpoint(make):
    env = make("CartPole-v1", time_limit=4)
    env.reset(seed=0)
    env.step(0)
    saved = env.checkpoint()
    (clone,) = env.fork(1)
    flags = [[one.step(action)[2:4] for action in (1, 0, 1)] for one in (env, clone)]
    assert flags == [[(False, False), (False, False), (False, True)]] * 2
    env.restore(saved)
    assert [env.step(action)[3] for action in (1, 0, 1)] == [False, False, True]
    clone.close()


def test_order_is_enforced_inside_and_travels_with_a_checkpoint(make):
    env = make("CartPole-v1")
    (fresh,) = env.fork(1)
    with pytest.raises(EnvError, match="reset"):
        fresh.step(0)
    env.reset(seed=0)
    (begun,) = env.fork(1)
    assert begun.step(0)[1] == 1.0
    for clone in (fresh, begun):
        clone.close()


def test_restoring_goes_back_exactly_again_and_again(make):
    env = make("FrozenLake-v1", kwargs={"is_slippery": True})
    env.reset(seed=11)
    env.step(1)
    saved = env.checkpoint()
    futures = []
    for _ in range(3):
        env.restore(saved)
        futures.append([env.step(2)[:4] for _ in range(3)])
    assert futures[0] == futures[1] == futures[2]
    env.restore(saved, randomness=Randomness.seeded(1))
    env.discard(saved)
    env.discard(saved)
    before = env.step(2)
    with pytest.raises(CheckpointError):
        env.restore(saved)
    assert len(env.step(2)) == len(before)  # it is as it was before


def test_forks_go_their_own_ways_and_share_nothing(make):
    env = make("Taxi-v4")
    start, _ = env.reset(seed=3)
    clones = env.fork(3, randomness=[Randomness.seeded(n) for n in range(3)])
    for clone in clones:
        assert clone.spec == env.spec
        clone.action_space.seed(0)
    samples = [[clone.action_space.sample() for _ in range(5)] for clone in clones]
    assert samples[0] == samples[1] == samples[2]
    positions = [clone.step(action)[0] for clone, action in zip(clones, (0, 1, 2), strict=True)]
    assert len({start, *positions}) > 2
    for clone in clones:
        clone.close()
    assert env.step(0)[0] == positions[0]


def test_clones_outlive_the_environment_that_they_came_from(make):
    env = make("CartPole-v1")
    env.reset(seed=0)
    first, second = env.fork(2)
    env.close()
    env.close()
    with pytest.raises(gymnasium.error.ClosedEnvironmentError):
        env.step(0)
    assert first.step(0)[1] == 1.0
    first.close()
    assert second.step(0)[1] == 1.0
    second.close()


def test_an_action_outside_the_space_is_refused_and_nothing_has_changed(make):
    env = make("FrozenLake-v1", kwargs={"is_slippery": False})
    env.reset(seed=0)
    with pytest.raises(EnvError, match="outside the action space"):
        env.step(4)
    assert env.step(np.int64(2))[0] == 1


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"env_id": "FrozenLak-v1"}, EnvError, "did you mean 'FrozenLake-v1'"),
        ({"env_id": ""}, ConfigError, "env_id"),
        ({"env_id": "CartPole-v1", "engine": "proces"}, ConfigError, "engine.kind"),
        ({"env_id": "CartPole-v1", "engine_config": {"memory": 1}}, ConfigError, "memory_mib"),
        ({"env_id": "CartPole-v1", "engine": "microvm", "image": "no-such-image"}, BootError, "microvm"),
    ],
)
def test_bad_settings_leave_nothing(settings, error, reason):
    with pytest.raises(error, match=reason):
        gymnasium.make(envs.SANDBOX_ID, **{"engine": "process", **settings})
    assert "sandbox-bridge" not in {thread.name for thread in threading.enumerate()}


def test_it_can_be_made_by_its_full_name_alone():
    code = (
        "import gymnasium\n"
        "env = gymnasium.make('envs:rollout/Sandbox-v0', env_id='CartPole-v1', engine='process')\n"
        "print(env.reset(seed=0)[0].shape, type(env).__name__)\n"
        "env.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("(4,) SandboxEnv\n", "")


def test_a_program_that_forgets_to_close_leaves_nothing():
    code = (
        "import envs, gymnasium\n"
        "env = gymnasium.make('rollout/Sandbox-v0', env_id='CartPole-v1', engine='process')\n"
        "env.reset(seed=0)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True
    )  # the fixture of all tests looks for its processes
