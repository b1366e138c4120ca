"""The small files that a run leaves beside its tables: `run.json`, `timings.json`, `metrics.jsonl`.

Their formats are in `rollout.report`. A run may have been killed at any point, so a missing file is no
error, a damaged one is a note for the reader, and a torn last line of the metrics is left out. Only a
folder that is no run at all is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from rollout.errors import SinkError
from rollout.trajectory.storage import Location, Storage

__all__ = [
    "MAX_METRICS",
    "PhaseTime",
    "RunFiles",
    "RunMetric",
    "has_manifest",
    "read_run_files",
]

MAX_METRICS = 2000
"""Points of the timeline that are kept; a longer one is thinned evenly."""


_MANIFEST = "manifest.jsonl"
_SEGMENTS = "manifest"
_MARKS = frozenset({"run.json", _MANIFEST, "episodes"})
"""Where one of these is, there is a run."""


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """Time spent in one phase, summed over workers."""

    phase: str
    seconds: float
    calls: int


@dataclass(frozen=True, slots=True)
class RunMetric:
    """The state of a run at one moment; None where it was not known."""

    t_s: float
    live_sandboxes: float | None = None
    checkpoints: float | None = None
    checkpoint_bytes: float | None = None
    branches: float | None = None
    rss_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What the small files of a run say.

    Attributes:
        folder: The run's folder.
        description: `run.json` as it is; empty when it is missing or damaged.
        phases: Where the time went, longest first; empty when the run did not get to write it.
        metrics: The timeline, in order.
        notes: What was missing or damaged, one line each.
    """

    folder: Storage
    description: Mapping[str, object] = field(default_factory=dict[str, object])
    phases: tuple[PhaseTime, ...] = ()
    metrics: tuple[RunMetric, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def run_id(self) -> str:
        """The run's id: what `run.json` says, otherwise the folder's name."""
        run_id = self.description.get("run_id")
        return run_id if isinstance(run_id, str) and run_id else self.folder.name

    @property
    def config(self) -> Mapping[str, object]:
        """The resolved configuration; empty when it is not known."""
        config = self.description.get("config")
        return cast("Mapping[str, object]", config) if isinstance(config, dict) else {}


def is_run_folder(folder: Location) -> bool:
    """Whether a folder holds a run, whole or not.

    Raises:
        SinkError: It cannot be listed.
    """
    storage = Storage.of(folder)
    if storage.local is not None and not storage.local.is_dir():
        return False
    return not _MARKS.isdisjoint(storage.names())


def _require_run_folder(folder: Storage) -> None:
    """Checks that a folder is a run, whole or not.

    Raises:
        SinkError: It does not exist, or holds none of a run's files.
    """
    if folder.local is not None and not folder.local.is_dir():
        raise SinkError(f"{folder} is not a folder; `rollout runs` lists the runs there are")
    folder.check_bucket()
    if not is_run_folder(folder):
        raise SinkError(f"{folder} holds no run: neither run.json nor manifest.jsonl nor episodes")


def has_manifest(folder: Location) -> bool:
    """Whether the sink of the run got as far as saying what its tables are.

    Raises:
        SinkError: The folder cannot be read.
    """
    storage = Storage.of(folder)
    if storage.local is None and storage.files(_SEGMENTS):
        return True
    return b"\n" in (storage.read_if_there(_MANIFEST) or b"")


def read_run_files(location: Location) -> RunFiles:
    """Reads what is there.

    Args:
        location: The run's folder: a local path or a URI of `pyarrow.fs`.

    Raises:
        SinkError: The folder is no run, or its store does not answer.
    """
    folder = Storage.of(location)
    _require_run_folder(folder)
    notes: list[str] = []
    description = _read_object(folder, "run.json", notes)
    timings = _read_object(folder, "timings.json", notes)
    phases = _phases(timings, notes)
    metrics = _read_metrics(folder, "metrics.jsonl", notes)
    return RunFiles(folder, description, phases, metrics, tuple(notes))


def _read_object(folder: Storage, name: str, notes: list[str]) -> dict[str, object]:
    try:
        data = folder.read_if_there(name)
        value: object = None if data is None else json.loads(data)
    except (SinkError, ValueError, RecursionError) as error:
        notes.append(f"{name} cannot be read ({type(error).__name__})")
        return {}
    if data is None:
        notes.append(f"{name} is missing: the run did not get to write it")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{name} is not an object")
        return {}
    return cast("dict[str, object]", value)


def _phases(timings: Mapping[str, object], notes: list[str]) -> tuple[PhaseTime, ...]:
    phases: list[PhaseTime] = []
    for phase, entry in timings.items():
        fields = cast("dict[str, object]", entry) if isinstance(entry, dict) else {}
        seconds, calls = _number(fields.get("seconds")), _number(fields.get("calls"))
        if seconds is None or calls is None or seconds < 0:
            notes.append(f"timings.json: the entry {phase!r} is damaged and left out")
        else:
            phases.append(PhaseTime(phase, seconds, int(calls)))
    return tuple(sorted(phases, key=lambda entry: (-entry.seconds, entry.phase)))


def _read_metrics(folder: Storage, name: str, notes: list[str]) -> tuple[RunMetric, ...]:
    try:
        data = folder.read_if_there(name)
    except SinkError as error:
        notes.append(f"{name} cannot be read ({error.message})")
        return ()
    if data is None:
        notes.append(f"{name} is missing: there is no timeline")
        return ()
    lines = data.split(b"\n")[:-1]  # without the last newline, the last line is torn
    step = max(1, math.ceil(len(lines) / MAX_METRICS))
    metrics: list[RunMetric] = []
    num_damaged = 0
    for line in lines[::step]:
        metric = _metric(line)
        if metric is None or (metrics and metric.t_s < metrics[-1].t_s):
            num_damaged += 1
        else:
            metrics.append(metric)
    if num_damaged:
        notes.append(f"{name}: {num_damaged} damaged lines are left out")
    return tuple(metrics)


def _metric(line: bytes) -> RunMetric | None:
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    fields = cast("dict[str, object]", value)
    t_s = _number(fields.get("t_s"))
    if t_s is None:
        return None
    names = ("live_sandboxes", "checkpoints", "checkpoint_bytes", "branches", "rss_bytes")
    return RunMetric(t_s, *(_number(fields.get(name)) for name in names))


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
