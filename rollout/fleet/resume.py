"""What has to be the same when a run that was interrupted goes on, and what of it is there already.

A run is finished with its own settings, seeds and versions, so that its rows are those that it would have had
without the interruption: as far as its search is deterministic and its randomness is not `unique`. Everything
that would make them others is refused here, before an episode is played.

What may differ: the output folder (the run may have been moved), the hosts, the accelerator of microVMs, and
versions of packages that no row depends on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from rollout.config import RunConfig, check_config
from rollout.errors import ConfigError
from rollout.fleet.progress import Progress
from rollout.fleet.record import versions
from rollout.trajectory.reader import scan
from rollout.trajectory.storage import Location

__all__ = ["check_engine", "check_given", "check_versions", "count_committed", "recorded_config"]

_DECISIVE = ("rollout", "python", "numpy", "gymnasium")
"""Packages that decide what an episode is; of Python the first two numbers of its version."""


def recorded_config(description: Mapping[str, Any]) -> RunConfig:
    """The settings that a run was begun with; `engine.kind` is what `auto` was then.

    Args:
        description: What its `run.json` says.

    Raises:
        ConfigError: They are not settings of this version.
    """
    config = check_config(description["config"])
    engine = description.get("engine")
    if not isinstance(engine, dict):
        return config
    kind = {"kind": cast("dict[str, Any]", engine).get("kind", config.engine.kind)}
    return config.model_copy(update={"engine": config.engine.model_copy(update=kind)})


def check_given(description: Mapping[str, Any], given: RunConfig) -> None:
    """Refuses settings that are not those of the run; its output folder may be another.

    Raises:
        ConfigError: One differs; the message names the first.
    """
    recorded = dict(_flat(check_config(description["config"]).model_dump(mode="json")))
    for key, value in _flat(given.model_dump(mode="json")):
        if key != "output" and recorded.pop(key, None) != value:
            was = dict(_flat(description["config"])).get(key)
            raise ConfigError(
                f"{key} is {was!r} in this run, not {value!r}: a run is finished with its own settings; "
                "begin another run for others"
            )
    recorded.pop("output", None)
    if recorded:
        key, value = next(iter(recorded.items()))
        raise ConfigError(f"{key} is {value!r} in this run, and not set in the config that was given")


def check_versions(description: Mapping[str, Any]) -> None:
    """Refuses versions that may play other episodes.

    Raises:
        ConfigError: One differs; the message names it.
    """
    recorded: Mapping[str, Any] = description["versions"]
    found = versions()
    for package in _DECISIVE:
        was, now = str(recorded.get(package)), found[package]
        digits = 2 if package == "python" else None
        if was.split(".")[:digits] != now.split(".")[:digits]:
            raise ConfigError(
                f"this run was begun with {package} {was}, here is {now}: its other episodes would not be "
                f"comparable; install {package} {was}, or begin another run"
            )


def check_engine(recorded: object, found: Mapping[str, object]) -> None:
    """Refuses an engine or an image that may play other episodes.

    Args:
        recorded: The entry `engine` of the run's `run.json`; None if it has none yet.
        found: What that entry would be now.

    Raises:
        ConfigError: They differ.
    """
    if not isinstance(recorded, dict):
        return
    was = cast("dict[str, object]", recorded)
    for key, name in (("kind", "engine"), ("image_digest", "guest image")):
        if was.get(key) != found[key]:
            raise ConfigError(
                f"this run was begun with the {name} {was.get(key)!r}, here is {found[key]!r}: its other "
                "episodes would not be comparable; begin another run"
            )


def count_committed(folder: Location, progress: Progress) -> None:
    """Counts the episodes that a run has already; notes those that are damaged.

    Raises:
        SinkError: They cannot be read.
    """
    episodes = scan(folder, "episodes", columns=["failure", "length", "return"])
    for failure, length, return_ in zip(*episodes.to_table().to_pydict().values(), strict=True):
        progress.count(failure, length, return_)
    progress.notes += [
        f"{problem.where}: {problem.detail}; they are not played again"
        for problem in episodes.problems
        if problem.kind in ("missing file", "damaged file")
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(cast("dict[str, Any]", value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
