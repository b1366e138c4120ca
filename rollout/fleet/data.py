"""A run's tables as a Ray Dataset, read where its tasks run.

    from rollout.fleet.data import to_ray
    from rollout.trajectory import scan

    steps = to_ray(scan("runs/my-run", "steps", columns=["observation", "action"]))
    for batch in steps.iter_torch_batches(batch_size=1024):
        ...

One read task for each committed file, with the projection and the filter of the scan. It reads as the scan
does: episodes that two writers committed are seen once, older files get the columns that they lack, pages are
checked. A fixed-size list with a shape (a Box observation) becomes a tensor column of that shape.

Not guaranteed: the order of rows, unless the context of Ray Data is told to preserve it; and that rows which
are committed later are seen.
"""

# Neither pyarrow nor Ray Data come with whole type stubs.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from rollout.trajectory.numpy_batches import column_to_numpy
from rollout.trajectory.reader import Scan

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = ["to_ray"]

_BATCH_ROWS = 65_536


def to_ray(scan: Scan, *, tensors: bool = True, **options: Any) -> Dataset:
    """The rows of a scan as a Ray Dataset; Ray starts if it has not been.

    Args:
        scan: A table of a run, with its columns and filter.
        tensors: Whether fixed-size lists become tensors, [N, *shape]; null is all zeros there.
        options: Of `ray.data.read_datasource`, such as `concurrency` or `override_num_blocks`.
    """
    import ray.data

    return ray.data.read_datasource(_datasource(scan, tensors), **options)


def _datasource(scan: Scan, tensors: bool) -> Any:
    """Made in here, so that importing this module does not import Ray Data."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class TrajectoryDatasource(Datasource):
        """One read task for each committed file."""

        def get_name(self) -> str:
            """As Ray Data shows it."""
            return f"Trajectory{scan.table.capitalize()}"

        def estimate_inmemory_data_size(self) -> int | None:
            """Of all columns, compressed: the least that it can be."""
            return sum(part.num_bytes for part in scan.parts())

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[ReadTask]:
            """See `Datasource.get_read_tasks`; the files decide how many there are."""
            schema = next(_blocks_of(scan.schema.empty_table(), tensors)).schema
            return [
                ReadTask(
                    partial(_read, part, tensors),
                    BlockMetadata(
                        num_rows=None,
                        size_bytes=part.num_bytes,
                        exec_stats=None,
                        input_files=tuple(part.file_names()),
                    ),
                    schema=schema,
                    per_task_row_limit=per_task_row_limit,
                )
                for part in scan.parts() or [scan]
            ]

    return TrajectoryDatasource()


def _read(part: Scan, tensors: bool) -> Iterator[pa.Table]:
    """The blocks of a part; at least one, so that an empty table has its columns."""
    is_empty = True
    for batch in part.to_batches(_BATCH_ROWS):
        is_empty = False
        yield from _blocks_of(pa.Table.from_batches([batch]), tensors)
    if is_empty:
        yield from _blocks_of(part.schema.empty_table(), tensors)


def _blocks_of(table: pa.Table, tensors: bool) -> Iterator[pa.Table]:
    if not tensors:
        yield table
        return
    from ray.data.extensions import ArrowTensorArray

    for index, field in enumerate(table.schema):
        if pa.types.is_fixed_size_list(field.type):
            values = column_to_numpy(field, table.column(index).combine_chunks())
            column = ArrowTensorArray.from_numpy(cast("Any", values))
            table = table.set_column(index, field.name, column)
    yield table
