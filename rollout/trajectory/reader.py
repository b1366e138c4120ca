"""Reading a run: its committed rows as Arrow data.

Only what the manifest names is read. A commit of which a file is missing or has another size or checksum is
left out as a whole, so that no episode is ever seen without some of its rows; it is counted in `problems`.
So is everything else in the folder that was skipped.

Columns that an older schema version lacks are null.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs

from rollout.errors import SinkError
from rollout.trajectory.batch import Schemas
from rollout.trajectory.manifest import Committed, FileEntry, Manifest, Problem
from rollout.trajectory.numpy_batches import Batch, to_numpy
from rollout.trajectory.schema import TABLES, TableName, check_table, readable_schema
from rollout.trajectory.storage import Location, Storage

__all__ = ["OpenRun", "Scan", "open_run", "scan"]


def scan(
    path: Location,
    table: str = "steps",
    columns: Sequence[str] | None = None,
    filter: pc.Expression | None = None,
    *,
    filesystem: fs.FileSystem | None = None,
    verify: bool = False,
) -> Scan:
    """Opens a table of a run, as far as it is committed now.

    Args:
        path: Folder of the run: a local path or a URI of `pyarrow.fs`.
        table: "episodes", "steps" or "nodes".
        columns: Only these, in this order; all by default.
        filter: Only rows for which this is true, e.g. `pyarrow.compute.field("depth") < 3`.
        filesystem: File system of `path`, if it is not to be found from the path.
        verify: Read every file once to compare its checksum, instead of its size alone. What is altered
            without a change of size is otherwise found when it is read, and raises.

    Raises:
        SinkError: There is no run, table or column of that name, or the storage cannot be read.
    """
    name = check_table(table)
    run = open_run(path, filesystem=filesystem, verify=verify)
    schema = readable_schema(name, run.schemas)
    for column in columns or ():
        if column not in schema.names:
            raise SinkError(f"{name} has no column {column!r}; it has {', '.join(schema.names)}")
    return Scan(run.storage, name, schema, run.commits, columns, filter, run.problems)


@dataclass(frozen=True, slots=True)
class OpenRun:
    """What is committed of a run, and whole.

    Attributes:
        storage: Its folder.
        run_id: Its id.
        schemas: Record form of its tables, as declared.
        spaces: Its spaces, as JSON text of `rollout.trajectory.space_json`; empty if not declared.
        commits: In order, without those that others supersede.
        problems: What was skipped.
    """

    storage: Storage
    run_id: str
    schemas: Schemas
    spaces: Mapping[str, str]
    commits: tuple[Committed, ...]
    problems: tuple[Problem, ...]


def open_run(path: Location, *, filesystem: fs.FileSystem | None = None, verify: bool = False) -> OpenRun:
    """Reads the manifest of a run and looks at its files; the arguments are those of `scan`.

    Raises:
        SinkError: There is no run, or the storage cannot be read.
    """
    storage = Storage.of(path, filesystem)
    manifest = Manifest(storage)
    manifest.refresh()
    if manifest.schemas is None or manifest.run_id is None:
        storage.check_bucket()
        raise SinkError(f"{storage} holds no run: it has no manifest that says what its tables are")
    sizes = {file: size for each in TABLES for file, size in storage.files(each).items()}
    committed_files = {entry.name for one in manifest.commits for entry in one.commit.files}
    problems = [
        *manifest.problems,
        *(
            Problem("uncommitted file", file, "not in the manifest: foreign, or not finished")
            for file in sorted(sizes.keys() - committed_files)
        ),
    ]
    whole = tuple(_whole_commits(storage, manifest.commits, sizes, verify, problems))
    return OpenRun(storage, manifest.run_id, manifest.schemas, manifest.spaces, whole, tuple(problems))


class Scan:
    """The committed rows of one table, in the order of their commits. Reads when asked, not before.

    Attributes:
        table: Which table.
        run_schema: All its columns.
        problems: What was skipped in the run's folder.
    """

    def __init__(
        self,
        storage: Storage,
        table: TableName,
        schema: pa.Schema,
        commits: Sequence[Committed],
        columns: Sequence[str] | None,
        row_filter: pc.Expression | None,
        problems: tuple[Problem, ...],
    ) -> None:
        self.table: TableName = table
        self.run_schema = schema
        self.problems = problems
        self._storage = storage
        self._commits = commits
        self._columns = None if columns is None else list(columns)
        self._filter = row_filter

    @property
    def schema(self) -> pa.Schema:
        """The columns of this scan."""
        if self._columns is None:
            return self.run_schema
        return pa.schema([self.run_schema.field(name) for name in self._columns])

    @property
    def filesystem(self) -> fs.FileSystem:
        """Where `files` lie."""
        return self._storage.filesystem

    def files(self) -> list[str]:
        """Full paths of the Parquet files, for readers that take files.

        Raises:
            SinkError: Some of them hold episodes that an earlier file has too (two writers raced in an object
                store): read through this class, which leaves them out.
        """
        if any(committed.excluded for committed in self._commits):
            raise SinkError("an episode is in two files of this run: read it by batches, not by files")
        return self.file_names()

    def parts(self) -> list[Scan]:
        """A scan for each committed file, in order: they pickle, so that other processes can read them."""
        return [
            Scan(
                self._storage,
                self.table,
                self.run_schema,
                [committed],
                self._columns,
                self._filter,
                self.problems,
            )
            for committed, _ in self._entries()
        ]

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        return sum(entry.num_bytes for _, entry in self._entries())

    def file_names(self) -> list[str]:
        """Full paths of the Parquet files, also of those that hold episodes which another one has too."""
        return [self._storage.path(entry.name) for _, entry in self._entries()]

    def dataset(self) -> ds.Dataset:
        """All columns and rows as a pyarrow dataset; projection and filter are the caller's.

        Raises:
            SinkError: As `files`.
        """
        return self._dataset(self.files())

    def to_batches(self, batch_size: int = 65_536) -> Iterator[pa.RecordBatch]:
        """The rows as record batches of at most `batch_size` rows, in order, without holding them all.

        Raises:
            SinkError: A file cannot be read, or was altered.
        """
        for paths, row_filter in self._groups():
            try:
                scanner = self._dataset(paths).scanner(
                    columns=self._columns,
                    filter=row_filter,
                    batch_size=batch_size,
                    batch_readahead=4,
                    fragment_readahead=1,
                    fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True),
                )
                for batch in scanner.to_batches():
                    if batch.num_rows:
                        yield batch
            except (OSError, pa.ArrowException) as error:
                raise self._storage.failure(error, f"cannot read {self.table} of {self._storage}") from error

    def to_table(self) -> pa.Table:
        """All rows at once.

        Raises:
            SinkError: As `to_batches`.
        """
        return pa.Table.from_batches(list(self.to_batches()), schema=self.schema)

    def to_numpy_batches(self, batch_size: int = 65_536) -> Iterator[Batch]:
        """The rows as dicts of numpy arrays, ready for `torch.as_tensor` where a column has no nulls.

        Fixed-size lists come back in the shape of their space, structs as dicts; see
        `rollout.trajectory.numpy_batches`.

        Raises:
            SinkError: As `to_batches`.
        """
        for batch in self.to_batches(batch_size):
            yield to_numpy(batch)

    def count_rows(self) -> int:
        """Rows that pass the filter; without one, none is read.

        Raises:
            SinkError: As `to_batches`.
        """
        if self._filter is None and not any(committed.excluded for committed in self._commits):
            return sum(entry.num_rows for _, entry in self._entries())
        first = self.run_schema.names[0]
        narrow = Scan(
            self._storage, self.table, self.run_schema, self._commits, [first], self._filter, self.problems
        )
        return sum(batch.num_rows for batch in narrow.to_batches())

    @cached_property
    def episode_ids(self) -> frozenset[str]:
        """Ids of all committed episodes, from the manifest."""
        return frozenset(id_ for committed in self._commits for id_ in committed.commit.episode_ids)

    def _entries(self) -> Iterator[tuple[Committed, FileEntry]]:
        for committed in self._commits:
            for entry in committed.commit.files:
                if entry.table == self.table:
                    yield committed, entry

    def _groups(self) -> Iterator[tuple[list[str], Any]]:
        """Runs of files that are read with one filter, in order."""
        paths: list[str] = []
        for committed, entry in self._entries():
            if not committed.excluded:
                paths.append(self._storage.path(entry.name))
                continue
            if paths:
                yield paths, self._filter
                paths = []
            others = ~pc.field("episode_id").isin(sorted(committed.excluded))
            both = others if self._filter is None else others & self._filter
            yield [self._storage.path(entry.name)], both
        if paths:
            yield paths, self._filter

    def _dataset(self, paths: Sequence[str]) -> ds.Dataset:
        try:
            return ds.dataset(
                list(paths), schema=self.run_schema, format="parquet", filesystem=self._storage.filesystem
            )
        except (OSError, pa.ArrowException) as error:
            raise self._storage.failure(error, f"cannot open {self.table} of {self._storage}") from error


def _whole_commits(
    storage: Storage,
    commits: Sequence[Committed],
    sizes: Mapping[str, int],
    verify: bool,
    problems: list[Problem],
) -> Iterator[Committed]:
    """The commits that count and whose files are all there; what others lack goes to `problems`."""
    for committed in commits:
        if committed.is_superseded:
            continue
        bad = [
            problem
            for entry in committed.commit.files
            if (problem := _check_file(storage, entry, sizes.get(entry.name), verify)) is not None
        ]
        if not bad:
            yield committed
            continue
        num_lost = len(committed.commit.episode_ids) - len(committed.excluded)
        problems += [
            Problem(problem.kind, problem.where, f"{problem.detail}; {num_lost} episodes are left out")
            for problem in bad
        ]


def _check_file(storage: Storage, entry: FileEntry, size: int | None, verify: bool) -> Problem | None:
    if size is None:
        return Problem("missing file", entry.name, "it was committed, and is not there")
    if size != entry.num_bytes:
        return Problem("damaged file", entry.name, f"{size} bytes instead of {entry.num_bytes}")
    if verify and zlib.crc32(storage.read(entry.name)) != entry.crc32:
        return Problem("damaged file", entry.name, "its checksum is wrong")
    return None
