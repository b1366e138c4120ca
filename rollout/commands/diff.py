"""`rollout diff RUN RUN`: how much better, faster and more reliable the second run is, and how surely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from rollout.commands.output import RUN_HELP, estimate_text, find_run, print_json, stdout_console, text_table
from rollout.report.stats import Difference, difference, paired_difference
from rollout.report.summary import RunSummary, summarise
from rollout.report.text import duration_text, number_text, printable

__all__ = ["Comparison", "command", "compare"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs side by side; every difference and ratio is the second against the first.

    Attributes:
        return_: Difference of the mean returns; None when a run has none.
        length: Difference of the mean lengths.
        speed_ratio: Moves a second, as a ratio; None when it is not known.
        changed_settings: (key, first, second) of the settings that differ.
    """

    return_: Difference | None
    length: Difference | None
    speed_ratio: float | None
    changed_settings: tuple[tuple[str, str, str], ...]


def command(
    first: Annotated[str, typer.Argument(help=RUN_HELP)],
    second: Annotated[str, typer.Argument(help="The run to compare with it.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compare two runs: returns with 95% intervals, lengths, speed, failures, settings."""
    summaries = summarise(find_run(first)), summarise(find_run(second))
    comparison = compare(*summaries)
    if json:
        print_json(_to_json(summaries, comparison))
    else:
        stdout_console().print(*_view(summaries, comparison), sep="\n")


def compare(first: RunSummary, second: RunSummary) -> Comparison:
    """The second run against the first.

    Returns are compared in pairs when each episode of the smaller run has its like (same task, seed and
    sample) in the other; otherwise as independent sets.
    """
    speeds = first.steps_per_s, second.steps_per_s
    return Comparison(
        return_=_difference(first, second, "return"),
        length=_difference(first, second, "length"),
        speed_ratio=speeds[1] / speeds[0] if speeds[0] and speeds[1] is not None else None,
        changed_settings=tuple(_changed(_flat(first.files.config), _flat(second.files.config))),
    )


def _difference(first: RunSummary, second: RunSummary, column: str) -> Difference | None:
    by_key_1, by_key_2 = first.by_key(column), second.by_key(column)
    common = by_key_1.keys() & by_key_2.keys()
    if len(common) >= 2 and len(common) == min(len(by_key_1), len(by_key_2)):
        return paired_difference(by_key_1, by_key_2)
    return difference(list(by_key_1.values()), list(by_key_2.values()))


def _flat(value: object, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {prefix: printable(str(value))}
    flat: dict[str, str] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _changed(first: dict[str, str], second: dict[str, str]) -> list[tuple[str, str, str]]:
    return [
        (printable(key), first.get(key, "-"), second.get(key, "-"))
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    ]


def _view(summaries: Sequence[RunSummary], comparison: Comparison) -> list[RenderableType]:
    first, second = summaries
    rows = [
        ("return", *(estimate_text(s.mean_return) for s in summaries), _difference_text(comparison.return_)),
        ("length", *(estimate_text(s.mean_length) for s in summaries), _difference_text(comparison.length)),
        ("episodes", *(f"{s.num_episodes:,}" for s in summaries), ""),
        ("failed", *(f"{s.num_failed:,}" for s in summaries), f"{second.num_failed - first.num_failed:+,}"),
        ("time", *(duration_text(s.wall_s) or "-" for s in summaries), ""),
        (
            "moves/s",
            *(number_text(s.steps_per_s, 3) or "-" for s in summaries),
            "" if comparison.speed_ratio is None else f"{comparison.speed_ratio:.3g}x",
        ),
        ("branches/s", *(number_text(s.branches_per_s, 3) or "-" for s in summaries), ""),
    ]
    names = [printable(s.files.run_id, 40) for s in summaries]
    views: list[RenderableType] = [text_table(("", *names, "second against first"), rows)]
    boundaries = [_by_boundary(summary) for summary in summaries]
    if any(boundaries):
        keys = sorted(boundaries[0].keys() | boundaries[1].keys())
        failures = [(key, str(boundaries[0][key]), str(boundaries[1][key])) for key in keys]
        views.append(text_table(("boundary", *names), failures, title="Failures, retried ones included"))
    if comparison.changed_settings:
        views.append(
            text_table(("setting", *names), comparison.changed_settings, title="Settings that differ")
        )
    for summary in summaries:
        run = printable(summary.files.run_id, 40)
        views += [Text(f"note: {run}: {printable(note, 300)}", style="yellow") for note in summary.notes]
    return views


def _by_boundary(summary: RunSummary) -> Counter[str]:
    counts: Counter[str] = Counter()
    for group in summary.failures:
        counts[group.boundary] += group.num_final + group.num_retried
    return counts


def _difference_text(value: Difference | None) -> str:
    if value is None:
        return "-"
    text = f"{value.value:+.4g}"
    if value.low is None or value.high is None:
        return f"{text} (n={value.count:,}, no interval)"
    verdict = "significant" if value.significant else "not significant"
    return f"{text} [{value.low:+.3g}, {value.high:+.3g}] ({value.method}, {verdict})"


def _to_json(summaries: Sequence[RunSummary], comparison: Comparison) -> dict[str, object]:
    return {
        "first": summaries[0].to_json(),
        "second": summaries[1].to_json(),
        "return": _difference_json(comparison.return_),
        "length": _difference_json(comparison.length),
        "speed_ratio": comparison.speed_ratio,
        "changed_settings": [
            {"key": key, "first": first, "second": second}
            for key, first, second in comparison.changed_settings
        ],
    }


def _difference_json(value: Difference | None) -> dict[str, object] | None:
    return None if value is None else {**asdict(value), "significant": value.significant}
