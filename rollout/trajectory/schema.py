"""The Arrow schemas of the three tables: one fixed schema for all files of a table.

A table has two forms. In its *record* form, which travels through the write-ahead log, it has the columns of
the row classes. In its *file* form it also has what the sink knows: run id, episode id, tree id and schema
version. Observations and actions are typed by the spaces of the run; all other columns are the same in
every run.

Changes between schema versions are additive: a new column is nullable, and readers see null where an older
file lacks it. A list's item is named `element`, as in Parquet's own specification, so that a schema survives
a round trip through a file unchanged.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import pyarrow as pa

from rollout.errors import SinkError

__all__ = [
    "ACTION",
    "FAILURE_TYPE",
    "OBSERVATION",
    "SCHEMA_VERSION",
    "SHAPE_KEY",
    "TABLES",
    "TableName",
    "check_table",
    "conform",
    "file_schema",
    "list_of",
    "readable_schema",
    "record_schema",
    "schema_from_bytes",
    "schema_to_bytes",
]

SCHEMA_VERSION = 2
"""Version of the tables that this package writes; older ones are read too.

2 added `fingerprint` and `image_digest` to episodes, and `observation_digest` to nodes.
"""

TableName: TypeAlias = Literal["episodes", "steps", "nodes"]
TABLES: tuple[TableName, ...] = ("episodes", "steps", "nodes")

SHAPE_KEY = b"shape"
"""Key of a field's metadata: the shape of a fixed-size list, as JSON."""

OBSERVATION = "observation"
ACTION = "action"


def list_of(value: pa.DataType | pa.Field, size: int = -1) -> pa.DataType:
    """A list type (of fixed size if given) with the item name of Parquet's specification."""
    item = value.with_name("element") if isinstance(value, pa.Field) else pa.field("element", value)
    return pa.list_(item, size)


FAILURE_TYPE = pa.struct([("cause", pa.string()), ("boundary", pa.string()), ("retryable", pa.bool_())])


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


_EPISODES = (
    _required("episode_id", pa.string()),
    _required("task_id", pa.string()),
    _required("group_id", pa.string()),
    _required("env_id", pa.string()),
    _required("engine", pa.string()),
    _required("search", pa.string()),
    _required("policy", pa.string()),
    _required("seed", pa.int64()),
    pa.field("return", pa.float64()),
    _required("length", pa.int64()),
    _required("started_at", pa.timestamp("us", tz="UTC")),
    _required("duration_s", pa.float64()),
    _required("sample", pa.int64()),
    _required("attempt", pa.int64()),
    _required("terminated", pa.bool_()),
    _required("truncated", pa.bool_()),
    pa.field("failure", FAILURE_TYPE),
    pa.field("earlier_failures", list_of(FAILURE_TYPE)),
    pa.field("parent_episode_id", pa.string()),
    pa.field("branch_path", list_of(pa.int64())),
    pa.field("checkpoint_id", pa.string()),
    pa.field("fingerprint", pa.string()),
    pa.field("image_digest", pa.string()),
)

_TARGETS = (
    pa.field("action_visits", list_of(pa.int64())),
    pa.field("policy_target", list_of(pa.float64())),
    pa.field("n_step_return", pa.float64()),
)


def _steps(observation: pa.Field, action: pa.Field) -> tuple[pa.Field, ...]:
    return (
        _required("t", pa.int64()),
        observation.with_name(OBSERVATION).with_nullable(False),
        action.with_name(ACTION),
        pa.field("reward", pa.float64()),
        pa.field("terminated", pa.bool_()),
        pa.field("truncated", pa.bool_()),
        _required("info", pa.string()),
        pa.field("state_hash", pa.string()),
        pa.field("checkpoint_id", pa.string()),
        pa.field("node_id", pa.int64()),
        pa.field("visits", pa.int64()),
        pa.field("value", pa.float64()),
        pa.field("legal_actions", list_of(action)),
        *_TARGETS,
        pa.field("rng_policy", pa.string()),
        pa.field("rng_seed", pa.int64()),
        pa.field("tokens", list_of(pa.int32())),
        pa.field("logprobs", list_of(pa.float32())),
        pa.field("duration_s", pa.float64()),
    )


