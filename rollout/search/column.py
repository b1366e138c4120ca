"""Columns of a table that are not stored: computed from others when they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Generic, TypeVar, overload

__all__ = ["Column"]

T = TypeVar("T")


class Column(Sequence[T], Generic[T]):
    """A read-only column that is computed from others, one entry per row of a table."""

    __slots__ = ("_get", "_table")

    def __init__(self, table: Sized, get: Callable[[int], T]) -> None:
        self._table = table
        self._get = get

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        rows = range(len(self._table))[index]
        return self._get(rows) if isinstance(rows, int) else [self._get(row) for row in rows]
