"""Rows back to values: the inverse of `rollout.trajectory.columns` for one cell.

What comes back is plain, as it crosses the guest channel: arrays of the space's type and shape, lists for
tuples and sequences, `[choice, value]` for OneOf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import concatenate, create_empty_array

from rollout.errors import SinkError
from rollout.types import Value

__all__ = ["value_of"]


def value_of(space: spaces.Space[Any], cell: Any) -> Value:
    """The value of a space that a cell holds.

    Args:
        space: The space of the column.
        cell: As pyarrow's `to_pylist` gives it.

    Raises:
        SinkError: The cell is not of the space.
    """
    try:
        return _value(space, cell)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise SinkError.wrap(error, f"a row holds what is not of the space {space}") from error


def _value(space: spaces.Space[Any], cell: Any) -> Value:
    match space:
        case spaces.Discrete():
            return int(cell)
        case spaces.Box() | spaces.MultiBinary() | spaces.MultiDiscrete():
            return np.asarray(cell, dtype=cast("Any", space.dtype)).reshape(space.shape)
        case spaces.Dict():
            return {key: _value(child, cell[key]) for key, child in space.spaces.items()}
        case spaces.Tuple():
            return [_value(child, cell[f"f{index}"]) for index, child in enumerate(space.spaces)]
        case spaces.OneOf():
            choice = int(cell["choice"])
            return [choice, _value(space.spaces[choice], cell[f"f{choice}"])]
        case spaces.Sequence():
            items = [_value(space.feature_space, item) for item in cell]
            return _stacked(space.feature_space, items) if space.stack else items
        case _:
            if not isinstance(cell, str):
                raise TypeError("expected text")
            return cell


def _stacked(feature: spaces.Space[Any], items: Sequence[Value]) -> Value:
    return cast("Value", concatenate(feature, items, create_empty_array(feature, len(items))))
