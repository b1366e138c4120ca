"""Folders as tar archives: made on the host for a guest, and taken from a guest that is not trusted.

What `unpack` guarantees, whatever the archive holds:

- Nothing is made, changed or removed outside the target; the target appears whole, or not at all.
- No name leads out of it, and no link in it does when it is followed. Links are made last, so that nothing is
  ever written through one.
- Sizes, depth and memory stay within bounds, and so does the number of what comes out, folders that are only
  named on the way to something included; only folders, regular files and links come out.

Permission bits are kept, the bits for set-user-id and the like are not; owners are who unpacks.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final, cast

from rollout.errors import GuestError

__all__ = ["MAX_BYTES", "MAX_ENTRIES", "pack", "unpack"]

MAX_BYTES: Final = 1 << 30
"""Most bytes of an archive, and of what comes out of it, unless told otherwise."""
MAX_ENTRIES: Final = 100_000
"""Most entries of an archive, unless told otherwise."""

_MAX_NAME_BYTES = 2048  # paths stay far below the system's limit, beyond which links are not resolved
_MAX_DEPTH = 256  # what removes or lists a tree does so by recursion
_MAX_READ_BYTES = 1 << 20
_COPY_BYTES = 256 << 10
_CONTENT = "content"
_LAST_TIME_S = 1 << 33


def pack(source: Path, name: str, archive: IO[bytes], *, max_bytes: int = MAX_BYTES) -> None:
    """Writes a file or a folder as an archive; links are kept as links, and not followed.

    Args:
        source: What to pack; a link here is followed, since the caller named it.
        name: What it is called in the archive; `.` for the content of a folder alone.
        archive: Where it is written.
        max_bytes: Most bytes of the archive.

    Raises:
        GuestError: It is missing or unreadable, changes meanwhile, is too large, or holds something that is
            neither folder, file nor link.
    """
    try:
        with tarfile.open(fileobj=archive, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for place, relative in _walk(source.resolve(strict=True)):
                _add(tar, place, f"{name}/{relative}" if relative else name)
                if archive.tell() > max_bytes:
                    raise GuestError(f"cannot pack {str(source)!r}: it is longer than {max_bytes} bytes")
    except (OSError, ValueError, RecursionError, tarfile.TarError) as error:
        raise GuestError(f"cannot pack {str(source)!r}: {error}") from error


def unpack(
    archive: IO[bytes],
    name: str,
    target: Path,
    *,
    max_bytes: int = MAX_BYTES,
    max_entries: int = MAX_ENTRIES,
) -> None:
    """Makes the file or folder that an untrusted archive holds.

    Args:
        archive: A seekable file.
        name: What it is called in the archive; `.` for the content of a folder alone.
        target: Where it goes; must be missing, or an empty folder. Missing parents are made.
        max_bytes: Most bytes that come out.
        max_entries: Most entries.

    Raises:
        GuestError: The archive is damaged or hostile, or the target cannot be made; nothing is left then.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".rollout-", dir=target.parent))
    except OSError as error:
        raise GuestError(f"cannot make {str(target)!r}: {error.strerror}") from error
    try:
        unpacking = _Unpacking(stage / _CONTENT, name, max_bytes, max_entries)
        try:
            unpacking.take(archive)
        except GuestError:
            raise
        except Exception as error:  # of hostile archives the parser raises anything
            raise GuestError(f"the archive is damaged: {type(error).__name__}: {error}") from error
        _publish(stage / _CONTENT, target, unpacking.mode)
    finally:
        _discard(stage)


def _discard(stage: Path) -> None:
    """Removes what was unpacked, folders that nobody may write to included."""
    for parent, names, _ in os.walk(stage):
        for name in names:
            folder = Path(parent, name)
            if not folder.is_symlink():
                folder.chmod(0o700)
    shutil.rmtree(stage, ignore_errors=True)


def _publish(content: Path, target: Path, mode: int) -> None:
    try:
        if not content.is_dir() and os.path.lexists(target):
            raise GuestError(f"cannot make {str(target)!r}: it exists")
        content.rename(target)
        target.chmod(mode)
    except OSError as error:
        raise GuestError(f"cannot make {str(target)!r}: {error.strerror}") from error


def _walk(place: Path, relative: str = "") -> Iterator[tuple[Path, str]]:
    """An entry and all below it, each with its path from the first, in a stable order."""
    yield place, relative
    if stat.S_ISDIR(place.lstat().st_mode):
        for child in sorted(place.iterdir()):
            yield from _walk(child, f"{relative}/{child.name}" if relative else child.name)


def _add(tar: tarfile.TarFile, place: Path, name: str) -> None:
    entry = tarfile.TarInfo(name)
    found = place.lstat()
    entry.mode, entry.mtime = stat.S_IMODE(found.st_mode), int(found.st_mtime)
    if stat.S_ISDIR(found.st_mode):
        entry.type = tarfile.DIRTYPE
        tar.addfile(entry)
    elif stat.S_ISLNK(found.st_mode):
        entry.type, entry.linkname = tarfile.SYMTYPE, str(place.readlink())
        tar.addfile(entry)
    elif stat.S_ISREG(found.st_mode):
        fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            entry.size = os.fstat(fd).st_size
            tar.addfile(entry, file)
    else:
        raise GuestError(f"cannot pack {str(place)!r}: neither a folder nor a file nor a link")


