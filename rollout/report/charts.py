"""The charts of a page as plotly figures: plain dictionaries of `data` and `layout`. Pure.

Colours are names of the page's style ("var(--accent)"), which the page replaces when it draws, so that a
figure follows the reader's light or dark theme. Text from a run is escaped for plotly, which reads a
little HTML in labels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rollout.report.files import PhaseTime, RunMetric
from rollout.report.stats import running_estimates
from rollout.report.summary import FailureGroup, RunSummary
from rollout.report.text import duration_text, number_text, printable

__all__ = [
    "Figure",
    "failures_figure",
    "histogram_figure",
    "phases_figure",
    "plotly_text",
    "returns_figure",
    "timeline_figures",
]

Figure = dict[str, Any]
"""`{"data": [trace, ...], "layout": {...}}`, as plotly.js takes it."""

MAX_POINTS = 2000
"""Points of one trace; a longer series is thinned evenly."""
_MAX_BARS = 24

_ENDINGS = (
    ("terminated", "circle", "var(--good)"),
    ("truncated", "diamond", "var(--warn)"),
    ("failed", "x", "var(--bad)"),
)


def returns_figure(summary: RunSummary) -> Figure:
    """The return of each episode in the order of beginning, and their running mean with its 95% interval."""
    returns = summary.table.column("return").to_pylist()
    terminated = summary.table.column("terminated").to_pylist()
    failed = [failure is not None for failure in summary.table.column("failure").to_pylist()]
    played = [
        index
        for index, value in enumerate(returns)
        if value is not None and math.isfinite(value) and not failed[index]
    ]
    floor = min((returns[index] for index in played), default=0.0)
    points: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name, _, _ in _ENDINGS}
    drawn = set(played) | {index for index, has_failed in enumerate(failed) if has_failed}
    for index in _thin(sorted(drawn)):
        ending = "failed" if failed[index] else "terminated" if terminated[index] else "truncated"
        points[ending][0].append(index + 1)
        points[ending][1].append(floor if failed[index] else returns[index])
    data = _running_mean([returns[index] for index in played], played)
    for name, symbol, colour in _ENDINGS:
        x, y = points[name]
        if x:
            hover = "episode %{x}: failed<extra></extra>" if name == "failed" else _EPISODE_HOVER
            marker = {"symbol": symbol, "color": colour, "size": 7, "opacity": 0.75}
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "x": x,
                    "y": y,
                    "marker": marker,
                    "hovertemplate": hover,
                }
            )
    layout = _axes("episode, in order of beginning", "return")
    layout["xaxis"] |= _count_ticks(len(returns))
    return {"data": data, "layout": layout}


_EPISODE_HOVER = "episode %{x}: %{y}<extra></extra>"


def _running_mean(returns: Sequence[float], positions: Sequence[int]) -> list[Figure]:
    counts = _thin(range(1, len(returns) + 1))
    estimates = running_estimates(returns, counts)
    x = [positions[count - 1] + 1 for count in counts]
    sure = [
        (at, e.low, e.high)
        for at, e in zip(x, estimates, strict=True)
        if e.low is not None and e.high is not None
    ]
    traces: list[Figure] = []
    if sure:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "95% interval of the mean",
                "x": [at for at, _, _ in sure] + [at for at, _, _ in reversed(sure)],
                "y": [high for _, _, high in sure] + [low for _, low, _ in reversed(sure)],
                "fill": "toself",
                "fillcolor": "var(--accent-soft)",
                "line": {"width": 0},
                "hoverinfo": "skip",
            }
        )
    if len(estimates) > 1:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "mean so far",
                "x": x,
                "y": [e.mean for e in estimates],
                "line": {"color": "var(--accent)", "width": 2},
                "hovertemplate": "mean of the first %{x}: %{y:.4g}<extra></extra>",
            }
        )
    return traces


def histogram_figure(values: Sequence[float], title: str) -> Figure:
    """How often each value, or each range of values where there are many, came up."""
    distinct = sorted(set(values))
    if len(distinct) <= _MAX_BARS:
        labels = [number_text(value) for value in distinct]
        counts = [sum(1 for value in values if value == wanted) for wanted in distinct]
        return _bars(labels, counts, title, gap=0.35)
    heights, edges = np.histogram(np.asarray(values, dtype=float), bins=_MAX_BARS)
    labels = [
        f"{number_text(float(low), 3)} to {number_text(float(high), 3)}"
        for low, high in itertools.pairwise(edges)
    ]
    return _bars(labels, heights.tolist(), title, gap=0.06)


def _bars(labels: Sequence[str], counts: Sequence[int], title: str, gap: float) -> Figure:
    bars = {
        "type": "bar",
        "x": list(labels),
        "y": list(counts),
        "marker": {"color": "var(--accent)"},
        "hovertemplate": "%{x}: %{y} episodes<extra></extra>",
    }
    layout = _axes(title, "episodes")
    layout["xaxis"]["type"] = "category"
    layout["bargap"] = gap
    layout["yaxis"] |= _count_ticks(max(counts))
    return {"data": [bars], "layout": layout}


def phases_figure(phases: Sequence[PhaseTime]) -> Figure:
    """Seconds of each phase, longest on top."""
    shown = list(reversed(phases[:_MAX_BARS]))
    texts = [
        f"{duration_text(p.seconds)}, {p.calls:,} calls of {duration_text(p.seconds / p.calls)}"
        if p.calls
        else duration_text(p.seconds)
        for p in shown
    ]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [p.seconds for p in shown],
        "y": [plotly_text(p.phase) for p in shown],
        "text": texts,
        "textposition": "auto",
        "cliponaxis": False,
        "marker": {"color": "var(--accent)"},
        "hovertemplate": "%{y}: %{text}<extra></extra>",
    }
    return {"data": [bars], "layout": _axes("seconds, summed over workers", "")}


def failures_figure(failures: Sequence[FailureGroup]) -> Figure:
    """Failures by the boundary that failed: attempts that were made again, and episodes that were lost."""
    boundaries = sorted({failure.boundary for failure in failures})

    def bars(name: str, colour: str, count: Callable[[FailureGroup], int]) -> Figure:
        totals = [sum(count(f) for f in failures if f.boundary == boundary) for boundary in boundaries]
        return {
            "type": "bar",
            "name": name,
            "x": [plotly_text(boundary) for boundary in boundaries],
            "y": totals,
            "marker": {"color": colour},
            "hovertemplate": f"%{{x}}: %{{y}} {name}<extra></extra>",
        }

    layout = _axes("boundary that failed", "failures")
    layout["barmode"] = "stack"
    layout["bargap"] = 0.5
    layout["yaxis"] |= _count_ticks(sum(f.num_final + f.num_retried for f in failures))
    return {
        "data": [
            bars("attempts, begun again", "var(--warn)", lambda failure: failure.num_retried),
            bars("episodes, lost", "var(--bad)", lambda failure: failure.num_final),
        ],
        "layout": layout,
    }


def timeline_figures(metrics: Sequence[RunMetric]) -> dict[str, Figure]:
    """What lived and what was held over the time of the run, by the name of the chart.

    A chart is left out when the run did not record what it shows.
    """
    mib = 1 / (1 << 20)
    series: dict[str, list[tuple[str, str, list[float | None]]]] = {
        "live": [("live sandboxes", "var(--accent)", [m.live_sandboxes for m in metrics])],
        "checkpoints": [("checkpoints", "var(--good)", [m.checkpoints for m in metrics])],
        "rate": [("branches a second", "var(--accent)", _branch_rates(metrics))],
        "bytes": [
            ("checkpoints", "var(--good)", [_scaled(m.checkpoint_bytes, mib) for m in metrics]),
            ("processes", "var(--accent)", [_scaled(m.rss_bytes, mib) for m in metrics]),
        ],
    }
    figures: dict[str, Figure] = {}
    for chart, lines in series.items():
        data = [
            {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": [m.t_s for m in metrics],
                "y": values,
                "line": {"color": colour, "width": 2},
                "hovertemplate": f"{name}: %{{y:.4~g}} at %{{x:.1f}} s<extra></extra>",
            }
            for name, colour, values in lines
            if any(value is not None for value in values)
        ]
        if data:
            layout = _axes("seconds since the run began", "")
            layout["yaxis"]["rangemode"] = "tozero"
            figures[chart] = {"data": data, "layout": layout}
    return figures


def plotly_text(text: str, max_chars: int = 60) -> str:
    """Text of a run as a plotly label, which shows it as it is."""
    return printable(text, max_chars).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _branch_rates(metrics: Sequence[RunMetric]) -> list[float | None]:
    """Branches a second since the point before; None at the first, and where the count was not known."""
    rates: list[float | None] = [None] if metrics else []
    for before, after in itertools.pairwise(metrics):
        passed_s = after.t_s - before.t_s
        if before.branches is None or after.branches is None or passed_s <= 0:
            rates.append(None)
        else:
            rates.append(max(0.0, after.branches - before.branches) / passed_s)
    return rates


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _thin(values: Sequence[int]) -> list[int]:
    """At most about `MAX_POINTS` of the values, evenly, the last one always."""
    step = max(1, math.ceil(len(values) / MAX_POINTS))
    thinned = list(values[::step])
    if values and thinned[-1] != values[-1]:
        thinned.append(values[-1])
    return thinned


def _count_ticks(most: int) -> Figure:
    """Whole numbers on an axis of counts or numbers, also where there are few."""
    return {"dtick": 1} if most < 8 else {"tickformat": ",d"}


def _axes(x_title: str, y_title: str) -> Figure:
    return {"xaxis": {"title": {"text": x_title}}, "yaxis": {"title": {"text": y_title}}}
