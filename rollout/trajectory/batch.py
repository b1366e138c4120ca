"""Whole episodes in columns: the unit that travels through the sink.

A batch holds the three tables in record form (see `rollout.trajectory.schema`). The rows of its episodes lie
one after another in the order of `episodes`, and `num_steps` and `num_nodes` say how many rows each episode
has, so episodes can be told apart, dropped and put together without an id in every row.

Invariants, checked when a batch is made: the counts add up to the rows, episode ids are unique, and required
columns hold no null.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, cast

import msgpack
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rollout.errors import SinkError
from rollout.trajectory.rows import make_tree_id
from rollout.trajectory.schema import SCHEMA_VERSION, TABLES, TableName, conform, file_schema

__all__ = ["Schemas", "TrajectoryBatch", "concat_tables", "pack_batch", "unpack_batch"]

Schemas: TypeAlias = "dict[TableName, pa.Schema]"
"""A schema for each table."""

_CODEC = "lz4_raw"

_Counts: TypeAlias = "npt.NDArray[np.int64]"


@dataclass(frozen=True)
class TrajectoryBatch:
    """Any number of whole episodes.

    Attributes:
        episodes: One row per episode, [E].
        steps: Rows of all steps, [sum(num_steps)].
        nodes: Rows of all nodes, [sum(num_nodes)].
        num_steps: Steps of each episode, [E], int64.
        num_nodes: Nodes of each episode, [E], int64.

    Raises:
        SinkError: On making one that breaks an invariant of this module.
    """

    episodes: pa.RecordBatch
    steps: pa.RecordBatch
    nodes: pa.RecordBatch
    num_steps: _Counts
    num_nodes: _Counts

    def __post_init__(self) -> None:
        for name, counts, rows in (
            ("steps", self.num_steps, self.steps.num_rows),
            ("nodes", self.num_nodes, self.nodes.num_rows),
        ):
            if len(counts) != self.episodes.num_rows or (counts < 0).any() or counts.sum() != rows:
                raise SinkError(f"{rows} rows of {name} do not fit their counts per episode")
        if len(set(self.episode_ids)) != len(self.episode_ids):
            raise SinkError("an episode is in the same batch twice")
        for table in TABLES:
            batch = self.table(table)
            for field, column in zip(batch.schema, batch.columns, strict=True):
                if not field.nullable and column.null_count:
                    raise SinkError(f"{table}: the required column {field.name!r} is empty in a row")

    @cached_property
    def episode_ids(self) -> tuple[str, ...]:
        """The ids, in order."""
        return tuple(self.episodes.column("episode_id").to_pylist())

    @property
    def num_rows(self) -> int:
        """Rows of the three tables together."""
        return self.episodes.num_rows + self.steps.num_rows + self.nodes.num_rows

    @property
    def num_bytes(self) -> int:
        """Bytes that the columns take in memory."""
        return sum(self.table(table).nbytes for table in TABLES)

    def table(self, name: TableName) -> pa.RecordBatch:
        """One of the three tables, in record form."""
        return {"episodes": self.episodes, "steps": self.steps, "nodes": self.nodes}[name]

    def without(self, episode_ids: Collection[str]) -> TrajectoryBatch:
        """The batch less the given episodes; the same object if it has none of them."""
        keep = np.array([episode_id not in episode_ids for episode_id in self.episode_ids], dtype=bool)
        if keep.all():
            return self
        return TrajectoryBatch(
            episodes=self.episodes.filter(pa.array(keep)),
            steps=self.steps.filter(pa.array(np.repeat(keep, self.num_steps))),
            nodes=self.nodes.filter(pa.array(np.repeat(keep, self.num_nodes))),
            num_steps=self.num_steps[keep],
            num_nodes=self.num_nodes[keep],
        )


def concat_tables(
    batches: Sequence[TrajectoryBatch], table: TableName, run_id: str, schema: pa.Schema
) -> pa.Table:
    """One table of many batches in file form: with the columns that say where its rows belong.

    Args:
        batches: Any number of them, of the same schemas.
        table: Which table.
        run_id: The run.
        schema: Record form that the run's files have; columns that the batches lack are null.
    """
    if not batches:
        return file_schema(table, schema).empty_table()
    rows = pa.Table.from_batches([batch.table(table) for batch in batches])
    added: dict[str, pa.Array] = {"run_id": pa.repeat(pa.scalar(run_id), rows.num_rows)}
    if table == "episodes":
        added["schema_version"] = pa.repeat(pa.scalar(SCHEMA_VERSION, pa.int32()), rows.num_rows)
    else:
        ids = pa.concat_arrays([batch.episodes.column("episode_id") for batch in batches])
        counts = [batch.num_steps if table == "steps" else batch.num_nodes for batch in batches]
        owners = np.repeat(np.arange(len(ids)), np.concatenate(counts))
        added["episode_id"] = ids.take(pa.array(owners))
        if table == "nodes":
            added["tree_id"] = _tree_ids(ids, owners, rows.column("t").to_numpy())
    return conform(
        pa.table({**added, **dict(zip(rows.schema.names, rows.columns, strict=True))}),
        file_schema(table, schema),
    )


def _tree_ids(ids: pa.Array, owners: _Counts, moves: _Counts) -> pa.Array:
    """The tree of each node. A tree's nodes mostly lie together, so a name is made once for each stretch."""
    is_first = np.ones(len(owners), dtype=bool)
    is_first[1:] = (owners[1:] != owners[:-1]) | (moves[1:] != moves[:-1])
    starts = np.flatnonzero(is_first)
    names = [
        make_tree_id(episode_id, t)
        for episode_id, t in zip(
            ids.take(pa.array(owners[starts])).to_pylist(), moves[starts].tolist(), strict=True
        )
    ]
    return pa.array(names, pa.string()).take(pa.array(np.cumsum(is_first) - 1))


def pack_batch(batch: TrajectoryBatch) -> bytes:
    """A batch as bytes: a msgpack map that holds the tables as Arrow IPC messages, compressed with LZ4.

    LZ4, because a log is written once and read once or never: it takes half the time of zstd's fastest level
    on these columns. The length before compression comes first, as 8 bytes. The schemas are not in it: the
    log holds them once.
    """
    record: dict[str, object] = {
        "num_steps": batch.num_steps.tobytes(),
        "num_nodes": batch.num_nodes.tobytes(),
    }
    for table in TABLES:
        record[table] = memoryview(batch.table(table).serialize())
    plain = cast("bytes", msgpack.packb(record))
    return len(plain).to_bytes(8, "little") + pa.compress(plain, _CODEC, asbytes=True)


def unpack_batch(data: bytes, schemas: Schemas) -> TrajectoryBatch:
    """The inverse of `pack_batch`; the data is trusted to be what that made (the log has checksums).

    Raises:
        SinkError: The bytes are no batch of these schemas.
    """
    try:
        plain = pa.decompress(memoryview(data)[8:], int.from_bytes(data[:8], "little"), _CODEC)
        record: dict[str, Any] = msgpack.unpackb(plain)
        tables = {
            table: pa.ipc.read_record_batch(pa.py_buffer(record[table]), schemas[table]) for table in TABLES
        }
        return TrajectoryBatch(
            **tables,
            num_steps=np.frombuffer(record["num_steps"], np.int64),
            num_nodes=np.frombuffer(record["num_nodes"], np.int64),
        )
    except (ValueError, KeyError, TypeError, OSError, OverflowError, MemoryError, pa.ArrowException) as error:
        raise SinkError.wrap(error, "a record of the log cannot be read") from error
