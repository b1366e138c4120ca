"""Rolling: a finished log becomes Parquet files, which are then committed together.

The order is what makes it safe against a crash at any point: files first (each whole, under its own name or
not at all), then the manifest, and only then the log goes away. Whoever finds the log again, because a crash
came in between, rolls it again: under the same names if it was not committed, and not at all if it was.

The same code rolls the log of a living sink and recovers that of a dead one.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.errors import SinkError
from rollout.trajectory import faults
from rollout.trajectory.batch import Schemas, TrajectoryBatch, concat_tables, unpack_batch
from rollout.trajectory.manifest import Commit, FileEntry, Manifest
from rollout.trajectory.schema import OBSERVATION, TABLES, TableName, schema_from_bytes, schema_to_bytes
from rollout.trajectory.storage import Storage
from rollout.trajectory.wal import LogReader

__all__ = ["RollReport", "log_header", "log_schemas", "part_file", "roll_log", "write_parquet"]

_ZSTD_LEVEL = 3
_NO_DICTIONARY = frozenset({"tokens", "seed", "rng_seed", "checkpoint_id"})
"""Columns that hardly repeat: a dictionary would only be built to be thrown away."""


@dataclass(frozen=True, slots=True)
class RollReport:
    """What became of a log.

    Attributes:
        num_episodes: Episodes committed by this roll.
        num_rows: Their rows, in all tables.
        num_bytes: Size of the files.
        num_duplicates: Episodes that were committed already.
        torn_bytes: Length of the log's torn tail.
        num_damaged: Records that were lost in the middle of the log.
    """

    num_episodes: int = 0
    num_rows: int = 0
    num_bytes: int = 0
    num_duplicates: int = 0
    torn_bytes: int = 0
    num_damaged: int = 0


def log_header(run_id: str, schemas: Schemas) -> dict[str, object]:
    """What a log says of itself."""
    return {"run_id": run_id, "schemas": {name: schema_to_bytes(schema) for name, schema in schemas.items()}}


def log_schemas(path: Path, manifest: Manifest) -> Schemas:
    """The record form of the tables in a log, if it is a log of the manifest's run.

    Raises:
        SinkError: It is not, or its header is damaged.
    """
    header = LogReader(path).header()
    if header is None:
        raise SinkError(f"{path} is no log, or its header is damaged")
    if manifest.run_id is None or header.get("run_id") != manifest.run_id:
        raise SinkError(f"{path} is a log of the run {header.get('run_id')!r}, not {manifest.run_id!r}")
    try:
        return {name: schema_from_bytes(header["schemas"][name]) for name in TABLES}
    except (KeyError, TypeError) as error:
        raise SinkError.wrap(error, f"{path} has a header without schemas") from error


def part_file(table: TableName, part: str) -> str:
    """Name of a part's file, relative to the run's folder."""
    return f"{table}/{part}.parquet"


def roll_log(
    path: Path, storage: Storage, manifest: Manifest, written: Sequence[TrajectoryBatch] | None = None
) -> RollReport:
    """Commits every episode of a log that is not committed yet, and removes the log.

    The caller holds the log's lock, and nothing is appended any more.

    Args:
        path: The log.
        storage: The run's folder.
        manifest: Of the same run.
        written: What was appended to the log, if the caller still has it: then the log is not read.

    Raises:
        SinkError: It could not be done; the log is still there, and the call can be made again.
    """
    reader = LogReader(path)
    batches = _read_batches(reader, log_schemas(path, manifest)) if written is None else written
    commit = _commit(path.stem, batches, storage, manifest)
    num_duplicates = sum(len(batch.episode_ids) for batch in batches) - len(commit.episode_ids)
    if num_duplicates:
        manifest.make_durable()  # the log goes because of commits that others made
    faults.point("wal.delete.before")
    if reader.num_damaged:
        path.replace(path.with_suffix(".damaged"))  # more could be read from it by hand
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    faults.point("wal.delete.after")
    return RollReport(
        num_episodes=len(commit.episode_ids),
        num_rows=sum(entry.num_rows for entry in commit.files),
        num_bytes=sum(entry.num_bytes for entry in commit.files),
        num_duplicates=num_duplicates,
        torn_bytes=reader.torn_bytes,
        num_damaged=reader.num_damaged,
    )


def _read_batches(reader: LogReader, schemas: Schemas) -> list[TrajectoryBatch]:
    """What is in a log, each episode once: a write that was interrupted may have been made again."""
    batches: list[TrajectoryBatch] = []
    seen: set[str] = set()
    for payload in reader.records():
        batch = unpack_batch(payload, schemas).without(seen)
        seen.update(batch.episode_ids)
        batches.append(batch)
    return batches


def _commit(part: str, batches: Sequence[TrajectoryBatch], storage: Storage, manifest: Manifest) -> Commit:
    """Writes and commits what is not committed yet; the commit may be empty."""
    manifest.refresh()
    while True:
        fresh = [batch.without(manifest.committed) for batch in batches]
        fresh = [batch for batch in fresh if batch.episode_ids]
        if not fresh:
            if not any(committed.commit.part == part for committed in manifest.commits):
                for table in TABLES:  # what an interrupted roll of this log may have left
                    storage.delete(part_file(table, part))
            return Commit(part, (), ())
        commit = _write_part(part, fresh, storage, manifest)
        if not manifest.commit(commit):
            return commit


def _write_part(part: str, batches: list[TrajectoryBatch], storage: Storage, manifest: Manifest) -> Commit:
    if manifest.run_id is None or manifest.schemas is None:
        raise SinkError(f"{storage.root} has no manifest")
    files: list[FileEntry] = []
    for table in TABLES:
        rows = concat_tables(batches, table, manifest.run_id, manifest.schemas[table])
        name = part_file(table, part)
        if not rows.num_rows:
            storage.delete(name)  # an interrupted roll, or one that came second, may have had some
            continue
        data = write_parquet(rows)
        storage.put(name, data, f"part.{table}")
        files.append(FileEntry(table, name, rows.num_rows, len(data), zlib.crc32(data)))
    return Commit(part, tuple(files), tuple(id_ for batch in batches for id_ in batch.episode_ids))


def write_parquet(table: pa.Table) -> memoryview:
    """A table as a Parquet file of one row group, with checksums on its pages."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, table.num_rows),
        compression="zstd",
        compression_level=_ZSTD_LEVEL,
        use_dictionary=cast("Any", _dictionary_columns(table.schema)),  # a list of paths is fine too
        write_page_checksum=True,
    )
    return memoryview(sink.getvalue())


def _dictionary_columns(schema: pa.Schema) -> list[str]:
    """Paths of the leaf columns with values that repeat: text and integers, less those that do not."""
    return [
        path
        for field in schema
        if field.name not in _NO_DICTIONARY
        for path, kind in _leaves(field.name, field.type)
        if pa.types.is_string(kind) or (pa.types.is_integer(kind) and field.name != OBSERVATION)
    ]


def _leaves(path: str, kind: Any) -> list[tuple[str, Any]]:
    if pa.types.is_struct(kind):
        return [leaf for child in kind for leaf in _leaves(f"{path}.{child.name}", child.type)]
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return _leaves(f"{path}.list.element", kind.value_type)
    return [(path, kind)]
