"""Writers of an export: a Parquet file or a file of JSON lines per split.

A writer takes chunks and says how many records it made of each; `close` finishes the file.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false
# The functions of pyarrow.compute are made when it is imported.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.trajectory.export.context import Context
from rollout.trajectory.export.source import Chunk

__all__ = ["LinesWriter", "ParquetWriter", "Writer"]


class Writer(Protocol):
    """Writes one split of an export."""

    def write(self, chunk: Chunk) -> int:
        """Writes what the format makes of a chunk, and returns the number of records.

        Raises:
            OSError: It cannot be written.
        """
        ...

    def close(self) -> None:
        """Finishes the files.

        Raises:
            OSError: They cannot be written.
        """
        ...


class ParquetWriter:
    """One Parquet file, `<split>.parquet`, with a row group per chunk.

    Args:
        folder: The export's folder.
        context: What the writer knows.
        schema: Of the file: fixed, whatever the rows are.
        make: Makes a table of that schema of a chunk; the second argument is the number of rows before it.
    """

    def __init__(
        self,
        folder: Path,
        context: Context,
        schema: pa.Schema,
        make: Callable[[Chunk, int], pa.Table],
    ) -> None:
        self._make = make
        self._num_rows = 0
        self._file = pq.ParquetWriter(
            folder / f"{context.split}.parquet", schema, compression="zstd", compression_level=3
        )

    def write(self, chunk: Chunk) -> int:
        """See `Writer`."""
        table = self._make(chunk, self._num_rows)
        if table.num_rows:
            self._file.write_table(table, row_group_size=table.num_rows)
        self._num_rows += table.num_rows
        return table.num_rows

    def close(self) -> None:
        """See `Writer`."""
        self._file.close()


class LinesWriter:
    """One file of JSON lines, `<split>.jsonl`, in UTF-8.

    Args:
        folder: The export's folder.
        context: What the writer knows.
        make: Makes JSON values of a chunk, one per line.
    """

    def __init__(
        self, folder: Path, context: Context, make: Callable[[Chunk], Iterable[dict[str, Any]]]
    ) -> None:
        self._make = make
        self._file = (folder / f"{context.split}.jsonl").open("w", encoding="utf-8")

    def write(self, chunk: Chunk) -> int:
        """See `Writer`."""
        num_lines = 0
        for record in self._make(chunk):
            self._file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")
            num_lines += 1
        return num_lines

    def close(self) -> None:
        """See `Writer`."""
        self._file.close()
