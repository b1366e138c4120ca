"""The environment in the guest: seeds, digests, random actions, and generators that depend on seeds alone."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from awkward_envs import Walk

from rollout.errors import EnvError
from rollout.sandbox import guest_rng
from rollout.sandbox.global_rng import GlobalState, OwnGenerators
from rollout.sandbox.guest_env import GuestEnv
from rollout.sandbox.guest_hash import UnhashableState, state_digest

ENVS = ["FrozenLake-v1", "CartPole-v1", "Pendulum-v1", "Blackjack-v1", "awkward_envs:Walk-v0"]


class _Plain:
    """No state, and no two are equal."""


def made(env_id: str, **kwargs: Any) -> GuestEnv:
    env = GuestEnv(seeds_globals=False)
    env.make(env_id, kwargs)
    return env


def played(env: GuestEnv, num_steps: int = 20) -> list[str]:
    actions = [env.env.action_space.sample() for _ in range(num_steps)]
    return [str(env.step(action)) for action in actions]


@pytest.mark.parametrize("env_id", ENVS)
def test_a_seed_fixes_the_episode_and_the_spaces_too(env_id: str) -> None:
    first, second, other = made(env_id), made(env_id), made(env_id)
    played_before = other.env
    played_before.reset(seed=99)
    assert str(first.reset(7)) == str(second.reset(7))
    assert played(first, 8) == played(second, 8)


@pytest.mark.parametrize("env_id", ENVS)
def test_playouts_are_functions_of_their_seeds(env_id: str) -> None:
    results: list[Any] = []
    for seed in (1, 1, 2, 3):
        env = made(env_id)
        env.reset(5)
        env.reseed(6)
        results.append(env.playout(30, seed, 0.9))
    assert results[0] == results[1]
    assert len({str(result) for result in results}) > 1


def test_the_return_of_a_playout_is_discounted_from_its_first_step() -> None:
    env = made("CartPole-v1")
    env.reset(1)
    result: Any = env.playout(4, 1, 0.5)
    assert result == {
        "value": 1 + 0.5 + 0.25 + 0.125,
        "num_steps": 4,
        "terminated": False,
        "truncated": False,
    }
    limited = GuestEnv(seeds_globals=False)
    limited.make("CartPole-v1", None, 3)
    limited.reset(1)
    result = limited.playout(100, 1)
    assert result == {"value": 3.0, "num_steps": 3, "terminated": False, "truncated": True}


def test_random_actions_are_uniform_over_legal_ones() -> None:
    counts = {action: 0 for action in range(4)}
    env = made("awkward_envs:Walk-v0", limit=1 << 40)
    env.reset(1)
    choose = env._random_actions(3)
    for _ in range(4000):
        counts[choose(None)] += 1
    assert min(counts.values()) > 900
    counts = {action: 0 for action in range(4)}
    for _ in range(4000):
        counts[choose(np.array([0, 1, 1, 0]))] += 1
    assert counts[0] == counts[3] == 0
    assert min(counts[1], counts[2]) > 1800


def test_what_make_tells() -> None:
    env = GuestEnv(seeds_globals=False)
    told: Any = env.make("FrozenLake-v1", {"is_slippery": False}, 17)
    assert told["spec_id"] == "FrozenLake-v1"
    assert told["max_episode_steps"] == 17
    assert told["state_hash_error"] is None
    assert told["versions"]["gymnasium"] == gymnasium.__version__
    assert env.make("FrozenLake-v1")["max_episode_steps"] == 100
    assert env.make("FrozenLake-v1", None, -1)["max_episode_steps"] is None


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("FrozenLake-v99", "did you mean 'FrozenLake-v1'"),
        ("FrozenLakes-v1", "did you mean 'FrozenLake"),
        ("", "cannot be made"),
        ("no_such_module:X-v0", "no_such_module"),
        ("not an id!", "cannot be made|did you mean"),
    ],
)
def test_what_cannot_be_made_says_why(env_id: str, message: str) -> None:
    with pytest.raises(EnvError, match=message):
        made(env_id)
    with pytest.raises(EnvError, match=r"env\.make first"):
        GuestEnv(seeds_globals=False).step(0)


def test_a_refused_action_leaves_the_state() -> None:
    env = made("CartPole-v1")
    env.reset(3)
    before = env.state_hash()
    for action in (2, -1, "left", None, 0.5, [1], {"a": 1}):
        with pytest.raises(EnvError, match=r"outside the action space|structure"):
            env.step(action)  # type: ignore[arg-type]
    assert env.state_hash() == before


def test_observations_do_not_change_afterwards() -> None:
    class Buffer(Walk):
        buffer = np.zeros(2)

        def look(self) -> Any:
            self.buffer[0] = self.get_total()
            return self.buffer

    gymnasium.register("Buffer-v0", entry_point=Buffer)
    try:
        env = made("Buffer-v0")
        env.reset(1)
        first: Any = env.step(1)["observation"]
        env.step(1)
        assert first.tolist() == [1, 0]
    finally:
        del gymnasium.registry["Buffer-v0"]


class TestDigest:
    def test_it_sees_state_and_the_time_limit_but_no_generators(self) -> None:
        one, two = made("FrozenLake-v1", is_slippery=False), made("FrozenLake-v1", is_slippery=False)
        one.reset(1)
        two.reset(2)
        assert one.state_hash() == two.state_hash()
        one.reseed(5)
        one.env.action_space.sample()
        assert one.state_hash() == two.state_hash()
        one.step(0)  # bumps into the edge: only the elapsed steps differ
        assert one.state_hash() != two.state_hash()
        two.step(np.int64(0))
        assert one.state_hash() == two.state_hash()

    def test_it_is_the_same_in_another_process(self) -> None:
        code = (
            "from rollout.sandbox.guest_env import GuestEnv;"
            "env = GuestEnv(seeds_globals=False); env.make('Blackjack-v1'); env.reset(4); env.step(1);"
            "print(env.state_hash())"
        )
        env = made("Blackjack-v1")
        env.reset(4)
        env.step(1)
        for hash_seed in ("1", "2"):
            done = subprocess.run(
                [sys.executable, "-c", code],
                env={"PYTHONHASHSEED": hash_seed},
                capture_output=True,
                check=True,
            )
            assert done.stdout.decode().strip() == env.state_hash()

    @pytest.mark.parametrize(
        ("one", "two"),
        [
            (1, True),
            (1, 1.0),
            ("1", b"1"),
            ([1, 2], (1, 2)),
            ([[1], [2]], [[1, 2]]),
            ({"a": 1}, {"a": 2}),
            ({1, 2}, {1, 3}),
            (np.zeros(2), np.zeros(3)),
            (np.zeros(2), np.zeros(2, np.float32)),
            (None, 0),
            ([np.zeros(1), "x"], [np.zeros(1), "y"]),
            ([[np.zeros(1)], np.ones(1)], [[np.zeros(1), np.ones(1)]]),
            ([[_Plain()], _Plain()], [[_Plain(), _Plain()]]),
            ([np.zeros((1, 2))], [np.zeros((2, 1))]),
            ([np.zeros(1, np.int64)], [np.zeros(1, np.float64)]),
            ({"a": np.zeros(8, np.uint8)}, {"a": bytes(8)}),
            ({"metadata": 1}, {"metadata": 2}),
            (np.longdouble(1), np.longdouble(2)),
        ],
    )
    def test_different_states_differ(self, one: Any, two: Any) -> None:
        assert state_digest(_Box(one)) != state_digest(_Box(two))

    def test_equal_states_agree_whichever_objects_they_are_made_of(self) -> None:
        shared = [1, 2]
        assert state_digest(_Box([shared, shared])) == state_digest(_Box([[1, 2], [1, 2]]))
        text = "".join(["a", "b"])
        assert state_digest(_Box({"k": text, "l": "ab"})) == state_digest(_Box({"k": "ab", "l": text}))
        assert state_digest(_Box({"x", "y", "z"})) == state_digest(_Box({"z", "y", "x"}))
        assert state_digest(_Box(np.int32(3))) == state_digest(_Box(3))
        assert state_digest(_Box([float("nan"), 1])) == state_digest(_Box([float("nan"), 1]))

    def test_knots_slots_subclasses_and_reduced_objects(self) -> None:
        one, two = _Box(1), _Box(1)
        one.value, two.value = one, two
        assert state_digest(one) == state_digest(two) != state_digest(_Box(_Box(1)))
        assert state_digest(_Slots(1)) != state_digest(_Slots(2))
        assert state_digest(_List([1, _Box(2)])) != state_digest(_List([1, _Box(3)]))
        assert state_digest(_Hidden(1)) != state_digest(_Hidden(2))
        assert state_digest(random.Random(1)) == state_digest(random.Random(2))
        assert state_digest(_Box(complex(1, 2))) != state_digest(_Box(complex(1, 3)))

    def test_what_cannot_be_read_is_told(self) -> None:
        with pytest.raises(UnhashableState, match="generator"):
            state_digest(_Box(number for number in range(3)))
        deep: Any = _Box(None)
        for _ in range(500):
            deep = _Box(deep)
        with pytest.raises(UnhashableState, match="deep"):
            state_digest(deep)
        env = made("awkward_envs:Locked-v0")
        env.reset(1)
        assert env.state_hash() is None
        assert "lock" in str(GuestEnv(seeds_globals=False).make("awkward_envs:Locked-v0")["state_hash_error"])


class _Box:
    def __init__(self, value: Any) -> None:
        self.value = value


class _Slots:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class _List(list[Any]):
    pass


class _Hidden:
    """Leaves its state out when it is pickled."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getstate__(self) -> dict[str, Any]:
        return {}


