"""A run in figures: what `show`, `diff`, `runs` and the page have in common.

Computed from the `episodes` table and the run's small files; steps and nodes are not read, so a summary is
quick for a run of any size. A failed episode is counted as failed and has no return: means are over the
others, and say over how many.
"""

# pyarrow has no types, and makes its compute functions when it is imported.
# pyright: reportUnknownParameterType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from rollout.report.files import RunFiles, has_manifest, read_run_files
from rollout.report.stats import Estimate, estimate
from rollout.trajectory import scan
from rollout.trajectory.schema import file_schema, record_schema
from rollout.trajectory.storage import Location, Storage

__all__ = ["Episode", "FailureGroup", "RunSummary", "summarise"]

_COLUMNS = (
    "episode_id",
    "task_id",
    "group_id",
    "env_id",
    "engine",
    "search",
    "policy",
    "seed",
    "return",
    "length",
    "started_at",
    "duration_s",
    "sample",
    "attempt",
    "terminated",
    "truncated",
    "failure",
    "earlier_failures",
)


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """Failures with the same boundary and cause.

    Attributes:
        boundary: Where it failed.
        cause: The message.
        num_final: Episodes that it ended for good.
        num_retried: Attempts that it ended, after which the episode was begun again.
    """

    boundary: str
    cause: str
    num_final: int
    num_retried: int


@dataclass(frozen=True, slots=True)
class Episode:
    """One row of the `episodes` table, as far as it is shown.

    Attributes:
        number: Position in the order of beginning, from 1: its short name within the run.
        failure: "boundary: cause", or empty.
    """

    number: int
    episode_id: str
    task_id: str
    seed: int
    return_: float | None
    length: int
    duration_s: float
    attempt: int
    terminated: bool
    truncated: bool
    failure: str

    @property
    def ending(self) -> str:
        """How it ended, in one word."""
        if self.failure:
            return "failed"
        return "terminated" if self.terminated else "truncated" if self.truncated else "open"


@dataclass(frozen=True)
class RunSummary:
    """A run in figures.

    Attributes:
        files: Its small files.
        table: The `episodes` table in the order of beginning.
        returns: Finite returns of the episodes that did not fail, in that order.
        lengths: Actions of the episodes that did not fail, in that order.
        mean_return: Their mean, None without any.
        mean_length: Mean number of actions of the episodes that did not fail.
        num_planned: Episodes that the configuration asks for; None when it is not known.
        num_failed: Episodes that failed for good.
        num_terminated: Episodes that reached a terminal state.
        num_truncated: Episodes that were cut short.
        num_steps: Actions in committed episodes.
        wall_s: Seconds from the first beginning to the last end; None without episodes. Of a run that was
            resumed, those of its timeline, which leaves out the pauses.
        failures: Final and retried failures, most frequent first.
        notes: What a reader must know about how whole this is.
    """

    files: RunFiles
    table: pa.Table
    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    mean_return: Estimate | None
    mean_length: Estimate | None
    num_planned: int | None
    num_failed: int
    num_terminated: int
    num_truncated: int
    num_steps: int
    wall_s: float | None
    failures: tuple[FailureGroup, ...]
    notes: tuple[str, ...]

    @property
    def num_episodes(self) -> int:
        """Committed episodes, failed ones included."""
        return self.table.num_rows

    @property
    def steps_per_s(self) -> float | None:
        """Actions played a second of the run, searches included."""
        return self.num_steps / self.wall_s if self.wall_s else None

    @property
    def branches_per_s(self) -> float | None:
        """Branches finished a second of the run, from its timeline; None without one."""
        last = next((m for m in reversed(self.files.metrics) if m.branches is not None), None)
        return last.branches / last.t_s if last is not None and last.branches and last.t_s > 0 else None

    @property
    def started_at(self) -> datetime | None:
        """When the first episode began; None without one."""
        return cast("datetime | None", pc.min(self.table.column("started_at")).as_py())

    def distinct(self, column: str) -> list[str]:
        """The different values of a text column, sorted ("engine", "search", "env_id", ...)."""
        return sorted(str(value) for value in pc.unique(self.table.column(column)).to_pylist())

    def by_key(self, column: str) -> dict[object, float]:
        """Finite values of a number column by (task, seed, sample), of the episodes that did not fail.

        The key says what an episode is, whichever run it was played in.
        """
        names = ("task_id", "seed", "sample", column, "failure")
        rows = zip(*(self.table.column(name).to_pylist() for name in names), strict=True)
        return {
            (task_id, seed, sample): float(value)
            for task_id, seed, sample, value, failure in rows
            if failure is None and value is not None and math.isfinite(value)
        }

    def episodes(self, start: int = 0, count: int | None = None) -> list[Episode]:
        """Episodes by position, from 0."""
        rows = self.table.slice(start, count).to_pylist()
        return [_episode(start + offset + 1, row) for offset, row in enumerate(rows)]

    def to_json(self) -> dict[str, object]:
        """As plain JSON values, without the episodes themselves."""
        return {
            "run_id": self.files.run_id,
            "folder": str(self.files.folder),
            "env_id": self.distinct("env_id"),
            "engine": self.distinct("engine"),
            "search": self.distinct("search"),
            "policy": self.distinct("policy"),
            "episodes": self.num_episodes,
            "episodes_planned": self.num_planned,
            "episodes_failed": self.num_failed,
            "episodes_terminated": self.num_terminated,
            "episodes_truncated": self.num_truncated,
            "return": estimate_json(self.mean_return),
            "length": estimate_json(self.mean_length),
            "steps": self.num_steps,
            "wall_s": self.wall_s,
            "steps_per_s": self.steps_per_s,
            "branches_per_s": self.branches_per_s,
            "failures": [
                {"boundary": f.boundary, "cause": f.cause, "final": f.num_final, "retried": f.num_retried}
                for f in self.failures
            ],
            "timings": {p.phase: {"seconds": p.seconds, "calls": p.calls} for p in self.files.phases},
            "notes": list(self.notes),
        }