def _nodes(action: pa.Field) -> tuple[pa.Field, ...]:
    return (
        _required("t", pa.int64()),
        _required("node_id", pa.int64()),
        pa.field("parent_id", pa.int64()),
        _required("depth", pa.int64()),
        action.with_name(ACTION),
        _required("visits", pa.int64()),
        pa.field("value", pa.float64()),
        pa.field("prior", pa.float64()),
        pa.field("reward", pa.float64()),
        _required("terminated", pa.bool_()),
        _required("truncated", pa.bool_()),
        pa.field("checkpoint_id", pa.string()),
        pa.field("state_hash", pa.string()),
        pa.field("rng_policy", pa.string()),
        pa.field("rng_seed", pa.int64()),
        pa.field("duration_s", pa.float64()),
        pa.field("private_bytes", pa.int64()),
        *_TARGETS,
        pa.field("failure", FAILURE_TYPE),
        pa.field("observation_digest", pa.int64()),
    )


_RUN_ID = _required("run_id", pa.string())
_EPISODE_ID = _required("episode_id", pa.string())
_ADDED_BEFORE: Mapping[TableName, tuple[pa.Field, ...]] = {
    "episodes": (_RUN_ID,),
    "steps": (_RUN_ID, _EPISODE_ID),
    "nodes": (_RUN_ID, _EPISODE_ID, _required("tree_id", pa.string())),
}
_ADDED_AFTER: Mapping[TableName, tuple[pa.Field, ...]] = {
    "episodes": (_required("schema_version", pa.int32()),),
    "steps": (),
    "nodes": (),
}


def record_schema(table: TableName, observation: pa.Field, action: pa.Field) -> pa.Schema:
    """The columns of the row class, in order; `observation` and `action` give type and metadata."""
    match table:
        case "episodes":
            return pa.schema(_EPISODES)
        case "steps":
            return pa.schema(_steps(observation, action))
        case "nodes":
            return pa.schema(_nodes(action))


def readable_schema(table: TableName, declared: Mapping[TableName, pa.Schema]) -> pa.Schema:
    """The file form that readers of a run see: every column of this version, then what only the run has.

    Args:
        table: Which table.
        declared: Record form of the run's tables, of any version.
    """
    steps = declared["steps"]
    current = record_schema(table, steps.field(OBSERVATION), steps.field(ACTION))
    newer = [field for field in declared[table] if field.name not in current.names]
    return file_schema(table, pa.schema([*current, *newer]))


def file_schema(table: TableName, record: pa.Schema) -> pa.Schema:
    """The schema of the Parquet files of a table, from that of its records."""
    return pa.schema([*_ADDED_BEFORE[table], *record, *_ADDED_AFTER[table]])


def check_table(name: str) -> TableName:
    """The name, if there is such a table.

    Raises:
        SinkError: There is none; the message names those there are.
    """
    for table in TABLES:
        if table == name:
            return table
    raise SinkError(f"there is no table {name!r}: a run has {', '.join(TABLES)}")


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Columns in the order of `schema`; those that an older version lacks are null.

    Raises:
        SinkError: A required column is missing, or a type differs.
    """
    columns: list[pa.ChunkedArray] = []
    for field in schema:
        index = table.schema.get_field_index(field.name)
        if index >= 0:
            column = table.column(index)
            if column.type != field.type:
                raise SinkError(f"column {field.name!r} has type {column.type}, not {field.type}")
        elif field.nullable:
            column = pa.chunked_array([pa.nulls(table.num_rows, field.type)], type=field.type)
        else:
            raise SinkError(f"the required column {field.name!r} is missing")
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def schema_to_bytes(schema: pa.Schema) -> bytes:
    """As an Arrow IPC message."""
    return schema.serialize().to_pybytes()


def schema_from_bytes(data: bytes) -> pa.Schema:
    """The inverse of `schema_to_bytes`.

    Raises:
        SinkError: The bytes are no schema.
    """
    try:
        return pa.ipc.read_schema(pa.py_buffer(data))
    except (pa.ArrowInvalid, OSError) as error:
        raise SinkError.wrap(error, "a schema is damaged") from error
