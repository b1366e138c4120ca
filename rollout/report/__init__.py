"""A run as one self-contained HTML page, and the summary that the page, `show` and `diff` share.

The report reads what a run leaves in its folder, and nothing else: `run.json`, the committed Parquet tables
(through `rollout.trajectory`), and two small files that the driver of a run writes. Both are optional: a
run that was killed has neither or a torn one, and its report says so.

`timings.json`, written once when the run ends, says where the time went:

    {"restore": {"seconds": 12.31, "calls": 804}, "step": {"seconds": 3.02, "calls": 804}, ...}

One key per phase: `start` (booting and preparing sandboxes), `restore` (a checkpoint becomes clones),
`handshake`, `step` (environment calls, resets and playouts included, unless `reset` and `playout` are keys
of their own), `checkpoint`, `release`, `search` (ask, tell and everything else inside the search), `sink`,
and `ray` (a call to a host less what the host says that it took). Other names are shown as they are.
Seconds are summed over workers, so they may add up to more than the run's own length.

`metrics.jsonl` is the timeline, about a line a second while the run goes on, and fewer where a long run lies
in an object store (`rollout.fleet.timeline`); one object a line:

    {"t_s": 4.0, "live_sandboxes": 9, "checkpoints": 211, "checkpoint_bytes": 14680064, "branches": 640,
     "failed_branches": 2, "rss_bytes": 402653184}

`t_s` is seconds since the run began, never falling. `branches` counts the branches finished since then and
`failed_branches` those that failed; the others are the values at that moment, over all hosts; `rss_bytes` is
the resident memory of the driver, the hosts and their sandboxes together. A field that is unknown is left out
or null. A last line without its newline is ignored.

Invariants: the page needs no network and makes no request (its content security policy forbids any); text
that came from a guest is data on it, never markup or code; the same run gives the same page, byte for byte.

Not guaranteed: that every node of a large run is on the page. Trees, episodes and points beyond fixed
limits are left out by rule (`rollout.report.trees`, `rollout.report.page`), and the page says how many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rollout.report.page import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> object:
    """Imports plotly and pyarrow only when a report is written."""
    if name != "write_report":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rollout.report.page import write_report

    return write_report
