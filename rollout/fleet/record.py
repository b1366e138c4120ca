"""The small files of a run beside its tables: `run.json`, `metrics.jsonl`, `timings.json`.

`run.json` says what was run and where: it is there as soon as episodes are played, and again, with the
outcome, when the run ends; each time it is replaced as a whole. The other two are described in
`rollout.report`.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rollout import __version__
from rollout.config import RunConfig
from rollout.errors import SinkError
from rollout.sandbox.base import PhaseTimings

__all__ = ["RunRecord", "make_run_folder", "make_run_id", "versions"]

_PACKAGES = ("ray", "numpy", "gymnasium", "msgpack", "pyarrow", "pydantic")


def make_run_id(name: str, started_at: str, nonce: str) -> str:
    """`<time>-<name>-<nonce>`: sorts by time, says what it is, and is unique."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
    return f"{started_at}-{plain}-{nonce}"


def make_run_folder(output: str, run_id: str) -> Path:
    """Makes the folder of a run and shows that it can be written.

    Raises:
        SinkError: It cannot be made or written.
    """
    folder = Path(output) / run_id
    try:
        folder.mkdir(parents=True)
        probe = folder / ".probe"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise SinkError(f"cannot write to the output folder {output}: {error.strerror}") from error
    return folder


def versions() -> dict[str, str]:
    """Of this package, Python, and the packages that take part in a run."""
    found = {name: metadata.version(name) for name in _PACKAGES}
    return {"rollout": __version__, "python": platform.python_version(), **found}


class RunRecord:
    """Writes the small files of one run.

    Args:
        folder: The run's folder.
        run_id: Its id.
        config: As resolved, with all defaults.
        started_at: Unix time.
    """

    def __init__(self, folder: Path, run_id: str, config: RunConfig, started_at: float) -> None:
        self.folder = folder
        self._description: dict[str, Any] = {
            "run_id": run_id,
            "status": "starting",
            "started_at": started_at,
            "seed": config.seed,
            "config": config.model_dump(mode="json"),
            "versions": versions(),
        }

    def update(self, **fields: object) -> None:
        """Sets fields of `run.json` and replaces it.

        Raises:
            SinkError: It cannot be written.
        """
        self._description.update(fields)
        self._replace("run.json", self._description)

    def add_metric(self, metric: Mapping[str, float]) -> None:
        """Appends one line to `metrics.jsonl`.

        Raises:
            SinkError: It cannot be written.
        """
        try:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(metric) + "\n")
        except OSError as error:
            raise SinkError.wrap(error, "cannot write metrics.jsonl") from error

    def write_timings(self, timings: PhaseTimings) -> None:
        """Writes `timings.json`.

        Raises:
            SinkError: It cannot be written.
        """
        phases = {
            phase: {"seconds": round(seconds, 6), "calls": timings.calls[phase]}
            for phase, seconds in sorted(timings.seconds.items())
        }
        self._replace("timings.json", phases)

    def _replace(self, name: str, value: Mapping[str, Any]) -> None:
        temporary = self.folder / f".{name}"
        try:
            temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
            temporary.replace(self.folder / name)
        except OSError as error:
            raise SinkError.wrap(error, f"cannot write {name}") from error
