"""Checked access to the arguments of a request: whatever the host sends, a handler sees its own types."""

from __future__ import annotations

from typing import Any, TypeVar, cast

from rollout.errors import GuestError
from rollout.types import Value

__all__ = ["argument", "argument_or", "optional_argument"]

T = TypeVar("T")


def argument(args: dict[str, Value], name: str, kind: type[T]) -> T:
    """An argument of a type; integers stand for floats, booleans do not stand for integers.

    Raises:
        GuestError: It is missing or of another type.
    """
    value: object = args.get(name)
    wanted: Any = kind
    if wanted is float and type(value) is int:
        value = float(value)
    if not isinstance(value, wanted) or (type(value) is bool and wanted is not bool):
        raise GuestError(f"argument {name!r} must be {kind.__name__}, not {type(value).__name__}")
    return cast("T", value)


def argument_or(args: dict[str, Value], name: str, kind: type[T], default: T) -> T:
    """As `argument`; the default if it is missing or null."""
    return default if args.get(name) is None else argument(args, name, kind)


def optional_argument(args: dict[str, Value], name: str, kind: type[T]) -> T | None:
    """As `argument`; None if it is missing or null."""
    return None if args.get(name) is None else argument(args, name, kind)
