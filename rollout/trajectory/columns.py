"""Gymnasium spaces as Arrow types, and their values as Arrow arrays.

| space | type |
|---|---|
| Discrete | int64 |
| Box, MultiBinary, MultiDiscrete | fixed-size list of the space's dtype, flattened in C order |
| Text, and any other space of strings | string |
| Dict | struct with the space's keys |
| Tuple | struct with fields `f0`, `f1`, ... |
| Sequence | list |
| OneOf | struct with `choice` and nullable `f0`, `f1`, ... |
| an empty Dict or Tuple | bool, always false: Parquet has no empty structs |

The metadata of a field holds the shape of a fixed-size list (`shape`, as JSON), at any depth. A value is
stored exactly or refused: the one loss allowed is that of narrowing a finite float. That a value lies within
the bounds of its space is not checked here.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
import pyarrow as pa
from gymnasium import spaces
from gymnasium.vector.utils import iterate

from rollout.errors import SinkError
from rollout.trajectory.schema import SHAPE_KEY, list_of
from rollout.types import Value

__all__ = ["ints_to_arrow", "list_to_arrow", "space_field", "values_to_arrow"]

_Space = spaces.Space[Any]


def space_field(space: _Space, name: str = "element") -> pa.Field:
    """The nullable field that holds values of a space.

    Raises:
        SinkError: The space, or one inside it, has no Arrow type.
    """
    metadata: dict[bytes, bytes] | None = None
    match space:
        case spaces.Discrete():
            kind = pa.int64()
        case spaces.Box() | spaces.MultiBinary() | spaces.MultiDiscrete():
            kind = list_of(_arrow_dtype(space), math.prod(_shape(space)))
            metadata = {SHAPE_KEY: json.dumps(_shape(space)).encode()}
        case spaces.Dict() | spaces.Tuple():
            children = _children(space)
            kind = pa.struct([space_field(s, key) for key, s in children]) if children else pa.bool_()
        case spaces.OneOf():
            choices = [space_field(s, key) for key, s in _children(space)]
            kind = pa.struct([pa.field("choice", pa.int64()), *choices])
        case spaces.Sequence():
            kind = list_of(space_field(space.feature_space))
        case _ if space.dtype is not None and space.dtype.kind == "U":
            kind = pa.string()
        case _:
            raise SinkError(f"a {type(space).__name__} space has no column type: wrap it into another one")
    return pa.field(name, kind, metadata=metadata)


def values_to_arrow(space: _Space, values: Sequence[Value]) -> pa.Array:
    """An array of `space_field(space).type` with one entry per value; None becomes null.

    Raises:
        SinkError: A value does not fit the type of its space.
    """
    try:
        return _convert(space, values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, KeyError, IndexError) as error:
        raise SinkError.wrap(error, f"a value does not fit the space {space}") from error


def list_to_arrow(space: _Space, lists: Sequence[Sequence[Value] | None]) -> pa.Array:
    """An array of lists of values of a space; None becomes null.

    Raises:
        SinkError: As `values_to_arrow`.
    """
    lengths = np.fromiter((0 if values is None else len(values) for values in lists), np.int64, len(lists))
    flat = values_to_arrow(space, [value for values in lists if values is not None for value in values])
    kind = list_of(space_field(space))
    return pa.ListArray.from_arrays(_offsets(lengths), flat, type=kind, mask=_mask(lists))


def ints_to_arrow(values: Sequence[object]) -> pa.Array:
    """An int64 array; unlike `pa.array(values, pa.int64())` it refuses fractions instead of cutting them."""
    array = pa.array(values)
    if pa.types.is_boolean(array.type):
        raise pa.ArrowTypeError("expected integers, got booleans")
    return array.cast(pa.int64())


def _convert(space: _Space, values: Sequence[Value]) -> pa.Array:
    match space:
        case spaces.Discrete():
            return ints_to_arrow([v.item() if isinstance(v, np.ndarray) else v for v in values])
        case spaces.Box() | spaces.MultiBinary() | spaces.MultiDiscrete():
            return _fixed_size_lists(space, values)
        case spaces.Dict() | spaces.Tuple():
            return _structs(space, values)
        case spaces.OneOf():
            return _one_of(space, values)
        case spaces.Sequence():
            return _sequences(space, values)
        case _:
            if not all(v is None or isinstance(v, str) for v in values):
                raise TypeError("expected text")
            return pa.array(values, pa.string())


def _fixed_size_lists(space: _Space, values: Sequence[Value]) -> pa.Array:
    shape, dtype = _shape(space), np.dtype(cast("Any", space.dtype))
    kind = space_field(space).type
    present = [v for v in values if v is not None]
    stacked = np.asarray(present, dtype=None if present else dtype)
    if stacked.shape != (len(present), *shape) and present:
        raise ValueError(f"expected the shape {shape}, got {stacked.shape[1:]}")
    exact = _exact_cast(stacked, dtype).reshape(len(present), -1 if present else math.prod(shape))
    if len(present) == len(values):
        return pa.FixedSizeListArray.from_arrays(pa.array(exact.reshape(-1)), type=kind)
    rows = np.zeros((len(values), math.prod(shape)), dtype)
    rows[[i for i, v in enumerate(values) if v is not None]] = exact
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), type=kind, mask=_mask(values))


def _exact_cast(array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"expected {dtype}, got {array.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype)
    if array.dtype.kind == "f" and dtype.kind == "f":
        exact = np.array_equal(np.isfinite(array), np.isfinite(result))
    else:
        exact = np.array_equal(result, array)
    if not exact:
        raise ValueError(f"a value of type {array.dtype} cannot be kept as {dtype}")
    return result


def _structs(space: spaces.Dict[Any] | spaces.Tuple[Any], values: Sequence[Value]) -> pa.Array:
    children = _children(space)
    if not children:
        return pa.array([None if v is None else False for v in values], pa.bool_())
    for value in values:
        if value is None:
            continue
        if isinstance(space, spaces.Dict):
            if not isinstance(value, Mapping) or value.keys() != space.spaces.keys():
                raise ValueError(f"expected the keys {list(space.spaces)}")
        elif not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(children):
            raise ValueError(f"expected {len(children)} values")
    keys = list(space.spaces) if isinstance(space, spaces.Dict) else range(len(children))
    rows = cast("Sequence[Any]", values)
    arrays = [
        _convert(child, [None if row is None else row[key] for row in rows])
        for key, (_, child) in zip(keys, children, strict=True)
    ]
    fields = [space_field(child, name) for name, child in children]
    return pa.StructArray.from_arrays(arrays, fields=fields, mask=_mask(values))


def _one_of(space: spaces.OneOf[Any], values: Sequence[Value]) -> pa.Array:
    rows = cast("Sequence[tuple[int, Value] | None]", values)
    choices = [None if row is None else int(row[0]) for row in rows]
    if any(c is not None and not 0 <= c < len(space.spaces) for c in choices):
        raise ValueError(f"expected a choice below {len(space.spaces)}")
    arrays = [pa.array(choices, pa.int64())]
    fields = [pa.field("choice", pa.int64())]
    for index, (name, child) in enumerate(_children(space)):
        chosen = [row[1] if row is not None and int(row[0]) == index else None for row in rows]
        arrays.append(_convert(child, chosen))
        fields.append(space_field(child, name))
    return pa.StructArray.from_arrays(arrays, fields=fields, mask=_mask(values))


def _sequences(space: spaces.Sequence, values: Sequence[Value]) -> pa.Array:
    feature = space.feature_space

    def items(value: Any) -> Sequence[Any]:
        return list(iterate(feature, value)) if space.stack else value

    lists = [None if value is None else items(value) for value in values]
    lengths = np.fromiter((0 if row is None else len(row) for row in lists), np.int64, len(lists))
    flat = _convert(feature, list(chain.from_iterable(row for row in lists if row is not None)))
    kind = list_of(space_field(feature))
    return pa.ListArray.from_arrays(_offsets(lengths), flat, type=kind, mask=_mask(values))


def _children(space: spaces.Dict[Any] | spaces.Tuple[Any] | spaces.OneOf[Any]) -> list[tuple[str, _Space]]:
    if isinstance(space, spaces.Dict):
        return list(space.spaces.items())
    return [(f"f{index}", child) for index, child in enumerate(space.spaces)]


def _offsets(lengths: np.ndarray[Any, Any]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())


def _mask(values: Sequence[object]) -> pa.Array | None:
    """Which entries are null; None if none is."""
    missing = [value is None for value in values]
    return pa.array(missing) if any(missing) else None


def _shape(space: _Space) -> tuple[int, ...]:
    shape = space.shape
    if shape is None:
        raise SinkError(f"the space {space} has no fixed shape")
    return tuple(int(size) for size in shape)


def _arrow_dtype(space: _Space) -> pa.DataType:
    try:
        return pa.from_numpy_dtype(cast("Any", space.dtype))
    except pa.ArrowNotImplementedError as error:
        raise SinkError(f"the space {space} has a dtype without a column type") from error
