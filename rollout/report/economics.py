"""The part of a page that says what it cost to reach nodes, by the way that was taken, and what it saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from rollout.report.sections import card, table
from rollout.report.summary import RunSummary
from rollout.report.text import duration_text

__all__ = ["economics_card"]

_WAYS = {
    "clone": "clone of a checkpoint",
    "continue": "went on in the sandbox of its parent",
    "inherit": "last child: inherited the sandbox of its parent",
    "replay": "evicted or not saved: played again from an ancestor",
    "reset": "evicted: played again from the reset",
    "defer": "branch that left its state unsaved",
}
_CAPTION = (
    "How states were reached. Saved is the time of the alternative, a reset and all steps from there by "
    "their median times, less the time that was taken; what is negative would have been cheaper so. For a "
    "child that went on in the sandbox of its parent, the alternative is a clone; for a branch that left its "
    "state unsaved, one that saves it."
)


def economics_card(summary: RunSummary) -> str:
    """A table with a row for each way; empty where the run recorded none."""
    recorded = summary.files.description.get("summary")
    ways = cast("Mapping[str, Any]", recorded).get("economics") if isinstance(recorded, Mapping) else None
    if not isinstance(ways, Mapping):
        return ""
    rows = [
        row
        for kind, name in _WAYS.items()
        if (row := _row(name, cast("Mapping[str, Any]", ways).get(kind))) is not None
    ]
    if not rows:
        return ""
    header = ("way", "states", "time", "mean", "median", "saved")
    return card("half", "What nodes cost", _CAPTION, table(header, rows, {1, 2, 3, 4, 5}))


def _row(name: str, way: object) -> tuple[str, ...] | None:
    """The cells of a way; None where the record lacks it or is damaged."""
    if not isinstance(way, Mapping):
        return None
    found = cast("Mapping[str, Any]", way)
    numbers = [found.get(key) for key in ("count", "seconds", "saved_s")]
    if not all(type(n) in (int, float) and math.isfinite(cast("float", n)) for n in numbers):
        return None
    count, seconds, saved_s = cast("list[float]", numbers)
    if count < 1:
        return None
    median = found.get("median_s")  # older runs lack it
    median_s = float(median) if isinstance(median, int | float) and math.isfinite(median) else 0.0
    sign = "-" if saved_s < 0 else ""
    return (
        name,
        f"{int(count):,}",
        duration_text(seconds),
        duration_text(seconds / count),
        duration_text(median_s) if median_s > 0 else "",
        sign + duration_text(abs(saved_s)),
    )
