"""The sink: takes finished episodes, keeps them, and turns them into committed Parquet files.

    write ─► encode ─► write-ahead log ─► (roll) ─► Parquet files ─► manifest

Contract:

- When `write` returns, the episode is acknowledged: it is in the log, synced, and a crash of the process at
  any later point does not lose it. Whoever opens the run's sink next on the same machine commits it.
- An episode is committed whole or not at all, and once, by its id: writing it again (a retry, a restart,
  another writer) changes nothing. Readers see what is committed; `flush` commits everything acknowledged.
- Memory is bounded: the columns of at most two logs. One is being rolled while the next one fills; when both
  are full, `write` waits. Nothing is ever dropped.
- Many sinks may write one run at the same time, each with its own logs and files.

Where the run is in an object store, logs lie on a local disk (`SinkConfig.log_folder`): acknowledged episodes
then survive the process but not the machine, until they are committed.

A roll that fails (a full disk, a store that is away) is tried again after `roll_s`, and by `flush` and
`close`, which raise if it fails again. The logs stay, so that nothing acknowledged is lost.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rollout.config import SinkConfig
from rollout.errors import SinkError
from rollout.trajectory.batch import TrajectoryBatch, pack_batch
from rollout.trajectory.encode import TrajectoryEncoder
from rollout.trajectory.manifest import Manifest
from rollout.trajectory.recover import make_log_folder, recover_logs
from rollout.trajectory.roll import log_header, roll_log
from rollout.trajectory.rows import Trajectory
from rollout.trajectory.schema import TABLES
from rollout.trajectory.stats import SinkStats
from rollout.trajectory.storage import Location, Storage
from rollout.trajectory.wal import LOG_SUFFIX, LogWriter

if TYPE_CHECKING:
    import gymnasium
    from pyarrow.fs import FileSystem

__all__ = ["TrajectorySink"]

_BATCH_BYTES = 54 << 10
"""Memory of a batch beside its columns, as measured: about 70 Arrow arrays with their buffers."""


class _ActiveLog:
    """A log with what is in it, and what decides when it is rolled."""

    def __init__(self, writer: LogWriter) -> None:
        self.writer = writer
        self.batches: list[TrajectoryBatch] = []
        self.num_rows = 0
        self.num_bytes = 0
        self.first_write_s = 0.0


class TrajectorySink:
    """Writes one run; every method may be called from many threads.

    Args:
        run_dir: Folder of the run: a local path or a URI of `pyarrow.fs`. It is made if it is missing.
        run_id: Name of the run; must be that of an existing folder's run.
        observation_space: Types the observation column.
        action_space: Types the action columns.
        config: When to roll, what to record, where logs lie.
        filesystem: File system of `run_dir`, if it is not to be found from the path.
        writer_id: Unique name of this writer in the run; made up by default.

    Raises:
        SinkError: The folder cannot be written, belongs to another run or to other spaces, or the log of a
            dead writer cannot be committed.
    """

    def __init__(
        self,
        run_dir: Location,
        *,
        run_id: str,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        config: SinkConfig | None = None,
        filesystem: FileSystem | None = None,
        writer_id: str | None = None,
    ) -> None:
        self.run_id = run_id
        self.writer_id = writer_id or uuid.uuid4().hex[:12]
        self._config = config or SinkConfig()
        self._encoder = TrajectoryEncoder(observation_space, action_space)
        self._storage = Storage.of(run_dir, filesystem)
        for table in TABLES:
            self._storage.make_folder(table)
        self._log_folder = make_log_folder(self._storage, self._config.log_folder)
        self._manifest = Manifest(self._storage)  # used by one thread at a time: this one, then the roller
        self._manifest.declare(run_id, self._encoder.schemas, self.writer_id, self._encoder.spaces)
        self._stats = recover_logs(self._log_folder, self._storage, self._manifest)

        self._changed = threading.Condition()  # guards all that follows
        self._known = set(self._manifest.committed)
        self._active: _ActiveLog | None = None
        self._sealed: deque[_ActiveLog] = deque()
        self._num_logs = 0
        self._num_rolled = 0
        self._failure: SinkError | None = None
        self._retry_at_s = 0.0
        self._is_open = True
        self._is_stopping = False
        self._roller = threading.Thread(target=self._roll_forever, name="trajectory-roller", daemon=True)
        self._roller.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def left_in(self) -> Path | None:
        """Where logs of this run lie that are not committed, of any writer here; None if there are none."""
        return self._log_folder if any(self._log_folder.glob(f"*{LOG_SUFFIX}")) else None

    @property
    def stats(self) -> SinkStats:
        """The counters as they are now."""
        with self._changed:
            return self._stats

    def __contains__(self, episode_id: str) -> bool:
        """Whether the episode was committed when the sink was opened, or was acknowledged since."""
        with self._changed:
            return episode_id in self._known

    @property
    def episode_ids(self) -> frozenset[str]:
        """All episodes of which `in` is true: what a resumed run need not play again."""
        with self._changed:
            return frozenset(self._known)

    def write(self, trajectory: Trajectory) -> bool:
        """Writes one episode; when this returns, it is acknowledged.

        Returns:
            False if the episode was there already; nothing was changed then.

        Raises:
            SinkError: The trajectory is not whole or does not fit the tables, or the log cannot be written.
                The episode is not acknowledged.
        """
        return self.write_many([trajectory]) == 1

    def write_many(self, trajectories: Sequence[Trajectory]) -> int:
        """Writes episodes with one sync for all.

        Returns:
            How many of them were new.

        Raises:
            SinkError: As `write`; none of them is acknowledged.
        """
        return self.write_batch(self._encoder.encode(trajectories, with_nodes=self._config.record_nodes))

    def write_batch(self, batch: TrajectoryBatch) -> int:
        """Writes episodes that are in columns already.

        Returns:
            How many of them were new.

        Raises:
            SinkError: As `write`; none of them is acknowledged.
        """
        for table in TABLES:
            if not batch.table(table).schema.equals(self._encoder.schemas[table]):
                raise SinkError(f"the columns of {table} in the batch are not those of the run")
        if not self._config.record_nodes and batch.nodes.num_rows:
            batch = replace(batch, nodes=batch.nodes.slice(0, 0), num_nodes=batch.num_nodes * 0)
        payload = pack_batch(batch)
        with self._changed:
            log = self._log_with_room()
            known = self._known.intersection(batch.episode_ids)
            if known:
                batch = batch.without(known)
                payload = pack_batch(batch)
            if batch.episode_ids:
                self._append(log, batch, payload)
            self._stats = replace(
                self._stats,
                num_written=self._stats.num_written + len(batch.episode_ids),
                num_duplicates=self._stats.num_duplicates + len(known),
            )
            # An episode that another thread wrote may not be synced yet, and this call acknowledges it too.
            logs = [*self._sealed, log] if known else [log]
            positions = [(one.writer, one.writer.num_bytes) for one in logs]
        for writer, position in positions:
            writer.sync(position)
        return len(batch.episode_ids)

    def flush(self) -> None:
        """Commits everything that was written before this call.

        Raises:
            SinkError: It could not be committed; it stays in the log, and the call can be made again.
        """
        with self._changed:
            self._check_open()
            self._flush()

    def close(self) -> None:
        """Commits everything and gives up the logs. Idempotent.

        Raises:
            SinkError: Not everything could be committed. The sink is closed nevertheless; the episodes are in
                the log, and opening the run's sink again commits them.
        """
        with self._changed:
            if not self._is_open:
                return
            self._is_open = False
        try:
            with self._changed:
                self._flush()
        finally:
            with self._changed:
                self._is_stopping = True
                self._changed.notify_all()
            self._roller.join()  # it gives up the logs, so that another sink can have them at once

    def _check_open(self) -> None:
        if not self._is_open:
            raise SinkError("the sink is closed")

    def _flush(self) -> None:
        """Holds the lock. Returns when every log that exists now is rolled."""
        target = self._num_logs
        self._retry_at_s = 0.0
        self._failure = None
        self._changed.notify_all()  # the roller may be waiting for the time of its next try
        while self._num_rolled < target:
            if self._active is not None and not self._sealed:
                self._seal()
            self._changed.wait()
            if self._failure is not None:
                raise self._failure

    def _append(self, log: _ActiveLog, batch: TrajectoryBatch, payload: bytes) -> None:
        """Holds the lock."""
        log.writer.append(payload)
        log.batches.append(batch)
        self._known.update(batch.episode_ids)
        if not log.num_rows:
            log.first_write_s = time.monotonic()
            self._changed.notify_all()  # the roller has a deadline now
        log.num_rows += batch.num_rows
        log.num_bytes += batch.num_bytes + _BATCH_BYTES
        if self._is_full(log) and not self._sealed:
            self._seal()

    def _is_full(self, log: _ActiveLog) -> bool:
        return (
            log.num_rows >= self._config.roll_rows
            or log.num_bytes >= self._config.roll_bytes
            or log.writer.is_broken
        )

    def _log_with_room(self) -> _ActiveLog:
        """Holds the lock. Waits while the roller is behind.

        Raises:
            SinkError: There is no room because rolling fails, or no new log can be made.
        """
        self._check_open()
        started_s = time.monotonic()
        while self._active is not None and self._is_full(self._active):
            if not self._sealed:
                self._seal()
                break
            if self._failure is not None:
                raise self._failure
            self._changed.wait()
            self._check_open()
        waited_s = time.monotonic() - started_s
        self._stats = replace(self._stats, waited_s=self._stats.waited_s + waited_s)
        if self._active is None:
            name = f"{self.writer_id}-{self._num_logs:06d}{LOG_SUFFIX}"
            header = log_header(self.run_id, self._encoder.schemas)
            self._active = _ActiveLog(LogWriter(self._log_folder / name, header))
            self._num_logs += 1
        return self._active

    def _seal(self) -> None:
        """Holds the lock. Hands the active log to the roller."""
        if self._active is not None:
            self._sealed.append(self._active)
            self._active = None
            self._changed.notify_all()

    def _roll_forever(self) -> None:
        while (log := self._next_sealed()) is not None:
            try:
                report = roll_log(log.writer.path, self._storage, self._manifest, log.batches)
            except Exception as error:  # a thread's boundary: whatever it is, the next flush raises it
                failure = error if isinstance(error, SinkError) else SinkError.wrap(error, "cannot roll")
                with self._changed:
                    self._failure = failure
                    self._retry_at_s = time.monotonic() + self._config.roll_s
                    self._stats = replace(self._stats, num_failed_rolls=self._stats.num_failed_rolls + 1)
                    self._changed.notify_all()
                continue
            log.writer.retire()
            log.writer.close()
            with self._changed:
                self._sealed.popleft()
                self._num_rolled += 1
                self._failure = None
                self._stats = self._stats.with_roll(report)
                self._changed.notify_all()
        for left in self._logs_left():
            left.writer.close()

    def _next_sealed(self) -> _ActiveLog | None:
        """Waits for a log to roll; None when the sink is stopped."""
        with self._changed:
            while not self._is_stopping:
                now_s = time.monotonic()
                due_s = self._retry_at_s if self._failure is not None else now_s
                if self._sealed and due_s <= now_s:
                    return self._sealed[0]
                if not self._sealed:
                    due_s = float("inf")
                    if self._active is not None and self._active.num_rows:
                        due_s = self._active.first_write_s + self._config.roll_s
                        if due_s <= now_s:
                            self._seal()
                            continue
                self._changed.wait(None if due_s == float("inf") else due_s - now_s)
            return None

    def _logs_left(self) -> Iterator[_ActiveLog]:
        with self._changed:
            yield from self._sealed
            if self._active is not None:
                yield self._active
