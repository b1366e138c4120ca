"""The folder of a run, wherever it lies: on a local disk, or in an object store behind `pyarrow.fs`.

`put` is atomic: a reader sees the whole file or none. On a local disk that takes a temporary file in the same
folder, fsync, rename and fsync of the folder; an object store makes an object visible when its stream is
closed, and has neither rename nor append. Names are relative to the run's folder, with `/`.

This does not retry: what a store does about a lost connection is its client's business.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from pyarrow import fs

from rollout.errors import SinkError
from rollout.trajectory import faults

__all__ = ["Location", "Storage", "fsync_folder", "sink_error"]

Location: TypeAlias = "str | os.PathLike[str]"
"""A local path, or a URI such as `s3://bucket/runs/x` or `gs://bucket/runs/x`."""

TEMPORARY_SUFFIX = ".tmp"


class Storage:
    """One folder.

    Attributes:
        filesystem: Where it lies.
        root: Its path there.
        local: The same as a local path; None in an object store.
    """

    def __init__(self, filesystem: fs.FileSystem, root: str) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.local: Path | None = Path(root) if isinstance(filesystem, fs.LocalFileSystem) else None

    @classmethod
    def of(cls, location: Location, filesystem: fs.FileSystem | None = None) -> Storage:
        """The folder at a path or URI; a path means one on `filesystem` if that is given.

        Raises:
            SinkError: The URI names no file system that this machine can reach.
        """
        text = os.fspath(location)
        if filesystem is not None:
            return cls(filesystem, text)
        if "://" not in text:
            return cls(fs.LocalFileSystem(), str(Path(text).absolute()))
        try:
            found, root = fs.FileSystem.from_uri(text)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise SinkError.wrap(error, f"cannot open {text}") from error
        return cls(found, root)

    def path(self, name: str) -> str:
        """The full path of a file, in its file system."""
        return f"{self.root}/{name}"

    def make_folder(self, name: str) -> None:
        """Makes a folder and its parents; it may exist.

        Raises:
            SinkError: It cannot be made.
        """
        try:
            if self.local is not None:
                folder = self.local / name
                missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
                folder.mkdir(parents=True, exist_ok=True)
                for path in missing:
                    fsync_folder(path.parent)
            else:
                self.filesystem.create_dir(self.path(name), recursive=True)
        except (OSError, pa.ArrowException) as error:
            raise sink_error(error, f"cannot make the folder {self.path(name)}") from error

    def put(self, name: str, data: bytes | memoryview, step: str) -> None:
        """Writes a whole file atomically and durably, replacing an earlier one; `step` names fault points.

        Raises:
            SinkError: It could not be written; an earlier file of that name is as it was.
        """
        try:
            if self.local is not None:
                _put_local(self.local / name, data, step)
            else:
                faults.point(f"{step}.write.before")
                with self.filesystem.open_output_stream(self.path(name)) as stream:
                    stream.write(data)
                faults.point(f"{step}.write.after")
        except (OSError, pa.ArrowException) as error:
            raise sink_error(error, f"cannot write {self.path(name)}") from error

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            SinkError: It cannot be read.
        """
        try:
            with self.filesystem.open_input_stream(self.path(name)) as stream:
                return stream.read()
        except (OSError, pa.ArrowException) as error:
            raise sink_error(error, f"cannot read {self.path(name)}") from error

    def files(self, folder: str) -> dict[str, int]:
        """Name and size of each file in a folder, sorted by name; none if there is no such folder.

        Raises:
            SinkError: It cannot be listed.
        """
        selector = fs.FileSelector(self.path(folder), allow_not_found=True)
        try:
            found: list[Any] = sorted(self.filesystem.get_file_info(selector), key=lambda info: info.path)
        except (OSError, pa.ArrowException) as error:
            raise sink_error(error, f"cannot list {self.path(folder)}") from error
        return {f"{folder}/{info.base_name}": info.size for info in found if info.is_file}

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None if there is none.

        Raises:
            SinkError: The storage does not answer.
        """
        try:
            found: Any = self.filesystem.get_file_info(self.path(name))
        except (OSError, pa.ArrowException) as error:
            raise sink_error(error, f"cannot look at {self.path(name)}") from error
        return found.size if found.is_file else None

    def delete(self, name: str) -> None:
        """Deletes a file, if it is there, and what an interrupted `put` left of it.

        Raises:
            SinkError: It cannot be deleted.
        """
        leftovers = [name] if self.local is None else [name, name + TEMPORARY_SUFFIX]
        try:
            for leftover in leftovers:
                if self.size(leftover) is not None:
                    self.filesystem.delete_file(self.path(leftover))
        except FileNotFoundError:
            return
        except (OSError, pa.ArrowException) as error:
            raise sink_error(error, f"cannot delete {self.path(name)}") from error


def _put_local(path: Path, data: bytes | memoryview, step: str) -> None:
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        try:
            faults.write_all(descriptor, data, f"{step}.write")
            faults.point(f"{step}.fsync.before")
            os.fsync(descriptor)
            faults.point(f"{step}.fsync.after")
        finally:
            os.close(descriptor)
        faults.point(f"{step}.rename.before")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    faults.point(f"{step}.rename.after")
    fsync_folder(path.parent)
    faults.point(f"{step}.folder.after")


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder durable.

    Raises:
        OSError: The disk refused.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sink_error(error: Exception, what: str) -> SinkError:
    """A SinkError that says what to do about the common causes; a full disk may be retried."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return SinkError(f"{what}: the disk is full: free some space", retryable=True)
    if number == errno.EFBIG:
        return SinkError(f"{what}: the file would exceed this process's size limit", retryable=True)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return SinkError(f"{what}: no permission to write there: choose another folder")
    if number is not None:
        return SinkError(f"{what}: {os.strerror(number)}")
    return SinkError.wrap(error, what)