class TestGenerators:
    def test_they_are_functions_of_seed_and_purpose(self) -> None:
        def numbers(seed: int, purpose: str) -> list[float]:
            return guest_rng.generator(seed, purpose).random(4).tolist()

        assert numbers(1, "a") == numbers(1, "a")
        streams = [numbers(seed, purpose) for seed in range(-2, 30) for purpose in ("a", "b")]
        assert len({tuple(stream) for stream in streams}) == 64
        assert abs(float(np.mean(streams)) - 0.5) < 0.1

    def test_the_streams_are_those_of_every_release(self) -> None:
        """A change here makes all recorded seeds mean something else."""
        assert guest_rng.generator(12345, "env").integers(1000, size=6).tolist() == PINNED

    def test_children_differ_from_each_other_and_repeat(self) -> None:
        one, two = guest_rng.generator(1, "a"), guest_rng.generator(1, "a")
        children = [child.random() for child in [*one.spawn(2), *one.spawn(1), one]]
        assert children == [child.random() for child in [*two.spawn(3), two]]
        assert len(set(children)) == 4

    def test_large_seeds_are_taken(self) -> None:
        assert guest_rng.generator(1 << 200, "a").random() != guest_rng.generator(0, "a").random()

    def test_global_states_are_put_in_place_and_taken_out(self) -> None:
        before = GlobalState.capture()
        one, two = (OwnGenerators(GlobalState.seeded(3)) for _ in range(2))
        assert before.equals(GlobalState.capture())
        drawn: list[list[float]] = [[], []]
        for _ in range(3):
            for numbers, generators in zip(drawn, (one, two), strict=True):
                with generators.installed():
                    numbers += [random.random(), random.gauss(0, 1), np.random.normal()]
        with pytest.raises(ZeroDivisionError), one.installed():
            _ = random.random() / 0
        assert drawn[0] == drawn[1]
        assert before.equals(GlobalState.capture())
        assert not one.state.equals(two.state)  # what was drawn before the error was drawn


PINNED = [794, 147, 545, 328, 605, 882]
