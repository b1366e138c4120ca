"""Whole episodes of a run in a fixed order, a chunk at a time.

The order is (sample, group, task, episode id): that in which a run begins its episodes, whatever order they
ended in, so two runs of the same config and seed export in the same order, and the parts of a run are read
nearly one after the other. Episodes that failed are left out unless asked for.

Memory holds a few columns of all episodes, one chunk, and the parts that it came from, within a budget.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false
# The functions of pyarrow.compute are made when it is imported.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rollout.errors import SinkError
from rollout.trajectory.reader import OpenRun
from rollout.trajectory.schema import TableName, conform, readable_schema
from rollout.trajectory.storage import sink_error

__all__ = ["Chunk", "Selection", "Source", "split_of"]

CHUNK_ROWS = 100_000
CACHE_BYTES = 96 << 20
_KEYS = ("episode_id", "sample", "group_id", "task_id")
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which episodes are exported.

    Attributes:
        min_return: Only those that returned at least this.
        max_return: Only those that returned at most this.
        failed: Those that failed too.
    """

    min_return: float | None = None
    max_return: float | None = None
    failed: bool = False

    def mask(self, episodes: pa.Table) -> pa.ChunkedArray:
        """Which rows of the episodes table are selected; a missing return passes no bound."""
        keep = pc.is_valid(episodes["episode_id"])
        if not self.failed:
            keep = pc.and_(keep, pc.is_null(episodes["failure"]))
        for bound, compare in ((self.min_return, pc.greater_equal), (self.max_return, pc.less_equal)):
            if bound is not None:
                keep = pc.and_(keep, pc.fill_null(compare(episodes["return"], bound), False))
        return keep


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive episodes.

    Attributes:
        episodes: One row each, [E].
        steps: Rows of all their steps, in order.
        nodes: Rows of all their nodes, in order; none if they were not asked for.
        step_offsets: Steps of episode i are rows step_offsets[i] to step_offsets[i + 1], [E + 1].
        node_offsets: As step_offsets.
    """

    episodes: pa.Table
    steps: pa.Table
    nodes: pa.Table
    step_offsets: _Ints
    node_offsets: _Ints

    def split(self, is_test: npt.NDArray[np.bool_]) -> tuple[Chunk, Chunk]:
        """(episodes for training, episodes for testing)."""
        return self._take(np.flatnonzero(~is_test)), self._take(np.flatnonzero(is_test))

    def _take(self, which: _Ints) -> Chunk:
        steps, step_offsets = _ranges(self.step_offsets, which)
        nodes, node_offsets = _ranges(self.node_offsets, which)
        return Chunk(
            _take(self.episodes, which),
            _take(self.steps, steps),
            _take(self.nodes, nodes),
            step_offsets,
            node_offsets,
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """The tables of one commit, with the place of each episode in them."""

    tables: dict[TableName, pa.Table]
    offsets: dict[TableName, _Ints]
    num_bytes: int


class Source:
    """Reads the selected episodes of a run.

    Args:
        run: The run.
        selection: Which episodes.
        step_columns: Columns of `steps` that are needed.
        node_columns: Columns of `nodes` that are needed; empty for none.

    Raises:
        SinkError: A file cannot be read.
    """

    def __init__(
        self,
        run: OpenRun,
        selection: Selection,
        step_columns: Sequence[str],
        node_columns: Sequence[str] = (),
    ) -> None:
        self.run = run
        self._columns: dict[TableName, list[str]] = {
            "steps": ["episode_id", *step_columns],
            "nodes": ["episode_id", *node_columns] if node_columns else [],
        }
        self._cache: OrderedDict[int, _Part] = OrderedDict()
        self._order = self._find_order(selection)

    @property
    def num_episodes(self) -> int:
        """How many episodes are selected."""
        return self._order.num_rows

    def chunks(self) -> Iterator[Chunk]:
        """All selected episodes, in order.

        Raises:
            SinkError: A file cannot be read.
        """
        parts: _Ints = self._order["part"].to_numpy()
        rows: _Ints = self._order["row"].to_numpy()
        sizes: _Ints = self._order["length"].to_numpy() + 1
        start = 0
        while start < len(parts):
            stop = start + max(1, int(np.searchsorted(np.cumsum(sizes[start:]), CHUNK_ROWS, "right")))
            yield self._chunk(parts[start:stop], rows[start:stop])
            start = stop

    def _find_order(self, selection: Selection) -> pa.Table:
        tables: list[pa.Table] = []
        for index, committed in enumerate(self.run.commits):
            episodes = self._read(index, "episodes", [*_KEYS, "length", "return", "failure"])
            keep = selection.mask(episodes)
            if committed.excluded:
                is_other = pc.is_in(episodes["episode_id"], pa.array(sorted(committed.excluded)))
                keep = pc.and_(keep, pc.invert(is_other))
            rows = np.arange(episodes.num_rows)
            numbered = episodes.select([*_KEYS, "length"])
            numbered = numbered.append_column("part", pa.array(np.full(len(rows), index)))
            tables.append(numbered.append_column("row", pa.array(rows)).filter(keep))
        if not tables:
            names = [*_KEYS, "length", "part", "row"]
            return pa.table({name: pa.array([], pa.int64()) for name in names})
        order = pa.concat_tables(tables)
        keys = [(name, "ascending") for name in ("sample", "group_id", "task_id", "episode_id")]
        return order.take(pc.sort_indices(order, sort_keys=keys)).select(["length", "part", "row"])

    def _chunk(self, parts: _Ints, rows: _Ints) -> Chunk:
        """The episodes at `rows` of `parts`, in that order."""
        by_part = np.argsort(parts, kind="stable")
        gathered: dict[TableName, list[pa.Table]] = {"episodes": [], "steps": [], "nodes": []}
        lengths: dict[TableName, list[_Ints]] = {"episodes": [], "steps": [], "nodes": []}
        for index in np.unique(parts):
            part = self._part(int(index))
            which = rows[by_part][parts[by_part] == index]
            for name, table in part.tables.items():
                places, offsets = _ranges(part.offsets[name], which)
                gathered[name].append(_take(table, places))
                lengths[name].append(np.diff(offsets))
        back = np.argsort(by_part, kind="stable")
        ordered: dict[TableName, tuple[pa.Table, _Ints]] = {}
        for name, tables in gathered.items():
            places, offsets = _ranges(_offsets(np.concatenate(lengths[name])), back)
            ordered[name] = _take(pa.concat_tables(tables), places), offsets
        return Chunk(
            episodes=ordered["episodes"][0],
            steps=ordered["steps"][0],
            nodes=ordered["nodes"][0],
            step_offsets=ordered["steps"][1],
            node_offsets=ordered["nodes"][1],
        )

    def _part(self, index: int) -> _Part:
        part = self._cache.pop(index, None)
        if part is None:
            part = self._read_part(index)
        self._cache[index] = part
        while len(self._cache) > 1 and sum(one.num_bytes for one in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return part

    def _read_part(self, index: int) -> _Part:
        episodes = self._read(index, "episodes", None)
        tables: dict[TableName, pa.Table] = {"episodes": episodes}
        offsets: dict[TableName, _Ints] = {"episodes": np.arange(episodes.num_rows + 1)}
        for name, columns in self._columns.items():
            table = self._read(index, name, columns) if columns else _no_rows()
            tables[name] = table.drop_columns(["episode_id"])
            offsets[name] = _offsets(_count_rows(episodes["episode_id"], table["episode_id"]))
        return _Part(tables, offsets, sum(table.nbytes for table in tables.values()))

    def _read(self, index: int, name: TableName, columns: Sequence[str] | None) -> pa.Table:
        """Columns of the file of a table; no rows if the part has no such file."""
        schema = readable_schema(name, self.run.schemas)
        if columns is not None:
            schema = pa.schema([schema.field(column) for column in columns])
        for entry in self.run.commits[index].commit.files:
            if entry.table == name:
                storage = self.run.storage
                try:
                    with storage.filesystem.open_input_file(storage.path(entry.name)) as file:
                        found = pq.ParquetFile(file, page_checksum_verification=True)
                        present = [column for column in schema.names if column in found.schema_arrow.names]
                        return conform(found.read(columns=present).combine_chunks(), schema)
                except (OSError, pa.ArrowException) as error:
                    raise sink_error(error, f"cannot read {storage.path(entry.name)}") from error
        return schema.empty_table()


def split_of(task_ids: Sequence[str], test_fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which tasks are for testing, [N]: a function of the task's id and the seed alone.

    All episodes of a task are on the same side, in every export of every run.
    """
    shares: dict[str, float] = {}
    for task_id in task_ids:
        if task_id not in shares:
            digest = hashlib.blake2b(f"{seed}:{task_id}".encode(), digest_size=8).digest()
            shares[task_id] = int.from_bytes(digest, "little") / 2**64
    return np.array([shares[task_id] < test_fraction for task_id in task_ids], dtype=bool)


