"""Where logs lie, and what happens to those of dead writers."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from rollout.config import SinkConfig
from rollout.errors import SinkError
from rollout.trajectory.manifest import Manifest
from rollout.trajectory.roll import log_schemas, roll_log
from rollout.trajectory.stats import SinkStats
from rollout.trajectory.storage import Location, Storage
from rollout.trajectory.wal import LOG_SUFFIX, adopt_log, sweep_unborn

__all__ = ["make_log_folder", "recover_logs", "recover_run"]


def recover_run(run_dir: Location, config: SinkConfig) -> frozenset[str]:
    """Commits what dead writers of a run left in their logs, without opening a sink.

    Args:
        run_dir: Folder of the run.
        config: That of its sinks.

    Returns:
        The ids of all its committed episodes; none where the run never opened a sink.

    Raises:
        SinkError: A log could not be committed; it is still there.
    """
    storage = Storage.of(run_dir)
    manifest = Manifest(storage)
    manifest.refresh()
    if manifest.schemas is not None:
        recover_logs(make_log_folder(storage, config.log_folder), storage, manifest)
    return frozenset(manifest.committed)


def make_log_folder(storage: Storage, log_folder: str) -> Path:
    """The local folder of a run's logs, which exists afterwards.

    Args:
        storage: The run's folder.
        log_folder: Where logs of all runs lie; "" is the run's own folder, or the user's cache if that is in
            an object store. There each run has a folder by its place, so logs that lie apart from a run are
            not found once the run was moved.

    Raises:
        SinkError: It cannot be made.
    """
    if not log_folder and storage.local is not None:
        folder = storage.local / "wal"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        base = Path(log_folder).absolute() if log_folder else cache / "rollout" / "wal"
        root = storage.root if storage.local is None else storage.local.resolve()
        place = f"{storage.filesystem.type_name}:{root}"
        folder = base / hashlib.blake2b(place.encode(), digest_size=12).hexdigest()
    Storage.of(folder.parent).make_folder(folder.name)
    return folder


def recover_logs(folder: Path, storage: Storage, manifest: Manifest) -> SinkStats:
    """Commits what dead writers left in their logs; leaves those of living writers, and foreign ones, alone.

    Raises:
        SinkError: A log could not be committed; it is still there.
    """
    stats = SinkStats()
    sweep_unborn(folder)
    for path in sorted(folder.glob(f"*{LOG_SUFFIX}")):
        with adopt_log(path) as is_ours:
            if not is_ours:
                continue
            try:
                log_schemas(path, manifest)
            except SinkError:
                stats = replace(stats, num_foreign_logs=stats.num_foreign_logs + 1)
                continue
            stats = stats.with_roll(roll_log(path, storage, manifest), recovered=True)
    return stats
