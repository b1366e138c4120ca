"""The small files of a run beside its tables: `run.json`, `metrics.jsonl`, `timings.json`.

`run.json` says what was run and where: it is there as soon as episodes are played, and again, with the
outcome, when the run ends; each time it is replaced as a whole. The next two are described in
`rollout.report`. A fourth, `driver.lock`, is that of `rollout.fleet.ownership`.

A run that is resumed goes on in the same files: its timeline continues where it ended, and the seconds and
counts of its sessions add up.
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Self, cast

from rollout import __version__
from rollout.config import RunConfig
from rollout.errors import ConfigError, SinkError
from rollout.fleet.timeline import Timeline
from rollout.sandbox.base import PhaseTimings
from rollout.trajectory.storage import Location, Storage
from rollout.uris import without_secrets

__all__ = ["RunRecord", "make_run_folder", "make_run_id", "read_description", "versions"]

_DESCRIPTION = "run.json"
_TIMINGS = "timings.json"
_PROBE = ".probe"

_PACKAGES = ("ray", "numpy", "gymnasium", "msgpack", "pyarrow", "pydantic")


def make_run_id(name: str, started_at: str, nonce: str) -> str:
    """`<time>-<name>-<nonce>`: sorts by time, says what it is, and is unique."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
    return f"{started_at}-{plain}-{nonce}"


def make_run_folder(output: str, run_id: str) -> Storage:
    """Makes the folder of a run and shows that it can be written.

    Args:
        output: Folder of runs: a local path or a URI of `pyarrow.fs`.
        run_id: The run's id.

    Raises:
        SinkError: It is there already, or cannot be made or written.
    """
    try:
        folder = Storage.of(output).child(run_id)
        if folder.local is not None:
            folder.local.mkdir(parents=True)
        elif folder.names():
            raise SinkError(f"{folder} holds something already")
        folder.put(_PROBE, bytes(4096), "probe")
        folder.delete(_PROBE)
    except (OSError, SinkError) as error:
        shown = without_secrets(output)
        cause = error.message if isinstance(error, SinkError) else error.strerror
        raise SinkError(f"cannot write to the output folder {shown}: {cause}") from error
    return folder


def versions() -> dict[str, str]:
    """Of this package, Python, and the packages that take part in a run."""
    found = {name: metadata.version(name) for name in _PACKAGES}
    return {"rollout": __version__, "python": platform.python_version(), **found}


def read_description(folder: Location) -> dict[str, Any]:
    """What the `run.json` of a run says.

    Raises:
        ConfigError: The folder holds no run, or its `run.json` is damaged.
        SinkError: It cannot be read.
    """
    storage = Storage.of(folder)
    data = storage.read_if_there(_DESCRIPTION)
    if data is None:
        storage.check_bucket()
        raise ConfigError(f"{storage} holds no run.json: no run was begun there")
    try:
        found: object = json.loads(data)
    except ValueError as error:
        raise ConfigError(f"{storage.path(_DESCRIPTION)} is damaged: {error}") from None
    described = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    needed = {"run_id": str, "config": dict, "versions": dict}
    if wrong := [key for key, kind in needed.items() if not isinstance(described.get(key), kind)]:
        raise ConfigError(f"{storage.path(_DESCRIPTION)} is damaged: it does not say {', '.join(wrong)}")
    return described


