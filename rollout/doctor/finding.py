"""One finding about this machine, and what all of them together mean for each engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["ENGINES", "Finding", "Status", "verdicts"]

ENGINES = ("inline", "process", "microvm")
"""Weakest wall first."""


class Status(StrEnum):
    """How a finding is to be read."""

    OK = "ok"
    WARN = "warn"
    """Works, but slower, weaker or smaller than it could."""
    MISSING = "missing"
    """Not there; the engines that the finding names cannot run without it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one probe found.

    Attributes:
        name: What was looked at, in a few words.
        status: How to read it.
        detail: What was found, in one line.
        remedy: What to do about it, in one line; empty when there is nothing to do.
        needed_by: The engines that cannot run while the status is `missing`.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""
    needed_by: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "name": self.name,
            "status": self.status.value,
            "detail": self.detail,
            "remedy": self.remedy or None,
            "needed_by": list(self.needed_by),
        }


def verdicts(findings: Sequence[Finding]) -> list[Finding]:
    """One finding per engine: whether it can run here, and if not, what is missing."""
    return [_verdict(engine, findings) for engine in ENGINES]


def _verdict(engine: str, findings: Iterable[Finding]) -> Finding:
    missing = [f for f in findings if f.status is Status.MISSING and engine in f.needed_by]
    if missing:
        names = ", ".join(finding.name for finding in missing)
        remedies = "; ".join(dict.fromkeys(finding.remedy for finding in missing if finding.remedy))
        return Finding(f"engine {engine}", Status.MISSING, f"cannot run: {names}", remedies)
    if engine == "inline":
        return Finding(
            f"engine {engine}",
            Status.WARN,
            "can run, without a wall",
            "use it for trusted environments only",
        )
    return Finding(f"engine {engine}", Status.OK, "can run")
