"""What a benchmark measured: rows, and their text as a table, as Markdown and as JSON.

A benchmark module (`bench_sandbox`, `bench_search`, `bench_sink`) has a function
`rows(...) -> Iterator[BenchRow]` that yields each row as soon as it is measured. A row's value is the median
of its samples and its spread their quartiles; what it stands beside (a rival, a hard limit) was measured in
the same run, in the same unit. A row that could not be measured is yielded too, with the reason.

Pure: nothing here measures, prints or reads a clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["BenchRow", "Rival", "Target", "at_least", "at_most", "markdown_table", "quartiles"]


@dataclass(frozen=True, slots=True)
class Target:
    """The figure to reach, in the row's unit."""

    direction: Literal["≤", "≥"]
    bound: float

    def met(self, value: float) -> bool:
        """Whether `value` reaches it."""
        return value <= self.bound if self.direction == "≤" else value >= self.bound


def at_most(bound: float) -> Target:
    """A ceiling, for times and sizes."""
    return Target("≤", bound)


def at_least(bound: float) -> Target:
    """A floor, for rates."""
    return Target("≥", bound)


@dataclass(frozen=True, slots=True)
class Rival:
    """What a row stands beside: the same work done another way, or the machine's own limit.

    Attributes:
        name: What it is ("bare os.fork", "raw pyarrow").
        value: Its median, in the row's unit.
        samples: How many measurements it is the median of.
    """

    name: str
    value: float
    samples: int = 1

    @classmethod
    def of(cls, name: str, samples: Sequence[float]) -> Rival:
        """The median of samples, of which there must be at least one."""
        return cls(name, statistics.median(samples), len(samples))


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One figure of a benchmark.

    Attributes:
        name: What was measured.
        unit: "ms", "branches/s", "MB", "x", ...
        value: The median; None if and only if `missing` says why.
        spread: The quartiles (25%, 75%) of the samples; None below two samples.
        samples: Number of measurements.
        subject: What was measured on ("process", "microvm, tcg", "uct"); groups the rows of a table.
        target: The figure to reach, if there is one.
        rivals: What it stands beside.
        missing: Why there is no value.
        note: A caveat, or what the figure includes.
    """

    name: str
    unit: str
    value: float | None
    spread: tuple[float, float] | None = None
    samples: int = 0
    subject: str = ""
    target: Target | None = None
    rivals: tuple[Rival, ...] = ()
    missing: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) != bool(self.missing):
            raise ValueError(f"the row {self.name!r} needs a value or the reason why it has none")

    @classmethod
    def of(
        cls,
        name: str,
        samples: Sequence[float],
        unit: str,
        *,
        subject: str = "",
        target: Target | None = None,
        rivals: Iterable[Rival] = (),
        note: str = "",
    ) -> BenchRow:
        """The row of a set of samples; without any, a row that says so."""
        if not samples:
            return cls.absent(name, unit, "no sample was taken", subject=subject, target=target)
        return cls(
            name=name,
            unit=unit,
            value=statistics.median(samples),
            spread=quartiles(samples),
            samples=len(samples),
            subject=subject,
            target=target,
            rivals=tuple(rivals),
            note=note,
        )

    @classmethod
    def absent(
        cls, name: str, unit: str, why: str, *, subject: str = "", target: Target | None = None
    ) -> BenchRow:
        """A row that could not be measured, and why."""
        return cls(name=name, unit=unit, value=None, subject=subject, target=target, missing=why)

    @property
    def reached(self) -> bool | None:
        """Whether the target was reached; None without a target or a value."""
        if self.target is None or self.value is None:
            return None
        return self.target.met(self.value)

    def to_json(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "name": self.name,
            "subject": self.subject,
            "unit": self.unit,
            "median": self.value,
            "quartiles": None if self.spread is None else list(self.spread),
            "samples": self.samples,
            "target": None
            if self.target is None
            else {"direction": self.target.direction, "bound": self.target.bound, "reached": self.reached},
            "beside": [
                {
                    "name": rival.name,
                    "median": rival.value,
                    "samples": rival.samples,
                    "ratio": _ratio(self.value, rival.value),
                }
                for rival in self.rivals
            ],
            "missing": self.missing or None,
            "note": self.note or None,
        }

    def cells(self) -> tuple[str, str, str, str, str]:
        """The row as text: name, value, spread, target, beside."""
        return (self.name, self._value_text(), self._spread_text(), self._target_text(), self._beside_text())

    def _value_text(self) -> str:
        return "-" if self.value is None else f"{format_figure(self.value)} {self.unit}".strip()

    def _spread_text(self) -> str:
        if self.spread is None:
            return ""
        low, high = self.spread
        return f"{format_figure(low)} to {format_figure(high)} (n={self.samples})"

    def _target_text(self) -> str:
        if self.target is None:
            return ""
        sign = {True: " ✓", False: " ✗", None: ""}[self.reached]
        return f"{self.target.direction} {format_figure(self.target.bound)}{sign}"

    def _beside_text(self) -> str:
        parts = [
            f"{rival.name}: {format_figure(rival.value)} {self.unit}".strip()
            + _ratio_text(_ratio(self.value, rival.value))
            for rival in self.rivals
        ]
        return "; ".join([*parts, *(text for text in (self.missing, self.note) if text)])


def quartiles(samples: Sequence[float]) -> tuple[float, float] | None:
    """The 25% and 75% quantiles, linearly interpolated; None below two samples."""
    if len(samples) < 2:
        return None
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def format_figure(value: float) -> str:
    """Three significant digits, and thousands separated: `0.0123`, `12.3`, `12,345`."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def markdown_table(rows: Iterable[BenchRow], machine: Mapping[str, str]) -> str:
    """The rows as a Markdown table, one per subject, under a line that describes the machine."""
    lines = [", ".join(f"{key} {value}" for key, value in machine.items())]
    by_subject: dict[str, list[BenchRow]] = {}
    for row in rows:
        by_subject.setdefault(row.subject, []).append(row)
    for subject, group in by_subject.items():
        lines += [
            "",
            f"| {subject or 'what'} | median | quartiles | target | beside |",
            "|---|---|---|---|---|",
        ]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells()) + " |" for row in group]
    return "\n".join(lines) + "\n"


def _ratio_text(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f" ({format_figure(ratio)}x)" if ratio == 0 or ratio >= 0.1 else f" (1/{format_figure(1 / ratio)})"


def _ratio(value: float | None, rival: float) -> float | None:
    return value / rival if value is not None and rival else None