class RunRecord:
    """Writes the small files of one run; made by `begin` or `resume`.

    Args:
        storage: The run's folder.
        description: What `run.json` says, or will say.
        timeline: Writes `metrics.jsonl`.
        played_s: Seconds that earlier sessions of the run were played, by its timeline.
        num_branches: Branches that they finished, by its timeline.
        num_failed_branches: Branches that failed in them, by its timeline.
        timings: Theirs.
    """

    def __init__(
        self,
        storage: Storage,
        description: dict[str, Any],
        timeline: Timeline,
        *,
        played_s: float = 0.0,
        num_branches: int = 0,
        num_failed_branches: int = 0,
        timings: PhaseTimings | None = None,
    ) -> None:
        self.storage = storage
        self.played_s = played_s
        self.num_branches = num_branches
        self.num_failed_branches = num_failed_branches
        self._description = description
        self._timeline = timeline
        self._timings = timings or PhaseTimings()
        self._is_begun = False

    @classmethod
    def begin(cls, folder: Location, run_id: str, config: RunConfig, started_at: float) -> Self:
        """The record of a new run.

        Args:
            folder: The run's folder.
            run_id: Its id.
            config: As resolved, with all defaults.
            started_at: Unix time.
        """
        storage = Storage.of(folder)
        description: dict[str, Any] = {
            "run_id": run_id,
            "status": "starting",
            "started_at": started_at,
            "seed": config.seed,
            "config": config.model_dump(mode="json") | {"output": without_secrets(config.output)},
            "versions": versions(),
        }
        return cls(storage, description, Timeline(storage))

    @classmethod
    def resume(cls, folder: Location) -> Self:
        """The record of a run that was begun, to go on with it; a torn line of its timeline is removed.

        Raises:
            ConfigError: The folder holds no run, or its `run.json` is damaged.
            SinkError: A file cannot be read or written.
        """
        storage = Storage.of(folder)
        described = read_description(storage)
        timeline, last = Timeline.resume(storage)
        record = cls(
            storage,
            described,
            timeline,
            played_s=float(last.get("t_s", 0.0)),
            num_branches=int(last.get("branches", 0)),
            num_failed_branches=int(last.get("failed_branches", 0)),
            timings=_read_timings(storage),
        )
        record._is_begun = True
        return record

    @property
    def is_begun(self) -> bool:
        """Whether there is a `run.json`, so that the run can be resumed."""
        return self._is_begun

    @property
    def description(self) -> Mapping[str, Any]:
        """What `run.json` says, or will say."""
        return self._description

    def set(self, **fields: object) -> None:
        """Sets fields of `run.json`, for the next `update` to write."""
        self._description.update(fields)

    def update(self, **fields: object) -> None:
        """Sets fields of `run.json` and replaces it.

        Raises:
            SinkError: It cannot be written.
        """
        self._description.update(fields)
        self._replace(_DESCRIPTION, self._description)
        self._is_begun = True

    def add_metric(self, metric: Mapping[str, float]) -> None:
        """Adds one line to `metrics.jsonl`, as `Timeline.add`.

        Raises:
            SinkError: It cannot be written.
        """
        self._timeline.add(metric)

    def flush_metrics(self) -> None:
        """Writes what `metrics.jsonl` lacks, as `Timeline.flush`.

        Raises:
            SinkError: It cannot be written.
        """
        self._timeline.flush()

    def write_timings(self, timings: PhaseTimings) -> None:
        """Writes `timings.json`: these, and those of earlier sessions.

        Raises:
            SinkError: It cannot be written.
        """
        total = PhaseTimings(dict(self._timings.seconds), dict(self._timings.calls))
        total.merge(timings)
        phases = {
            phase: {"seconds": round(seconds, 6), "calls": total.calls[phase]}
            for phase, seconds in sorted(total.seconds.items())
        }
        self._replace(_TIMINGS, phases)

    def _replace(self, name: str, value: Mapping[str, Any]) -> None:
        self.storage.put(name, (json.dumps(value, indent=2) + "\n").encode(), "record")


def _read_timings(storage: Storage) -> PhaseTimings:
    """The timings of earlier sessions; none where they did not get to write them, or are damaged."""
    with contextlib.suppress(SinkError, ValueError, KeyError, TypeError, AttributeError):
        phases: dict[str, Any] = json.loads(storage.read(_TIMINGS))
        seconds = {phase: float(entry["seconds"]) for phase, entry in phases.items()}
        return PhaseTimings(seconds, {phase: int(entry["calls"]) for phase, entry in phases.items()})
    return PhaseTimings()