def summarise(folder: Location) -> RunSummary:
    """Reads a run's summary.

    Args:
        folder: The run's folder: a local path or a URI of `pyarrow.fs`.

    Raises:
        SinkError: The folder is no run, or a committed file cannot be read.
    """
    files = read_run_files(folder)
    table, problems = _read_episodes(files.folder)
    table = table.sort_by([("started_at", "ascending"), ("episode_id", "ascending")])
    played = table.filter(pc.is_null(table.column("failure")))
    returns = [float(value) for value in played.column("return").drop_null().to_pylist()]
    finite = tuple(value for value in returns if math.isfinite(value))
    lengths = tuple(cast("list[int]", played.column("length").to_pylist()))
    num_planned = _planned(files.config)
    num_failed = table.num_rows - played.num_rows
    notes = [*files.notes, *problems]
    if files.description.get("status") in ("starting", "running"):
        notes.append("the run is still running, or was killed: these are the episodes committed so far")
    resumed = files.description.get("resumed_at")
    num_resumed = len(cast("list[object]", resumed)) if isinstance(resumed, list) else 0
    if num_resumed:
        notes.append(f"the run was interrupted and resumed {num_resumed} times; times leave out the pauses")
    if num_planned is not None and table.num_rows < num_planned:
        notes.append(f"{num_planned - table.num_rows} of {num_planned} planned episodes are not committed")
    if len(finite) < played.num_rows:
        notes.append(f"{played.num_rows - len(finite)} episodes have no finite return")
    return RunSummary(
        files=files,
        table=table,
        returns=finite,
        lengths=lengths,
        mean_return=estimate(finite),
        mean_length=estimate(lengths),
        num_planned=num_planned,
        num_failed=num_failed,
        num_terminated=_count_true(played, "terminated"),
        num_truncated=_count_true(played, "truncated"),
        num_steps=int(pc.sum(table.column("length")).as_py() or 0),
        wall_s=_wall_s(table) if not num_resumed else _played_s(files),
        failures=_failure_groups(table),
        notes=tuple(notes),
    )


def _read_episodes(folder: Storage) -> tuple[pa.Table, list[str]]:
    """The committed episodes, and what was skipped on the way, in words."""
    if not has_manifest(folder):
        no_field = pa.field("", pa.null())
        schema = file_schema("episodes", record_schema("episodes", no_field, no_field))
        empty = schema.empty_table().select(list(_COLUMNS))
        return empty, ["there is no manifest: the run ended before it committed an episode"]
    episodes = scan(folder, "episodes", columns=list(_COLUMNS))
    kinds = Counter(problem.kind for problem in episodes.problems)
    first = {problem.kind: problem for problem in reversed(episodes.problems)}
    problems = [
        f"skipped, {kind} ({count}): {first[kind].where}: {first[kind].detail}"
        for kind, count in sorted(kinds.items())
    ]
    return episodes.to_table(), problems


def estimate_json(value: Estimate | None) -> dict[str, object] | None:
    """An estimate as plain JSON values."""
    if value is None:
        return None
    return {
        "mean": value.mean,
        "low_95": value.low,
        "high_95": value.high,
        "count": value.count,
        "method": value.method,
    }


def _planned(config: Mapping[str, object]) -> int | None:
    planned = config.get("episodes")
    return planned if isinstance(planned, int) and not isinstance(planned, bool) else None


def _count_true(table: pa.Table, column: str) -> int:
    return int(pc.sum(table.column(column)).as_py() or 0)


def _wall_s(table: pa.Table) -> float | None:
    if table.num_rows == 0:
        return None
    starts_s = pc.divide(pc.cast(pc.cast(table.column("started_at"), pa.int64()), pa.float64()), 1e6)
    ends_s = pc.add(starts_s, table.column("duration_s"))
    return float(pc.max(ends_s).as_py() - pc.min(starts_s).as_py())


def _played_s(files: RunFiles) -> float | None:
    return files.metrics[-1].t_s if files.metrics else None


def _failure_groups(table: pa.Table) -> tuple[FailureGroup, ...]:
    final: Counter[tuple[str, str]] = Counter()
    retried: Counter[tuple[str, str]] = Counter()
    for failure in table.column("failure").drop_null().to_pylist():
        final[_failure_key(failure)] += 1
    for failures in table.column("earlier_failures").drop_null().to_pylist():
        for failure in cast("Sequence[Mapping[str, Any]]", failures):
            retried[_failure_key(failure)] += 1
    keys = sorted(final.keys() | retried.keys(), key=lambda key: (-final[key], -retried[key], key))
    return tuple(FailureGroup(*key, final[key], retried[key]) for key in keys)


def _failure_key(failure: Mapping[str, Any]) -> tuple[str, str]:
    return str(failure["boundary"]), str(failure["cause"])


def _episode(number: int, row: Mapping[str, Any]) -> Episode:
    failure = cast("Mapping[str, Any] | None", row["failure"])
    return Episode(
        number=number,
        episode_id=row["episode_id"],
        task_id=row["task_id"],
        seed=row["seed"],
        return_=row["return"],
        length=row["length"],
        duration_s=row["duration_s"],
        attempt=row["attempt"],
        terminated=row["terminated"],
        truncated=row["truncated"],
        failure="" if failure is None else ": ".join(_failure_key(failure)),
    )
