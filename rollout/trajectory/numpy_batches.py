"""Record batches as numpy arrays, the way that training code wants them.

| column | becomes |
|---|---|
| number or bool without nulls | array of its own dtype, [N] |
| integer or bool with nulls | float64 with NaN, [N] |
| float with nulls | the same dtype with NaN, [N] |
| timestamp | datetime64, NaT for null |
| fixed-size list with a `shape` | array, [N, *shape]; a null row is all zeros, and `NAME_mask` says so |
| struct | dict of the same for its fields |
| text, list | object array, None for null |

Arrays without nulls share memory with the batch where Arrow's layout allows it, and are then read-only.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

import json
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rollout.trajectory.schema import SHAPE_KEY

__all__ = ["Batch", "column_to_numpy", "to_numpy"]

Batch: TypeAlias = "dict[str, npt.NDArray[Any] | Batch]"
"""Arrays by column; a struct column is a dict of its own."""


def to_numpy(batch: pa.RecordBatch) -> Batch:
    """All columns of a batch; every array has `batch.num_rows` entries along its first axis."""
    arrays: Batch = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        arrays[field.name] = column_to_numpy(field, column)
        if pa.types.is_fixed_size_list(field.type) and column.null_count:
            arrays[f"{field.name}_mask"] = ~column.is_null().to_numpy(zero_copy_only=False)
    return arrays


def column_to_numpy(field: pa.Field, column: pa.Array) -> npt.NDArray[Any] | Batch:
    """One column; `field` gives the shape of a fixed-size list."""
    if pa.types.is_struct(field.type):
        children = [field.type.field(index) for index in range(field.type.num_fields)]
        return {child.name: column_to_numpy(child, column.field(child.name)) for child in children}
    if pa.types.is_fixed_size_list(field.type):
        return _fixed_size_list(field, column)
    if pa.types.is_boolean(field.type) and column.null_count:
        column = column.cast(pa.int8())
    return column.to_numpy(zero_copy_only=False)


def _fixed_size_list(field: pa.Field, column: pa.Array) -> npt.NDArray[Any]:
    size = field.type.list_size
    metadata: dict[bytes, bytes] = field.metadata or {}
    shape = tuple(json.loads(metadata.get(SHAPE_KEY, f"[{size}]".encode())))
    if column.null_count:
        num_present = len(column) - column.null_count
        present = column.flatten().to_numpy(zero_copy_only=False).reshape(num_present, *shape)
        values = np.zeros((len(column), *shape), present.dtype)
        values[column.is_valid().to_numpy(zero_copy_only=False)] = present
        return values
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), *shape)
