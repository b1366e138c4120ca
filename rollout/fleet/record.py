"""The small files of a run beside its tables: `run.json`, `metrics.jsonl`, `timings.json`, `driver.lock`.

`run.json` says what was run and where: it is there as soon as episodes are played, and again, with the
outcome, when the run ends; each time it is replaced as a whole. The next two are described in
`rollout.report`. `driver.lock` is there while a driver plays the run: it holds a lock on the file, which the
kernel drops when it dies, so that nobody else plays the run at the same time.

A run that is resumed goes on in the same files: its timeline continues where it ended, and the seconds and
counts of its sessions add up.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
from collections.abc import Generator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Self, cast

from rollout import __version__
from rollout.config import RunConfig
from rollout.errors import ConfigError, SinkError
from rollout.sandbox.base import PhaseTimings

__all__ = ["RunRecord", "drive_alone", "make_run_folder", "make_run_id", "read_description", "versions"]

_LOCK_NAME = "driver.lock"

_PACKAGES = ("ray", "numpy", "gymnasium", "msgpack", "pyarrow", "pydantic")


def make_run_id(name: str, started_at: str, nonce: str) -> str:
    """`<time>-<name>-<nonce>`: sorts by time, says what it is, and is unique."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
    return f"{started_at}-{plain}-{nonce}"


def make_run_folder(output: str, run_id: str) -> Path:
    """Makes the folder of a run and shows that it can be written.

    Raises:
        ConfigError: It is a URI: what a driver notes beside the tables needs a file system of this machine.
        SinkError: It cannot be made or written.
    """
    if "://" in output:
        raise ConfigError(
            f"output is a local folder, not {output}: copy a finished run there, or write to it with "
            "rollout.trajectory.TrajectorySink"
        )
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


@contextlib.contextmanager
def drive_alone(folder: Path) -> Generator[None]:
    """Makes this process the only driver of a run for as long as the context lasts.

    Raises:
        ConfigError: Another process drives it; the message names that process.
        SinkError: The folder cannot be written.
    """
    path = folder / _LOCK_NAME
    try:
        descriptor = _locked(path)
    except OSError as error:
        raise SinkError.wrap(error, f"cannot write {path}") from error
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path) -> int:
    """The descriptor of the file, which is there and locked by this process."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
        except BlockingIOError:
            driver = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise ConfigError(f"the run in {path.parent} is being played by {driver}") from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # between open and lock its owner ended and removed it


def read_description(folder: Path) -> dict[str, Any]:
    """What the `run.json` of a run says.

    Raises:
        ConfigError: The folder holds no run, or its `run.json` is damaged.
        SinkError: It cannot be read.
    """
    path = folder / "run.json"
    try:
        found: object = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no run.json: no run was begun there") from None
    except OSError as error:
        raise SinkError.wrap(error, f"cannot read {path}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    described = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    needed = {"run_id": str, "config": dict, "versions": dict}
    if wrong := [key for key, kind in needed.items() if not isinstance(described.get(key), kind)]:
        raise ConfigError(f"{path} is damaged: it does not say {', '.join(wrong)}")
    return described


class RunRecord:
    """Writes the small files of one run; made by `begin` or `resume`.

    Args:
        folder: The run's folder.
        description: What `run.json` says, or will say.
        played_s: Seconds that earlier sessions of the run were played, by its timeline.
        num_branches: Branches that they finished, by its timeline.
        timings: Theirs.
    """

    def __init__(
        self,
        folder: Path,
        description: dict[str, Any],
        *,
        played_s: float = 0.0,
        num_branches: int = 0,
        num_failed_branches: int = 0,
        timings: PhaseTimings | None = None,
    ) -> None:
        self.folder = folder
        self.played_s = played_s
        self.num_branches = num_branches
        self.num_failed_branches = num_failed_branches
        self._description = description
        self._timings = timings or PhaseTimings()

    @classmethod
    def begin(cls, folder: Path, run_id: str, config: RunConfig, started_at: float) -> Self:
        """The record of a new run.

        Args:
            folder: The run's folder.
            run_id: Its id.
            config: As resolved, with all defaults.
            started_at: Unix time.
        """
        description: dict[str, Any] = {
            "run_id": run_id,
            "status": "starting",
            "started_at": started_at,
            "seed": config.seed,
            "config": config.model_dump(mode="json"),
            "versions": versions(),
        }
        return cls(folder, description)

    @classmethod
    def resume(cls, folder: Path) -> Self:
        """The record of a run that was begun, to go on with it; a torn line of its timeline is removed.

        Raises:
            ConfigError: The folder holds no run, or its `run.json` is damaged.
            SinkError: A file cannot be read or written.
        """
        described = read_description(folder)
        played_s, num_branches, num_failed = _end_of_timeline(folder / "metrics.jsonl")
        return cls(
            folder,
            described,
            played_s=played_s,
            num_branches=num_branches,
            num_failed_branches=num_failed,
            timings=_read_timings(folder / "timings.json"),
        )

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
        self._replace("timings.json", phases)

    def _replace(self, name: str, value: Mapping[str, Any]) -> None:
        temporary = self.folder / f".{name}"
        try:
            temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
            temporary.replace(self.folder / name)
        except OSError as error:
            raise SinkError.wrap(error, f"cannot write {name}") from error


def _end_of_timeline(path: Path) -> tuple[float, int, int]:
    """(seconds, branches, failed branches) of the last whole line of a timeline; what follows it is cut off.

    Raises:
        SinkError: It cannot be read or written.
    """
    try:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
    except FileNotFoundError:
        return 0.0, 0, 0
    except OSError as error:
        raise SinkError.wrap(error, f"cannot go on with {path}") from error
    for line in reversed(whole.splitlines()):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            metric: dict[str, Any] = json.loads(line)
            return float(metric["t_s"]), int(metric["branches"]), int(metric.get("failed_branches", 0))
    return 0.0, 0, 0


def _read_timings(path: Path) -> PhaseTimings:
    """The timings of earlier sessions; none where they did not get to write them, or are damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        phases: dict[str, Any] = json.loads(path.read_bytes())
        seconds = {phase: float(entry["seconds"]) for phase, entry in phases.items()}
        return PhaseTimings(seconds, {phase: int(entry["calls"]) for phase, entry in phases.items()})
    return PhaseTimings()
