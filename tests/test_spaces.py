"""Spaces and their elements cross the channel and come back equal; what cannot is refused."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces as gym_spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout import spaces
from rollout.errors import EnvError
from rollout.sandbox import wire

Space = gymnasium.Space[Any]

ALL: list[Space] = [
    gym_spaces.Discrete(5),
    gym_spaces.Discrete(3, start=-1),
    gym_spaces.Discrete(3, dtype=np.uint8),
    gym_spaces.MultiDiscrete([3, 4]),
    gym_spaces.MultiDiscrete(np.array([[3, 2], [1, 5]]), start=np.array([[0, 1], [-2, 3]])),
    gym_spaces.MultiBinary(4),
    gym_spaces.MultiBinary([2, 3]),
    gym_spaces.Box(-1, 1, (2, 3)),
    gym_spaces.Box(np.array([0.0, -np.inf]), np.array([np.inf, 5.0]), dtype=np.float64),
    gym_spaces.Box(0, 255, (4, 4, 3), np.uint8),
    gym_spaces.Box(-1, 1, (), np.float32),
    gym_spaces.Text(8),
    gym_spaces.Text(5, min_length=2, charset="abc é"),
    gym_spaces.Dict(b=gym_spaces.Discrete(2), a=gym_spaces.Box(0, 1, (2,))),
    gym_spaces.Tuple([gym_spaces.Discrete(2), gym_spaces.Dict(x=gym_spaces.MultiBinary(2))]),
    gym_spaces.OneOf([gym_spaces.Discrete(2), gym_spaces.Box(0, 1, (2,))]),
    gym_spaces.Sequence(gym_spaces.Discrete(4)),
    gym_spaces.Sequence(gym_spaces.Box(0, 1, (2,)), stack=True),
    gym_spaces.Graph(gym_spaces.Box(-1, 1, (3,)), gym_spaces.Discrete(4)),
    gym_spaces.Graph(gym_spaces.Box(-1, 1, (3,)), None),
]
each_space = pytest.mark.parametrize("space", ALL, ids=str)


@each_space
def test_a_space_comes_back_equal(space: Space) -> None:
    back = spaces.build(wire.unpack(wire.pack(spaces.describe(space))))
    assert back == space
    assert type(back) is type(space)
    assert back.dtype == space.dtype


@each_space
def test_elements_come_back_equal_and_inside(space: Space) -> None:
    space.seed(3)
    for _ in range(20):
        original = space.sample()
        back = spaces.element(space, wire.unpack(wire.pack(spaces.plain(original))))
        assert space.contains(back)
        assert spaces.contains(space, back)
        assert _same(back, original)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, gym_spaces.GraphInstance):
        return all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, tuple):
        return isinstance(other, tuple) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, int):  # the one form in which an element of a Discrete space arrives
        return one == other
    return bool(np.array_equal(one, other)) and getattr(one, "dtype", None) == getattr(other, "dtype", None)


@each_space
def test_samples_are_a_function_of_the_generator(space: Space) -> None:
    first, second = (
        [spaces.plain(spaces.sample(space, np.random.default_rng(5))) for _ in range(3)] for _ in range(2)
    )
    assert wire.pack(first) == wire.pack(second)
    other = [spaces.plain(spaces.sample(space, np.random.default_rng(seed))) for seed in range(20)]
    assert len({wire.pack(each) for each in other}) > 1


@pytest.mark.parametrize("value", [3, -1, 4, True, np.int64(2), np.int64(9), 1.0, "1", None, [1]], ids=repr)
@pytest.mark.parametrize("space", [gym_spaces.Discrete(4), gym_spaces.Discrete(2, start=3)], ids=str)
def test_contains_agrees_with_gymnasium(space: Space, value: Any) -> None:
    assert spaces.contains(space, value) == space.contains(value)


@pytest.mark.parametrize(
    "description",
    [
        None,
        [],
        {},
        {"type": "Graph"},
        {"type": "Discrete"},
        {"type": "Discrete", "n": 0, "start": 0, "dtype": "<i8"},
        {"type": "Discrete", "n": 3, "start": 0, "dtype": "<f8"},
        {"type": "Discrete", "n": 3, "start": 0, "dtype": "nonsense"},
        {"type": "Box", "low": 1, "high": "x", "dtype": "<f4"},
        {"type": "Text", "min_length": 5, "max_length": 1, "characters": "a"},
        {"type": "Dict", "spaces": [["a", None]]},
        {"type": "Tuple", "spaces": 3},
        {"type": "Surprise"},
        {"type": ["Discrete"]},
    ],
    ids=str,
)
def test_a_malformed_description_is_a_typed_error(description: Any) -> None:
    with pytest.raises(EnvError, match="malformed"):
        spaces.build(description)


def test_a_description_nested_without_end_is_refused() -> None:
    description: Any = {"type": "Discrete", "n": 1, "start": 0, "dtype": "<i8"}
    for _ in range(200):
        description = {"type": "Tuple", "spaces": [description]}
    with pytest.raises(EnvError, match="nested too deeply"):
        spaces.build(description)


@settings(max_examples=200)
@given(
    st.sampled_from(["Discrete", "MultiDiscrete", "MultiBinary", "Box", "Text", "Dict", "Sequence", "OneOf"]),
    st.dictionaries(
        st.sampled_from(["n", "start", "dtype", "nvec", "low", "high", "spaces", "feature", "characters"]),
        st.integers(-3, 1 << 64)
        | st.text(max_size=3)
        | st.lists(st.integers(-2, 3), max_size=3)
        | st.just("<i8"),
    ),
)
def test_any_description_is_a_space_or_a_typed_error(kind: str, about: dict[str, Any]) -> None:
    try:
        space = spaces.build({"type": kind, **about})
    except EnvError:
        return
    assert isinstance(space, gymnasium.Space)


class Opaque(gymnasium.Space[Any]):
    """A kind of space that nobody else knows."""


def test_an_unknown_kind_of_space_is_refused_by_name() -> None:
    with pytest.raises(EnvError, match="Opaque"):
        spaces.describe(gym_spaces.Tuple([gym_spaces.Discrete(2), Opaque()]))
    with pytest.raises(EnvError, match="not text"):
        spaces.describe(gym_spaces.Dict({1: gym_spaces.Discrete(2)}))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("space", "value"),
    [
        (gym_spaces.Box(0, 1, (2,)), "text"),
        (gym_spaces.Box(0, 1, (2,)), [[1], [2, 3]]),
        (gym_spaces.Box(0, 1, (2,)), [None, 1]),
        (gym_spaces.MultiDiscrete([3, 3]), [1.5, 1]),
        (gym_spaces.MultiBinary(2), [300, 1]),
        (gym_spaces.Dict(a=gym_spaces.Discrete(2)), {"b": 1}),
        (gym_spaces.Dict(a=gym_spaces.Discrete(2)), [1]),
        (gym_spaces.Tuple([gym_spaces.Discrete(2)]), [1, 2]),
        (gym_spaces.OneOf([gym_spaces.Discrete(2)]), [1, 0]),
        (gym_spaces.OneOf([gym_spaces.Discrete(2)]), ["0", 0]),
        (gym_spaces.Graph(gym_spaces.Box(0, 1, (1,)), None), [1]),
    ],
    ids=str,
)
def test_a_value_of_another_structure_is_refused(space: Space, value: Any) -> None:
    with pytest.raises(EnvError):
        spaces.element(space, value)


def test_plain_copies_arrays_and_refuses_objects() -> None:
    array = np.zeros(2)
    plain: Any = spaces.plain({"a": (array, np.float64(1.5))})
    array[0] = 1
    assert plain["a"][0].tolist() == [0, 0]
    assert type(plain["a"][1]) is float
    assert spaces.plain(np.array([1, "x"], dtype=object)) == [1, "x"]
    for odd in (object(), 1 << 70, {1, 2}):
        with pytest.raises(EnvError, match="cannot leave"):
            spaces.plain(odd)


def test_every_action_of_a_finite_space_once() -> None:
    pair = gym_spaces.Tuple([gym_spaces.Discrete(2), gym_spaces.Discrete(3, start=5)])
    assert spaces.enumerate_actions(gym_spaces.Discrete(3, start=2)) == [2, 3, 4]
    assert spaces.enumerate_actions(pair) == [[0, 5], [0, 6], [0, 7], [1, 5], [1, 6], [1, 7]]
    for space, number in (
        (gym_spaces.MultiDiscrete([2, 3], start=[1, -1]), 6),
        (gym_spaces.MultiBinary([2, 2]), 16),
        (pair, 6),
    ):
        actions = [spaces.element(space, action) for action in spaces.enumerate_actions(space)]
        assert len({str(action) for action in actions}) == number
        assert all(space.contains(action) for action in actions)


@pytest.mark.parametrize(
    "space",
    [
        gym_spaces.Discrete(5000),
        gym_spaces.MultiDiscrete([100, 100]),
        gym_spaces.MultiBinary(64),
        gym_spaces.Box(0, 1),
        gym_spaces.Text(3),
        gym_spaces.Tuple([gym_spaces.Discrete(2), gym_spaces.Box(0, 1)]),
    ],
    ids=str,
)
def test_spaces_that_are_infinite_or_too_large_are_not_enumerated(space: Space) -> None:
    with pytest.raises(EnvError):
        spaces.enumerate_actions(space)


def test_masks_choose_among_actions() -> None:
    space = gym_spaces.Discrete(4, start=10)
    mask = np.array([0, 1, 0, 1], dtype=np.int8)
    assert spaces.enumerate_actions(space, mask) == [11, 13]
    assert spaces.enumerate_actions(space, [True, False, False, False]) == [10]
    assert spaces.enumerate_actions(space, np.zeros(4)) == [10, 11, 12, 13]
    generator = np.random.default_rng(0)
    assert {spaces.sample(space, generator, mask) for _ in range(50)} == {11, 13}
    assert {spaces.sample(space, generator, np.zeros(4)) for _ in range(50)} == {10, 11, 12, 13}
    pair = gym_spaces.MultiDiscrete([2, 2])
    masks = (np.array([0, 1], dtype=np.int8), np.array([1, 0], dtype=np.int8))
    assert spaces.sample(pair, generator, masks).tolist() == [1, 0]  # type: ignore[arg-type]
    for bad in (np.ones(3), np.ones((2, 2)), "mask"):
        with pytest.raises(EnvError, match="mask"):
            spaces.enumerate_actions(space, bad)
    with pytest.raises(EnvError, match="mask"):
        spaces.enumerate_actions(pair, np.ones(4))
    with pytest.raises(EnvError, match="mask"):
        spaces.sample(pair, generator, np.ones(4))
