"""Rows to columns: checks finished trajectories and turns them into a batch.

What cannot be written is refused here, before it reaches the log: everything in the log can become Parquet.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false
# The functions of pyarrow.compute are made when it is imported.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rollout.errors import SinkError
from rollout.trajectory.batch import Schemas, TrajectoryBatch
from rollout.trajectory.columns import ints_to_arrow, list_to_arrow, space_field, values_to_arrow
from rollout.trajectory.rows import Trajectory
from rollout.trajectory.schema import (
    ACTION,
    FAILURE_TYPE,
    OBSERVATION,
    TABLES,
    TableName,
    list_of,
    record_schema,
)
from rollout.trajectory.space_json import space_to_json
from rollout.types import Failure, Value

if TYPE_CHECKING:
    import gymnasium

__all__ = ["TrajectoryEncoder", "info_to_json"]

_Converter: TypeAlias = "Callable[[list[Any]], pa.Array]"


class TrajectoryEncoder:
    """Makes batches of one run. Holds no state beyond the spaces; safe to use from many threads.

    Args:
        observation_space: Types the observation column.
        action_space: Types the action columns.

    Raises:
        SinkError: A space has no column type.
    """

    def __init__(self, observation_space: gymnasium.Space[Any], action_space: gymnasium.Space[Any]) -> None:
        self.spaces = {OBSERVATION: space_to_json(observation_space), ACTION: space_to_json(action_space)}
        observation, action = space_field(observation_space), space_field(action_space)
        self.schemas: Schemas = {name: record_schema(name, observation, action) for name in TABLES}
        by_space: dict[str, _Converter] = {
            OBSERVATION: partial(values_to_arrow, observation_space),
            ACTION: partial(values_to_arrow, action_space),
            "legal_actions": partial(list_to_arrow, action_space),
        }
        self._columns = {
            table: [_Column(field, by_space.get(field.name) or _converter(field)) for field in schema]
            for table, schema in self.schemas.items()
        }

    def encode(self, trajectories: Sequence[Trajectory], *, with_nodes: bool = True) -> TrajectoryBatch:
        """The batch of the trajectories, in order.

        Raises:
            SinkError: A trajectory is not whole, or a value does not fit its column, or a reward, value or
                probability is not finite. The message names the episode and the column.
        """
        for trajectory in trajectories:
            _check_steps(trajectory)
        try:
            return self._batch(trajectories, with_nodes)
        except SinkError as error:
            if len(trajectories) > 1:  # find out which one it is
                for trajectory in trajectories:
                    self.encode([trajectory], with_nodes=with_nodes)
            episode_id = trajectories[0].episode.episode_id if trajectories else "?"
            raise SinkError(f"episode {episode_id}: {error.message}") from error

    def _batch(self, trajectories: Sequence[Trajectory], with_nodes: bool) -> TrajectoryBatch:
        nodes = [trajectory.nodes if with_nodes else () for trajectory in trajectories]
        return TrajectoryBatch(
            episodes=self._table("episodes", [trajectory.episode for trajectory in trajectories]),
            steps=self._table("steps", [row for trajectory in trajectories for row in trajectory.steps]),
            nodes=self._table("nodes", [row for rows in nodes for row in rows]),
            num_steps=np.array([len(trajectory.steps) for trajectory in trajectories], np.int64),
            num_nodes=np.array([len(rows) for rows in nodes], np.int64),
        )

    def _table(self, table: TableName, rows: Sequence[object]) -> pa.RecordBatch:
        arrays: list[pa.Array] = []
        for column in self._columns[table]:
            values = list(map(column.get, rows))
            try:
                if all(value is None for value in values):
                    arrays.append(pa.nulls(len(values), column.field.type))
                else:
                    arrays.append(column.convert(values))
            except SinkError as error:
                raise SinkError(f"{table}.{column.field.name}: {error.message}") from error
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                raise SinkError.wrap(error, f"{table}.{column.field.name}") from error
        return pa.RecordBatch.from_arrays(arrays, schema=self.schemas[table])


class _Column:
    """How a column of a table is made from rows."""

    def __init__(self, field: pa.Field, convert: _Converter) -> None:
        self.field = field
        self.get = attrgetter("return_" if field.name == "return" else field.name)  # a keyword is no name
        self.convert = convert


def _converter(field: pa.Field) -> _Converter:
    if field.name in _BY_NAME:
        return _BY_NAME[field.name]
    if field.type == pa.int64():
        return ints_to_arrow
    if pa.types.is_float64(field.type):
        return partial(_finite_floats, kind=field.type)
    if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type):
        return partial(_finite_float_lists, kind=field.type)
    return partial(pa.array, type=field.type)


def info_to_json(info: Mapping[str, Value]) -> str:
    """JSON text of an environment's info: arrays as lists, bytes as hexadecimal text.

    JSON has no words for NaN and the infinities: they become the strings "NaN", "Infinity" and "-Infinity".
    What is of no known type becomes its `repr`, for an info is for reading, and must not cost an episode.

    Raises:
        SinkError: It contains itself.
    """
    if not info:
        return "{}"
    try:
        return json.dumps(info, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError):
        try:
            return json.dumps(_plain(info), allow_nan=False, separators=(",", ":"))
        except RecursionError as error:
            raise SinkError("an info contains itself") from error


def _plain(value: object) -> object:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else json.dumps(value)
        case bytes():
            return value.hex()
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case np.ndarray() | np.generic():
            return _plain(value.tolist()) if value.dtype.kind in "biufSU" else repr(value)
        case Iterable():
            return [_plain(item) for item in value]
        case _:
            return repr(value)


def _check_steps(trajectory: Trajectory) -> None:
    """Raises unless the steps are whole: t from 0, T + 1 of them, and no action in the last."""
    episode, steps = trajectory.episode, trajectory.steps
    if any(step.t != t for t, step in enumerate(steps)):
        raise SinkError(f"episode {episode.episode_id}: the steps do not count from 0 without a gap")
    if episode.failure is not None:
        return
    if len(steps) != episode.length + 1:
        raise SinkError(
            f"episode {episode.episode_id}: {episode.length} actions need {episode.length + 1} steps,"
            f" not {len(steps)}"
        )
    if any((step.action is None) != (step.t == episode.length) for step in steps):
        raise SinkError(f"episode {episode.episode_id}: the last step, and only it, has no action")


def _finite_floats(values: list[float | None], kind: pa.DataType) -> pa.Array:
    return _finite(pa.array(values, kind))


def _finite_float_lists(values: list[Sequence[float] | None], kind: pa.DataType) -> pa.Array:
    array = pa.array(values, kind)
    _finite(array.flatten())
    return array


def _finite(array: pa.Array) -> pa.Array:
    total = pc.sum(array).as_py()  # not finite if an item is not, and otherwise only by overflow
    if total is not None and not math.isfinite(total) and not pc.all(pc.is_finite(array)).as_py():
        raise SinkError("a value is not finite: what is not known is None")
    return array


def _failure(failure: Failure | None) -> dict[str, object] | None:
    if failure is None:
        return None
    return {"cause": failure.cause, "boundary": failure.boundary, "retryable": failure.retryable}


def _unix_times(values: list[float]) -> pa.Array:
    seconds = np.array(values, np.float64)
    if not np.isfinite(seconds).all():
        raise SinkError("a time is not finite")
    return pa.array((seconds * 1e6).round().astype("datetime64[us]"), pa.timestamp("us", tz="UTC"))


def _infos(values: list[Mapping[str, Value]]) -> pa.Array:
    return pa.array([info_to_json(info) for info in values], pa.string())


def _failures(values: list[Failure | None]) -> pa.Array:
    return pa.array([_failure(failure) for failure in values], FAILURE_TYPE)


def _failure_lists(values: list[Sequence[Failure]]) -> pa.Array:
    return pa.array([[_failure(one) for one in failures] for failures in values], list_of(FAILURE_TYPE))


def _int_lists(values: list[Sequence[int] | None]) -> pa.Array:
    lengths = [0 if row is None else len(row) for row in values]
    flat = ints_to_arrow([value for row in values if row is not None for value in row])
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    missing = [row is None for row in values]
    mask = pa.array(missing) if any(missing) else None
    return pa.ListArray.from_arrays(offsets, flat, type=list_of(pa.int64()), mask=mask)


_BY_NAME: Mapping[str, _Converter] = {
    "info": _infos,
    "failure": _failures,
    "earlier_failures": _failure_lists,
    "branch_path": _int_lists,
    "action_visits": _int_lists,
    "started_at": _unix_times,
}
