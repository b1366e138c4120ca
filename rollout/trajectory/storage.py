"""The folder of a run, wherever it lies: on a local disk, or in an object store behind `pyarrow.fs`.

`put` is atomic: a reader sees the whole file or none. On a local disk that takes a temporary file in the same
folder, fsync, rename and fsync of the folder; an object store makes an object visible when its stream is
closed, and has neither rename nor append. Names are relative to the run's folder, with `/`.

This does not retry: what a store does about a lost connection is its client's business. It also excludes
nobody: `pyarrow.fs` has no conditional put, so of two writers of one name in an object store the last wins.
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
from rollout.uris import child_of, is_uri, store_cause, with_patience, without_secrets

__all__ = ["Location", "Storage", "fsync_folder", "sink_error"]

Location: TypeAlias = "str | os.PathLike[str] | Storage"
"""A local path, a URI such as `s3://bucket/runs/x` or `gs://bucket/runs/x`, or a folder that is open."""

TEMPORARY_SUFFIX = ".tmp"


class Storage:
    """One folder.

    Attributes:
        filesystem: Where it lies.
        root: Its path there.
        local: The same as a local path; None in an object store.
        location: How a user reaches it: a path or URI, without credentials. Also its text form.
    """

    def __init__(self, filesystem: fs.FileSystem, root: str, location: str = "") -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.local: Path | None = Path(root) if isinstance(filesystem, fs.LocalFileSystem) else None
        self.location = without_secrets(location) or self.root

    def __str__(self) -> str:
        return self.location

    @classmethod
    def of(cls, location: Location, filesystem: fs.FileSystem | None = None) -> Storage:
        """The folder at a path or URI; a path means one on `filesystem` if that is given.

        Raises:
            SinkError: The URI names no file system that this machine can reach.
        """
        if isinstance(location, Storage):
            return location
        text = os.fspath(location)
        if filesystem is not None:
            return cls(filesystem, text)
        if not is_uri(text):
            return cls(fs.LocalFileSystem(), str(Path(text).absolute()), text)
        try:
            found, root = fs.FileSystem.from_uri(with_patience(text))
        except (pa.ArrowException, OSError, ValueError) as error:
            shown = without_secrets(text)
            if (cause := store_cause(error)) is not None:
                raise SinkError(f"cannot open {shown}: {cause[0]}", retryable=cause[1]) from error
            raise SinkError(f"cannot open {shown}: {str(error).replace(text, shown)}") from error
        return cls(found, root, text)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.rsplit("/", 1)[-1] if self.local is None else self.local.resolve().name

    def child(self, name: str) -> Storage:
        """A folder in this one, which need not be there."""
        return Storage(self.filesystem, self.path(name), child_of(self.location, name))

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
            raise self.failure(error, f"cannot make the folder {self.path(name)}") from error

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
            if isinstance(error, FileNotFoundError):
                self.check_bucket()
            raise self.failure(error, f"cannot write {self.path(name)}") from error

    def check_bucket(self) -> None:
        """Tells a folder that is not there from a bucket that is not there, or not open to this user.

        Raises:
            SinkError: There is no such bucket, or it cannot be looked at.
        """
        if self.local is not None:
            return
        bucket = self.root.split("/", 1)[0]
        try:
            found: Any = self.filesystem.get_file_info(bucket)
        except (OSError, pa.ArrowException) as error:
            raise self.failure(error, f"cannot look at {bucket}") from error
        if found.type == fs.FileType.NotFound:
            raise SinkError(f"cannot use {self.location}: there is no bucket {bucket}: make it first")

    def read_if_there(self, name: str) -> bytes | None:
        """A whole file; None if there is none.

        Raises:
            SinkError: It cannot be read.
        """
        try:
            with self.filesystem.open_input_stream(self.path(name)) as stream:
                return stream.read()
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException) as error:
            raise self.failure(error, f"cannot read {self.path(name)}") from error

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            SinkError: It cannot be read.
        """
        data = self.read_if_there(name)
        if data is None:
            raise SinkError(f"cannot read {self.path(name)}: {os.strerror(errno.ENOENT)}")
        return data

    def files(self, folder: str) -> dict[str, int]:
        """Name and size of each file in a folder, sorted by name; none if there is no such folder.

        Raises:
            SinkError: It cannot be listed.
        """
        selector = fs.FileSelector(self.path(folder), allow_not_found=True)
        try:
            found: list[Any] = sorted(self.filesystem.get_file_info(selector), key=lambda info: info.path)
        except (OSError, pa.ArrowException) as error:
            raise self.failure(error, f"cannot list {self.path(folder)}") from error
        return {f"{folder}/{info.base_name}": info.size for info in found if info.is_file}

    def names(self) -> frozenset[str]:
        """Names of the files and folders in this one; none if it is not there.

        Raises:
            SinkError: It cannot be listed.
        """
        # Arrow's listing of GCS leaves folders out, as long as only the names of objects imply them.
        is_deep = self.filesystem.type_name == "gcs"
        selector = fs.FileSelector(self.root or "/", allow_not_found=True, recursive=is_deep)
        try:
            found: list[Any] = self.filesystem.get_file_info(selector)
        except (OSError, pa.ArrowException) as error:
            raise self.failure(error, f"cannot list {self.location}") from error
        return frozenset(info.path[len(self.root) + 1 :].split("/", 1)[0] for info in found)

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None if there is none.

        Raises:
            SinkError: The storage does not answer.
        """
        try:
            found: Any = self.filesystem.get_file_info(self.path(name))
        except (OSError, pa.ArrowException) as error:
            raise self.failure(error, f"cannot look at {self.path(name)}") from error
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
            raise self.failure(error, f"cannot delete {self.path(name)}") from error

    def delete_all(self) -> None:
        """Deletes the folder with everything in it, if it is there.

        Raises:
            SinkError: Something of it cannot be deleted.
        """
        try:
            self.filesystem.delete_dir(self.root)
        except FileNotFoundError:
            return
        except (OSError, pa.ArrowException) as error:
            raise self.failure(error, f"cannot delete {self.location}") from error

    def failure(self, error: Exception, what: str) -> SinkError:
        """The error that a failed operation on this folder ends in; it says what to do, if that is known."""
        if self.local is None and (cause := store_cause(error)) is not None:
            return SinkError(f"{what}: {cause[0]}", retryable=cause[1])
        return sink_error(error, what)


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
