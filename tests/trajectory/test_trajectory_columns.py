"""Spaces become Arrow types, and values survive the way through Parquet exactly or are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gymnasium import spaces

from rollout.errors import SinkError
from rollout.trajectory.columns import list_to_arrow, space_field, values_to_arrow
from rollout.trajectory.numpy_batches import column_to_numpy, to_numpy

SPACES: list[tuple[spaces.Space[Any], pa.DataType]] = [
    (spaces.Discrete(5, start=-2), pa.int64()),
    (spaces.Box(-1, 1, (2, 3), np.float32), pa.list_(pa.float32(), 6)),
    (spaces.Box(0, 255, (4, 4, 3), np.uint8), pa.list_(pa.uint8(), 48)),
    (spaces.Box(-np.inf, np.inf, (), np.float64), pa.list_(pa.float64(), 1)),
    (spaces.MultiBinary((2, 2)), pa.list_(pa.int8(), 4)),
    (spaces.MultiDiscrete([3, 4]), pa.list_(pa.int64(), 2)),
    (spaces.Text(8), pa.string()),
    (spaces.Sequence(spaces.Discrete(3)), pa.list_(pa.int64())),
    (spaces.Sequence(spaces.Box(0, 1, (2,)), stack=True), pa.list_(pa.list_(pa.float32(), 2))),
    (
        spaces.Dict(position=spaces.Box(0, 1, (2,)), kind=spaces.Discrete(3)),
        pa.struct([("position", pa.list_(pa.float32(), 2)), ("kind", pa.int64())]),
    ),
    (
        spaces.Tuple([spaces.Discrete(2), spaces.Tuple([spaces.Text(3), spaces.Dict({})])]),
        pa.struct([("f0", pa.int64()), ("f1", pa.struct([("f0", pa.string()), ("f1", pa.bool_())]))]),
    ),
    (
        spaces.OneOf([spaces.Discrete(2), spaces.Box(0, 1, (1,))]),
        pa.struct([("choice", pa.int64()), ("f0", pa.int64()), ("f1", pa.list_(pa.float32(), 1))]),
    ),
]


def through_parquet(space: spaces.Space[Any], values: list[Any]) -> tuple[pa.Field, pa.Array]:
    field = space_field(space, "value")
    array = values_to_arrow(space, values)
    array.validate(full=True)
    assert array.type == field.type
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays([array], schema=pa.schema([field])), sink)
    table = pq.read_table(pa.BufferReader(sink.getvalue()))
    assert table.schema.field(0).equals(field, check_metadata=True)
    assert table.column(0).combine_chunks().equals(array)
    return table.schema.field(0), table.column(0).combine_chunks()


@pytest.mark.parametrize(("space", "kind"), SPACES, ids=lambda value: str(value)[:40])
def test_every_space_has_its_type_and_keeps_nulls(space: spaces.Space[Any], kind: pa.DataType) -> None:
    space.seed(0)
    values = [space.sample() for _ in range(5)]
    field, array = through_parquet(space, [values[0], None, *values[1:]])
    assert field.type == kind
    assert [value is None for value in array.to_pylist()] == [False, True, False, False, False, False]
    assert through_parquet(space, [])[1].to_pylist() == []


def test_arrays_come_back_in_their_shape() -> None:
    space = spaces.Dict(image=spaces.Box(0, 255, (2, 3), np.uint8), step=spaces.Discrete(9))
    space.seed(1)
    values = [space.sample() for _ in range(4)]
    field, array = through_parquet(space, values)
    back: Any = column_to_numpy(field, array)
    assert back["image"].dtype == np.uint8
    np.testing.assert_array_equal(back["image"], np.stack([value["image"] for value in values]))
    np.testing.assert_array_equal(back["step"], [value["step"] for value in values])


def test_null_rows_of_a_fixed_size_list_are_zeros_with_a_mask() -> None:
    space = spaces.Box(0, 1, (2,), np.float32)
    field, array = through_parquet(space, [np.ones(2, np.float32), None, np.full(2, 0.5, np.float32)])
    batch = to_numpy(pa.RecordBatch.from_arrays([array], schema=pa.schema([field])))
    np.testing.assert_array_equal(batch["value"], [[1, 1], [0, 0], [0.5, 0.5]])
    np.testing.assert_array_equal(batch["value_mask"], [True, False, True])


def test_tuples_and_lists_are_as_good_as_arrays() -> None:
    assert values_to_arrow(spaces.Box(0, 9, (2,), np.int32), [[1, 2], (3, 4)]).to_pylist() == [[1, 2], [3, 4]]
    assert values_to_arrow(spaces.Tuple([spaces.Discrete(2)]), [[1], (0,)]).to_pylist() == [
        {"f0": 1},
        {"f0": 0},
    ]
    assert values_to_arrow(spaces.Discrete(4), [np.int64(3), np.array(2)]).to_pylist() == [3, 2]


@pytest.mark.parametrize(
    ("space", "value"),
    [
        (spaces.Discrete(3), 1.5),
        (spaces.Discrete(3), True),
        (spaces.Discrete(3), "1"),
        (spaces.Discrete(3), 2**63),
        (spaces.Discrete(3), np.array([1, 2])),
        (spaces.Box(0, 1, (2,)), [1.0, 2.0, 3.0]),
        (spaces.Box(0, 1, (2,)), 1.0),
        (spaces.Box(0, 1, (1,)), ["a"]),
        (spaces.Box(0, 1, (1,)), [1e300]),
        (spaces.Box(0, 255, (1,), np.uint8), [256]),
        (spaces.Box(0, 255, (1,), np.uint8), [0.5]),
        (spaces.Box(0, 255, (1,), np.uint8), [float("nan")]),
        (spaces.Text(3), 3),
        (spaces.Text(3), "\ud800"),
        (spaces.Dict(a=spaces.Discrete(2)), {"b": 1}),
        (spaces.Dict(a=spaces.Discrete(2)), [1]),
        (spaces.Tuple([spaces.Discrete(2)]), [1, 1]),
        (spaces.Tuple([spaces.Discrete(2)]), "1"),
        (spaces.OneOf([spaces.Discrete(2)]), (1, 0)),
        (spaces.Sequence(spaces.Discrete(2)), 3),
    ],
)
def test_what_does_not_fit_is_refused(space: spaces.Space[Any], value: Any) -> None:
    with pytest.raises(SinkError, match="does not fit the space"):
        values_to_arrow(space, [space.sample(), value])


def test_a_space_without_a_type_is_named() -> None:
    with pytest.raises(SinkError, match="Graph"):
        space_field(spaces.Graph(spaces.Discrete(2), None))
    with pytest.raises(SinkError, match="Graph"):
        space_field(spaces.Dict(inner=spaces.Graph(spaces.Discrete(2), None)))


def test_lists_of_actions_keep_missing_apart_from_empty() -> None:
    array = list_to_arrow(spaces.Box(0, 1, (2,)), [None, [], [[0, 1], [1, 0]]])
    assert array.to_pylist() == [None, [], [[0.0, 1.0], [1.0, 0.0]]]
