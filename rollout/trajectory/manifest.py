"""The manifest: the commit log of a run. A Parquet file that is not in it does not exist.

Records are JSON lines `{"crc32": ..., "record": {...}}`. The first says what the run's tables look like;
every other one commits a part: at most one Parquet file per table, with all rows of the episodes that it
names.

- On a local disk (also a shared one that honours `flock`) the manifest is one file, `manifest.jsonl`. A
  writer locks it, reads what others have committed, refuses to commit an episode twice, appends and syncs.
- An object store has neither append nor lock: there each commit is an object of its own in `manifest/`. Two
  writers may then commit the same episode at the same moment; readers take the first by name and leave out
  the other (`Committed.excluded`), so that no scan ever shows an episode twice.

A torn or altered line commits nothing; it is counted in `problems`, and the lines behind it still hold.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from rollout.errors import SinkError
from rollout.trajectory import faults
from rollout.trajectory.batch import Schemas
from rollout.trajectory.schema import (
    SCHEMA_VERSION,
    TABLES,
    TableName,
    check_table,
    schema_from_bytes,
    schema_to_bytes,
)
from rollout.trajectory.storage import Storage, fsync_folder, sink_error

__all__ = ["Commit", "Committed", "FileEntry", "Manifest", "Problem"]

_JOURNAL = "manifest.jsonl"
_SEGMENTS = "manifest"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a run's folder that was skipped.

    Attributes:
        kind: "torn manifest record", "missing file", "damaged file", "foreign file", ...
        where: The file.
        detail: One line.
    """

    kind: str
    where: str
    detail: str


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A Parquet file as it was committed.

    Attributes:
        table: Whose rows it holds.
        name: Relative to the run's folder.
        num_rows: Its rows.
        num_bytes: Its size.
        crc32: Of the whole file.
    """

    table: TableName
    name: str
    num_rows: int
    num_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Files that came to be together.

    Attributes:
        part: Unique name: writer and sequence number.
        files: At most one per table; a table without rows has none.
        episode_ids: The episodes that they hold, whole.
    """

    part: str
    files: tuple[FileEntry, ...]
    episode_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Committed:
    """A commit as readers see it.

    Attributes:
        commit: The commit.
        excluded: Episodes whose rows here do not count: an earlier commit has them.
    """

    commit: Commit
    excluded: frozenset[str]

    @property
    def is_superseded(self) -> bool:
        """Whether no row of it counts: another writer committed all its episodes at the same moment."""
        return len(self.excluded) == len(self.commit.episode_ids)


