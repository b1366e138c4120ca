"""Cells back to values, and digests that tell equal values from others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from rollout.errors import SinkError
from rollout.spaces import element, plain
from rollout.trajectory.columns import values_to_arrow
from rollout.trajectory.decode import value_of
from rollout.trajectory.digest import value_digest

SPACES: list[spaces.Space[Any]] = [
    spaces.Discrete(5, start=-2),
    spaces.Box(-1, 1, (2, 3), np.float32),
    spaces.Box(0, 255, (4, 4, 3), np.uint8),
    spaces.MultiBinary((2, 2)),
    spaces.MultiDiscrete([2, 3, 4]),
    spaces.Text(5),
    spaces.Dict(kind=spaces.Discrete(3), place=spaces.Box(0, 1, (2,)), none=spaces.Dict()),
    spaces.Tuple([spaces.Discrete(2), spaces.Tuple([spaces.MultiBinary(3)])]),
    spaces.OneOf([spaces.Discrete(2), spaces.Box(0, 1, (2,))]),
    spaces.Sequence(spaces.Tuple([spaces.Discrete(3), spaces.Box(0, 1, (2,))])),
    spaces.Sequence(spaces.Box(0, 1, (2,)), stack=True),
]


@pytest.mark.parametrize("space", SPACES, ids=lambda space: str(space)[:40])
def test_a_cell_becomes_the_value_that_was_written(space: spaces.Space[Any]) -> None:
    space.seed(0)
    for _ in range(20):
        value = space.sample()
        [cell] = values_to_arrow(space, [value]).to_pylist()
        back = value_of(space, cell)
        assert space.contains(element(space, back)), "a guest can act with it"
        assert value_digest(back) == value_digest(plain(value))


def test_a_cell_of_another_space_is_refused() -> None:
    for space, cell in ((spaces.Box(0, 1, (2,)), [1.0]), (spaces.Text(3), 4), (spaces.Discrete(3), "x")):
        with pytest.raises(SinkError, match="a row holds what is not of the space"):
            value_of(space, cell)


def test_equal_values_have_equal_digests_in_whatever_form_they_come() -> None:
    assert value_digest([1, (2.0, "a")]) == value_digest((np.int64(1), [np.float64(2), "a"]))
    assert value_digest({"a": 1, "b": True}) == value_digest({"b": np.bool_(True), "a": 1})
    strided = np.arange(8)[::2]
    assert value_digest(strided) == value_digest(strided.copy())
    assert value_digest(float("nan")) == value_digest(float("nan"))
    assert 0 <= value_digest(None) < 1 << 63


def test_different_values_have_different_digests() -> None:
    array = np.arange(4)
    values: list[Any] = [None, True, False, 0, 1, 1.0, -0.0, 0.0, "", "1", b"1", [], [[]], [1, 2], [12], {}]
    values += [{"a": 1}, {"a": [1]}, {"a": 2}, ["ab"], ["a", "b"], ["a", ["b"]]]
    values += [array, array.reshape(2, 2), array.astype(np.int32), array + 1]
    assert len({value_digest(value) for value in values}) == len(values)
