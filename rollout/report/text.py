"""Values of a run as short plain text, for a terminal and for a page.

What a guest said (observations, infos, actions, error messages) is hostile: it may hold terminal escapes,
markup or megabytes. What comes out of here is printable characters of bounded length, in one line unless
told otherwise. It is still to be escaped for where it goes: HTML by the page, rich's markup by the
commands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

__all__ = ["duration_text", "number_text", "printable", "size_text", "value_text"]

_ELLIPSIS = "…"


def printable(text: str, max_chars: int = 200, *, multiline: bool = False) -> str:
    """`text` without anything that a terminal or a reader could be misled by.

    Args:
        text: Anything.
        max_chars: The longest result; what is cut off is marked by an ellipsis.
        multiline: Keep line ends, which are escaped otherwise.
    """
    kept = "".join(
        char if char.isprintable() or (char == "\n" and multiline) else _escape(char)
        for char in text[: max_chars + 1]
    )
    return kept if len(kept) <= max_chars else kept[: max_chars - 1] + _ELLIPSIS


def value_text(value: object, max_chars: int = 200, *, multiline: bool = False) -> str:
    """A cell of a table as text: numbers short, text as it is, lists and mappings in brackets."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return number_text(value)
    if isinstance(value, str):
        return printable(value, max_chars, multiline=multiline)
    if isinstance(value, bytes):
        return printable(value[:max_chars].hex(), max_chars)
    if isinstance(value, Mapping):
        items = list(cast("Mapping[object, object]", value).items())[: max_chars + 1]
        parts = [f"{value_text(key, max_chars)}: {value_text(item, max_chars)}" for key, item in items]
        return printable("{" + ", ".join(parts) + "}", max_chars)
    if isinstance(value, Sequence):
        items = cast("Sequence[object]", value)[: max_chars + 1]  # each takes at least one character
        return printable("[" + ", ".join(value_text(item, max_chars) for item in items) + "]", max_chars)
    return printable(str(value), max_chars)


def number_text(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits; an empty text for None."""
    if value is None:
        return ""
    if isinstance(value, int) or (math.isfinite(value) and value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}" if abs(value) >= 10_000 else str(int(value))
    return f"{value:.{digits}g}"


def duration_text(seconds: float | None) -> str:
    """Seconds in the unit that reads best: "840 ms", "12.3 s", "4 min 05 s", "2 h 03 min"."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest:02d} min"


def size_text(num_bytes: float | None) -> str:
    """Bytes in the unit that reads best, in powers of 1024."""
    if num_bytes is None:
        return ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB" if num_bytes < 1000 else f"{num_bytes:,.0f} TiB"


def _escape(char: str) -> str:
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return known.get(char) or (f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}")