class Manifest:
    """The manifest of one run, as far as it was read. Not safe to use from many threads at once.

    Attributes:
        run_id: As declared; None before that.
        schemas: Record form of the tables, as declared; None before that.
        schema_version: Of the version that declared them.
        spaces: `observation` and `action`, as JSON text of `rollout.trajectory.space_json`, if declared.
        commits: In the order of the manifest, also those that are superseded.
        committed: Ids of all committed episodes.
        problems: What was skipped.
    """

    def __init__(self, storage: Storage) -> None:
        self.run_id: str | None = None
        self.schemas: Schemas | None = None
        self.schema_version = 0
        self.spaces: dict[str, str] = {}
        self.commits: list[Committed] = []
        self.committed: set[str] = set()
        self.problems: list[Problem] = []
        self._storage = storage
        self._consumed = 0
        self._seen_segments: set[str] = set()

    @property
    def exists(self) -> bool:
        """Whether the folder is that of a run."""
        return self.schemas is not None or bool(self.commits)

    def refresh(self) -> None:
        """Reads what was added since.

        Raises:
            SinkError: The storage cannot be read.
        """
        self._read_journal()
        for name in self._storage.files(_SEGMENTS):
            if name not in self._seen_segments and name.endswith(".jsonl"):
                self._take_lines(self._storage.read(name), name)
                self._seen_segments.add(name)

    def make_durable(self) -> None:
        """Puts what was read on disk: another writer may have died between writing a line and its sync.

        Raises:
            SinkError: The disk refused.
        """
        with self._exclusive() as journal:
            if journal >= 0:
                os.fsync(journal)

    def declare(
        self, run_id: str, schemas: Schemas, writer_id: str, spaces: Mapping[str, str] | None = None
    ) -> None:
        """Says what the tables look like, and which spaces they hold, unless that is said already.

        Raises:
            SinkError: The folder belongs to another run, or its tables have other types (another environment
                was played into it), or it cannot be written.
        """
        if self._storage.local is None:
            self._storage.make_folder(_SEGMENTS)
        with self._exclusive() as journal:
            self.refresh()
            if self.schemas is None:
                record = {
                    "kind": "tables",
                    "run_id": run_id,
                    "schema_version": SCHEMA_VERSION,
                    "schemas": {
                        name: base64.b64encode(schema_to_bytes(schema)).decode()
                        for name, schema in schemas.items()
                    },
                    "spaces": dict(spaces or {}),
                }
                self._append(journal, record, f"0-tables-{writer_id}")
                self.refresh()
        if self.run_id != run_id:
            raise SinkError(f"{self._storage.root} holds the run {self.run_id!r}, not {run_id!r}")
        _check_compatible(self.schemas or schemas, schemas)

    def commit(self, commit: Commit) -> frozenset[str]:
        """Commits a part, durably, unless an episode of it is committed already.

        Returns:
            The episodes that are committed already; empty if the part is now committed.

        Raises:
            SinkError: The manifest cannot be written; nothing was committed.
        """
        with self._exclusive() as journal:
            self.refresh()
            if taken := self.committed.intersection(commit.episode_ids):
                return frozenset(taken)
            self._append(journal, {"kind": "commit", **asdict(commit)}, commit.part)
            self.refresh()
        return frozenset()

    @contextlib.contextmanager
    def _exclusive(self) -> Generator[int, None, None]:
        """The locked journal as a descriptor; -1 where there is no journal and no lock."""
        if self._storage.local is None:
            yield -1
            return
        path = self._storage.local / _JOURNAL
        try:
            is_new = not path.exists()
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if is_new:
                    fsync_folder(path.parent)
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise sink_error(error, f"cannot write {path}") from error

    def _append(self, journal: int, record: Mapping[str, object], name: str) -> None:
        text = json.dumps(record, separators=(",", ":"))
        line = f'{{"crc32":{zlib.crc32(text.encode())},"record":{text}}}\n'.encode()
        if journal < 0:
            segment = f"{_SEGMENTS}/{name}.jsonl"
            self._storage.put(segment, line, "manifest")
            self._seen_segments.discard(segment)
            return
        size = os.lseek(journal, 0, os.SEEK_END)
        if size and os.pread(journal, 1, size - 1) != b"\n":
            line = b"\n" + line  # a writer died in the middle of its line
        try:
            faults.write_all(journal, line, "manifest.write")
            faults.point("manifest.fsync.before")
            os.fsync(journal)
            faults.point("manifest.fsync.after")
        except OSError:
            os.ftruncate(journal, size)
            raise

    def _read_journal(self) -> None:
        size = self._storage.size(_JOURNAL)
        if size is None or size <= self._consumed:
            return
        if self._storage.local is not None:
            try:
                with (self._storage.local / _JOURNAL).open("rb") as file:
                    file.seek(self._consumed)
                    data = file.read()
            except OSError as error:
                raise sink_error(error, f"cannot read {self._storage.path(_JOURNAL)}") from error
        else:
            data = self._storage.read(_JOURNAL)[self._consumed :]
        whole = data.rfind(b"\n") + 1
        if whole < len(data) and _parse_line(data[whole:]) is not None:
            whole = len(data)
        self._consumed += whole
        self._take_lines(data[:whole], _JOURNAL)

    def _take_lines(self, data: bytes, where: str) -> None:
        for line in data.split(b"\n"):
            if not line:
                continue
            record = _parse_line(line)
            try:
                if record is None:
                    raise SinkError("its checksum is wrong")
                self._take(record)
            except (SinkError, KeyError, TypeError, ValueError) as error:
                self.problems.append(Problem("torn manifest record", where, f"{len(line)} bytes: {error}"))

    def _take(self, record: dict[str, Any]) -> None:
        match record["kind"]:
            case "tables":
                if self.schemas is None:
                    encoded = record["schemas"]
                    self.schemas = {t: schema_from_bytes(base64.b64decode(encoded[t])) for t in TABLES}
                    self.run_id, self.schema_version = record["run_id"], record["schema_version"]
                    self.spaces = record.get("spaces", {})
            case "commit":
                files = tuple(_file_entry(**fields) for fields in record["files"])
                commit = Commit(record["part"], files, tuple(record["episode_ids"]))
                excluded = frozenset(self.committed.intersection(commit.episode_ids))
                self.commits.append(Committed(commit, excluded))
                self.committed.update(commit.episode_ids)
            case kind:
                raise SinkError(f"a record of the unknown kind {kind!r}")


def _file_entry(*, table: str, name: str, num_rows: int, num_bytes: int, crc32: int) -> FileEntry:
    return FileEntry(check_table(table), name, num_rows, num_bytes, crc32)


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
        text = json.dumps(found["record"], separators=(",", ":"))
        return found["record"] if zlib.crc32(text.encode()) == found["crc32"] else None
    except (ValueError, KeyError, TypeError):
        return None


def _check_compatible(declared: Schemas, offered: Schemas) -> None:
    """Raises unless rows of `offered` fit the files of a run that declared `declared`."""
    for table in TABLES:
        for field in declared[table]:
            index = offered[table].get_field_index(field.name)
            other: pa.Field | None = offered[table].field(index) if index >= 0 else None
            if other is None or not other.equals(field, check_metadata=True):
                offer = "missing" if other is None else other.type
                raise SinkError(
                    f"{table}.{field.name} is {field.type} in this run, not {offer}: it has other spaces"
                )
