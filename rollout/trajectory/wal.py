"""The write-ahead log: one local file that only grows, written by one process.

    "ROLLWAL1" frame frame ...        frame: payload length (u32), CRC-32 of length and payload (u32), payload

The first frame is a header (a msgpack map), the others are records. All integers are little-endian.

Invariants:

- A log appears under its name, locked and with its header on disk, or not at all (it is made under another
  name, `*.new`, and renamed).
- Its writer holds an exclusive lock on it as long as it lives; the kernel drops the lock when it dies. Who
  gets the lock may take the log over, and no one else may.
- What `sync` covered survives the death of the process, and that of the machine as far as its disk keeps
  what fsync promises.

A frame whose checksum fails ends the log if nothing readable follows it (a torn tail: the write was never
acknowledged); if frames follow, it is damage, and the frames behind it are still read. Both are counted.

It does *not* guarantee that a record which was appended, but not synced, is lost: it may come back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
import zlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgpack

from rollout.errors import SinkError
from rollout.trajectory import faults
from rollout.trajectory.storage import fsync_folder, sink_error

__all__ = ["LOG_SUFFIX", "LogReader", "LogWriter", "adopt_log", "sweep_unborn"]

LOG_SUFFIX = ".wal"
_UNBORN_SUFFIX = ".wal.new"
_MAGIC = b"ROLLWAL1"
_FRAME = struct.Struct("<II")
_MAX_PAYLOAD_BYTES = (1 << 32) - 1


def _frame(payload: bytes) -> bytes:
    length = len(payload).to_bytes(4, "little")
    return _FRAME.pack(len(payload), zlib.crc32(payload, zlib.crc32(length))) + payload


class LogWriter:
    """A new log. Safe to use from many threads; syncs of many threads share one fsync.

    Args:
        path: Its name, which must not exist and ends in `.wal`.
        header: What a reader must know of it.

    Raises:
        SinkError: It cannot be made.
    """

    def __init__(self, path: Path, header: Mapping[str, object]) -> None:
        self.path = path
        self.num_records = 0
        self._sync_lock = threading.Lock()
        self._size = 0
        self._synced = 0
        self._broken: SinkError | None = None
        unborn = path.with_suffix(_UNBORN_SUFFIX)
        try:
            self._descriptor = _create_locked(unborn)
        except OSError as error:
            raise sink_error(error, f"cannot make the log {path}") from error
        try:
            data = _MAGIC + _frame(cast("bytes", msgpack.packb(dict(header))))
            faults.write_all(self._descriptor, data, "wal.header")
            os.fsync(self._descriptor)
            faults.point("wal.create.before")
            unborn.rename(path)
            fsync_folder(path.parent)
            faults.point("wal.create.after")
        except OSError as error:
            os.close(self._descriptor)
            with contextlib.suppress(FileNotFoundError):
                unborn.unlink()
            raise sink_error(error, f"cannot make the log {path}") from error
        self._size = self._synced = len(data)

    @property
    def num_bytes(self) -> int:
        """Size of the log."""
        return self._size

    @property
    def is_broken(self) -> bool:
        """It takes no more records; what it holds can still be read."""
        return self._broken is not None

    def append(self, payload: bytes) -> int:
        """Appends one record; not safe against another `append` at the same time.

        Returns:
            The position to `sync` to.

        Raises:
            SinkError: The record is too large, or could not be written (then the log is as it was before).
        """
        if self._broken is not None:
            raise self._broken
        if len(payload) > _MAX_PAYLOAD_BYTES:
            raise SinkError(f"a record of {len(payload)} bytes is too large for the log")
        data = _frame(payload)
        try:
            faults.write_all(self._descriptor, data, "wal.append")
        except OSError as error:
            failure = sink_error(error, f"cannot write the log {self.path}")
            try:
                os.ftruncate(self._descriptor, self._size)
            except OSError:
                self._broken = failure  # a torn frame lies at its end: nothing may follow
            raise failure from error
        self._size += len(data)
        self.num_records += 1
        return self._size

    def sync(self, position: int) -> None:
        """Returns when everything before `position` is on disk.

        Raises:
            SinkError: The disk refused. The log takes no more records: after a failed fsync nobody knows what
                of it is on disk.
        """
        with self._sync_lock:
            if self._synced >= position:
                return
            if self._broken is not None:
                raise self._broken
            target = self._size
            faults.point("wal.fsync.before")
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self._broken = sink_error(error, f"cannot sync the log {self.path}")
                raise self._broken from error
            faults.point("wal.fsync.after")
            self._synced = target

    def retire(self) -> None:
        """Says that the records are safe elsewhere: from now on every `sync` is satisfied."""
        with self._sync_lock:
            self._synced = self._size

    def close(self) -> None:
        """Gives up the lock; the file stays. Idempotent."""
        with self._sync_lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
            self._broken = self._broken or SinkError(f"the log {self.path} is closed")


@dataclass
class LogReader:
    """Reads a log from the start; the counters are complete once `records` is used up.

    Attributes:
        path: The log.
        torn_bytes: Length of a torn tail.
        num_damaged: Frames with a wrong checksum that others follow.
    """

    path: Path
    torn_bytes: int = 0
    num_damaged: int = 0

    def header(self) -> dict[str, Any] | None:
        """The header; None if this is no log or its header is damaged.

        Raises:
            SinkError: The file cannot be read.
        """
        payload = next(self._frames(), None)
        if payload is None or self.num_damaged:
            return None
        try:
            header = msgpack.unpackb(payload)
        except (ValueError, msgpack.UnpackException):
            return None
        return cast("dict[str, Any]", header) if isinstance(header, dict) else None

    def records(self) -> Iterator[bytes]:
        """The payloads of all records, in order.

        Raises:
            SinkError: The file cannot be read.
        """
        frames = self._frames()
        next(frames, None)
        yield from frames

    def _frames(self) -> Iterator[bytes]:
        self.torn_bytes = self.num_damaged = 0
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if file.read(len(_MAGIC)) != _MAGIC:
                    self.torn_bytes = size
                    return
                num_bad, bad_from = 0, 0
                while (position := file.tell()) < size:
                    payload, is_good = self._read_frame(file.read(_FRAME.size), file, size)
                    if is_good:
                        self.num_damaged += num_bad
                        num_bad = 0
                        yield payload
                        continue
                    bad_from = bad_from if num_bad else position
                    num_bad += 1
                    if not payload:
                        break
                self.torn_bytes = size - bad_from if num_bad else 0
        except OSError as error:
            raise sink_error(error, f"cannot read the log {self.path}") from error

    @staticmethod
    def _read_frame(head: bytes, file: Any, size: int) -> tuple[bytes, bool]:
        """(payload, whether its checksum holds); no payload where the frame has no end in the file."""
        if len(head) < _FRAME.size:
            return b"", False
        length, checksum = _FRAME.unpack(head)
        if length > size - file.tell():
            return b"", False
        payload: bytes = file.read(length)
        return payload, zlib.crc32(payload, zlib.crc32(head[:4])) == checksum


def _create_locked(path: Path) -> int:
    """The descriptor of a new, locked file."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_file_at(descriptor, path):
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # between open and lock a sweep took it for the file of a dead writer


@contextlib.contextmanager
def adopt_log(path: Path) -> Generator[bool, None, None]:
    """Takes over the log of a dead writer for the time of the `with` block.

    Yields:
        False if its writer lives, or another process has taken it over or finished it.

    Raises:
        SinkError: The log cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    except OSError as error:
        raise sink_error(error, f"cannot open the log {path}") from error
    try:
        yield _lock_is_ours(descriptor, path)
    finally:
        os.close(descriptor)


def sweep_unborn(folder: Path) -> None:
    """Removes logs that were never born: their writer died while it made them."""
    for path in folder.glob(f"*{_UNBORN_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError), adopt_log(path) as is_ours:
            if is_ours:
                path.unlink()


def _lock_is_ours(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _is_file_at(descriptor, path)  # between open and lock it may have been finished and removed
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        raise sink_error(error, f"cannot lock the log {path}") from error


def _is_file_at(descriptor: int, path: Path) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