def _no_rows() -> pa.Table:
    return pa.table({"episode_id": pa.array([], pa.string())})


def _count_rows(episode_ids: pa.ChunkedArray, owners: pa.ChunkedArray) -> _Ints:
    """Rows of each episode, which lie together and in the episodes' order."""
    owner = pc.index_in(owners, value_set=episode_ids.combine_chunks())
    if owner.null_count or (np.diff(numbers := owner.to_numpy()) < 0).any():
        raise SinkError("the rows of a part do not lie in the order of its episodes")
    return np.bincount(numbers, minlength=len(episode_ids)).astype(np.int64)


def _offsets(counts: _Ints) -> _Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def _take(table: pa.Table, places: _Ints) -> pa.Table:
    """The rows at `places`; without a copy where they lie one after the other."""
    if len(places) and (np.diff(places) == 1).all():
        return table.slice(int(places[0]), len(places))
    return table.take(pa.array(places, pa.int64()))


def _ranges(offsets: _Ints, which: _Ints) -> tuple[_Ints, _Ints]:
    """(rows of the ranges `which`, one after the other; their offsets)."""
    counts = offsets[which + 1] - offsets[which]
    new = _offsets(counts)
    return np.arange(new[-1]) - np.repeat(new[:-1], counts) + np.repeat(offsets[which], counts), new