class _Unpacking:
    """One archive on its way into a folder that nobody else uses.

    Attributes:
        mode: Permission bits of the top entry, which the caller sets.
    """

    def __init__(self, top: Path, name: str, max_bytes: int, max_entries: int) -> None:
        self.mode = 0o755
        self._top = top
        self._prefix = tuple(part for part in name.split("/") if part != ".")
        self._bytes_left, self._max_bytes = max_bytes, max_bytes
        self._entries_left, self._max_entries = max_entries, max_entries
        self._links: list[tuple[Path, str]] = []
        self._folder_modes: list[tuple[Path, int]] = []

    def take(self, archive: IO[bytes]) -> None:
        """Makes everything that the archive holds."""
        with tarfile.open(fileobj=cast("IO[bytes]", BoundedReader(archive)), mode="r:") as tar:
            while (entry := tar.next()) is not None:
                cast("Any", tar).members.clear()  # the parser would keep them all
                self._take_entry(tar, entry)
        if not self._top.exists():
            raise GuestError("the archive is empty")
        self._make_links()
        for folder, mode in sorted(self._folder_modes, reverse=True):  # what is inside first
            folder.chmod(mode)

    def _take_entry(self, tar: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        parts = self._parts(entry.name)
        self._spend(max(0, entry.size))
        place, mode = self._top.joinpath(*parts), entry.mode & 0o777
        self._make_way_to(place)
        if entry.isdir():
            place.mkdir(exist_ok=True)
            if parts:
                self._folder_modes.append((place, mode))
        elif entry.isreg():
            self._write_file(tar, entry, place, mode)
        elif entry.issym() and parts:
            self._links.append((place, entry.linkname))
        elif entry.islnk():
            os.link(self._top.joinpath(*self._parts(entry.linkname)), place, follow_symlinks=False)
        else:
            raise GuestError(f"{entry.name!r} is neither a folder nor a file nor a link inside a folder")
        if not parts:
            self.mode = mode

    def _spend(self, num_bytes: int) -> None:
        self._entries_left -= 1
        self._bytes_left -= num_bytes
        if self._entries_left < 0 or self._bytes_left < 0:
            raise GuestError(
                f"the archive holds more than {self._max_entries} entries or {self._max_bytes} bytes"
            )

    def _make_way_to(self, place: Path) -> None:
        """Makes the folders that an archive need not name; each counts as an entry."""
        missing: list[Path] = []
        folder = place.parent
        while folder.is_relative_to(self._top) and not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            self._spend(0)
            folder.mkdir()

    def _parts(self, name: str) -> tuple[str, ...]:
        """The path of an entry below the top.

        Raises:
            GuestError: It leads out, or too deep.
        """
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        is_inside = not name.startswith("/") and ".." not in parts
        if len(os.fsencode(name)) > _MAX_NAME_BYTES or not is_inside or not self._is_below_top(parts):
            raise GuestError(f"the archive names {name[:200]!r}, which is not inside what was asked for")
        if len(parts) > _MAX_DEPTH:
            raise GuestError(
                f"the archive names {name[:200]!r}, which is more than {_MAX_DEPTH} folders deep"
            )
        return parts[len(self._prefix) :]

    def _is_below_top(self, parts: tuple[str, ...]) -> bool:
        return parts[: len(self._prefix)] == self._prefix

    def _write_file(self, tar: tarfile.TarFile, entry: tarfile.TarInfo, place: Path, mode: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(place, flags, 0o600), "wb") as file:
            content = tar.extractfile(entry)
            assert content is not None  # only of what is no regular file
            left = entry.size
            while left > 0 and (data := content.read(min(left, _COPY_BYTES))):
                file.write(data)
                left -= len(data)
            if left:
                raise GuestError(f"the archive ends inside {entry.name!r}")
            os.fchmod(file.fileno(), mode)
            file.flush()
            if 0 <= entry.mtime < _LAST_TIME_S:
                os.utime(file.fileno(), (entry.mtime, entry.mtime))

    def _make_links(self) -> None:
        for place, leads_to in self._links:
            place.symlink_to(leads_to)
        top = self._top.resolve()
        for place, leads_to in self._links:  # by the file system itself: through other links, and all at once
            if leads_to.startswith("/") or not Path(os.path.realpath(place)).is_relative_to(top):
                name = place.relative_to(self._top)
                raise GuestError(
                    f"the link {str(name)!r} leads out of what was asked for, to {leads_to[:200]!r}"
                )


class BoundedReader:
    """What the parser may read of an archive: a bounded number of pieces of a bounded size.

    The lengths of some headers, and how often they are read, are the archive's to choose.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._reads_left = 64 + file.seek(0, os.SEEK_END) // 32
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, which must be few."""
        self._reads_left -= 1
        if not 0 <= size <= _MAX_READ_BYTES or self._reads_left < 0:
            raise GuestError("the archive is damaged: its headers are too long, or never end")
        return self._file.read(size)

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        """As a file's."""
        return self._file.seek(position, whence)

    def tell(self) -> int:
        """As a file's."""
        return self._file.tell()
