"""Layers of container images become a root file system.

They are applied in order onto an empty folder, with the whiteouts of the OCI image specification
(image-spec, `layer.md`): `.wh.NAME` takes NAME away from the layers below, `.wh..wh..opq` all that they have
in its folder.

The layers are not trusted. Every entry is checked before it is written: no path leaves the root, neither by
`..` nor through a symbolic link of an earlier entry, hard links stay inside, and device nodes and pipes are
refused, except under `/dev`, where they are left out, as the guest's kernel makes its own. Sizes, depth,
memory and the number of what comes out are bounded.

Not supported: layers that are compressed with zstd.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from rollout.errors import BootError

__all__ = ["BoundedTarInfo", "Budget", "entries_of", "path_parts", "unpack_layers", "write_file"]

MAX_UNPACKED_BYTES = 16 << 30
MAX_ENTRIES = 2_000_000
_MAX_LINKS = 40
_MAX_DEPTH = 256  # what removes or lists a tree does so by recursion
_MAX_HEADER_BYTES = 1 << 20
_HEADERS_IN_MEMORY = frozenset(
    {
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    }
)
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"


def unpack_layers(layers: Sequence[Path], diff_ids: Sequence[str], root: Path) -> None:
    """Makes the root file system of an image in an empty folder.

    Args:
        layers: Tar archives, lowest first.
        diff_ids: SHA-256 of each uncompressed.
        root: The folder.

    Raises:
        BootError: A layer is damaged, hostile or too large.
    """
    budget = Budget()
    for number, (layer, diff_id) in enumerate(zip(layers, diff_ids, strict=True), 1):
        try:
            _apply(layer, diff_id, root, budget)
        except BootError as error:
            raise BootError(f"layer {number} of the image: {error.message}") from error
        except Exception as error:  # of hostile archives the parser raises anything
            raise BootError.wrap(error, f"layer {number} of the image cannot be unpacked") from error


@dataclass(slots=True)
class Budget:
    """What an image may still unpack to."""

    num_bytes: int = MAX_UNPACKED_BYTES
    num_entries: int = MAX_ENTRIES

    def spend(self, num_bytes: int) -> None:
        """Counts one more file.

        Raises:
            BootError: It is one too many.
        """
        self.num_bytes -= max(0, num_bytes)
        self.num_entries -= 1
        if self.num_bytes < 0 or self.num_entries < 0:
            raise BootError(f"it is larger than {MAX_UNPACKED_BYTES} bytes or {MAX_ENTRIES} files")


def _apply(layer: Path, diff_id: str, root: Path, budget: Budget) -> None:
    """Applies one layer, in two passes: what it takes away, then what it adds."""
    _verify_diff_id(layer, diff_id)
    with _open_layer(layer) as archive:
        for entry in entries_of(archive):
            budget.spend(entry.size)
            parts = path_parts(entry.name)
            if not parts or not parts[-1].startswith(_WHITEOUT):
                continue
            folder = _safe(root, parts[:-1])
            if parts[-1] == _OPAQUE:
                for below in list(folder.iterdir()) if folder.is_dir() else []:
                    _remove(below)
            elif (name := parts[-1].removeprefix(_WHITEOUT)) in ("", ".", ".."):
                raise BootError(f"it takes away {entry.name!r}, which is no name")
            else:
                _remove(folder / name)
    folders: list[tuple[Path, tarfile.TarInfo]] = []
    with _open_layer(layer) as archive:
        for entry in entries_of(archive):
            parts = path_parts(entry.name)
            if (parts and parts[-1].startswith(_WHITEOUT)) or not parts:
                continue
            if entry.ischr() or entry.isblk() or entry.isfifo():
                if parts[0] == "dev":
                    continue
                raise BootError(f"it holds the device node or pipe {entry.name!r}")
            _add(archive, entry, root, parts, budget)
            if entry.isdir():
                folders.append((root.joinpath(*parts), entry))
    for path, entry in reversed(folders):  # last: a folder that nobody may write to still gets its content
        if path.is_dir() and not path.is_symlink():
            path.chmod(entry.mode & 0o7777)


def _add(
    archive: tarfile.TarFile, entry: tarfile.TarInfo, root: Path, parts: Sequence[str], budget: Budget
) -> None:
    target = _safe(root, parts[:-1], make_within=budget) / parts[-1]
    if entry.isdir():
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            _remove(target)
        target.mkdir(exist_ok=True)
    else:
        _remove(target)
        if entry.issym():
            target.symlink_to(entry.linkname)
        elif entry.islnk():
            source = path_parts(entry.linkname)
            if not source:
                raise BootError(f"the hard link {entry.name!r} leads to nothing")
            held = _safe(root, source[:-1]) / source[-1]
            if not held.is_symlink() and not held.is_file():
                raise BootError(f"the hard link {entry.name!r} leads to {entry.linkname!r}, which is no file")
            os.link(held, target, follow_symlinks=False)
            return  # mode and owner are those of the file that it names
        elif entry.isfile():
            write_file(archive, entry, target)
        else:
            raise BootError(f"it holds {entry.name!r} of the unknown type {entry.type!r}")
    if os.geteuid() == 0:
        os.chown(target, entry.uid, entry.gid, follow_symlinks=False)
    if entry.isfile():
        target.chmod(entry.mode & 0o7777)


def _safe(root: Path, parts: Sequence[str], *, make_within: Budget | None = None) -> Path:
    """A folder below the root; no part of the way to it leaves the root.

    A symbolic link on the way is followed as it would be in the guest, where `/` is the root. With a budget,
    what is missing on the way is made, and counts.
    """
    path, todo, num_links = root, list(parts), 0
    while todo:
        part = todo.pop(0)
        if part == "..":
            path = path if path == root else path.parent
            continue
        path = path / part
        if path.is_symlink():
            num_links += 1
            if num_links > _MAX_LINKS:
                raise BootError(f"the path {'/'.join(parts)!r} has too many links")
            link = PurePosixPath(path.readlink())
            path = root if link.is_absolute() else path.parent
            todo = [each for each in link.parts if each not in ("/", ".", "//")] + todo
        elif make_within is not None and not path.exists():
            make_within.spend(0)
            path.mkdir(mode=0o755)
        elif path.exists() and not path.is_dir():
            raise BootError(f"the path {'/'.join(parts)!r} leads through a file")
        if len(path.parts) - len(root.parts) >= _MAX_DEPTH:
            raise BootError(f"the path {'/'.join(parts)[:120]!r} is more than {_MAX_DEPTH} folders deep")
    return path


def path_parts(name: str) -> list[str]:
    """The parts of an entry's path below the root.

    Raises:
        BootError: It leads out of it.
    """
    if "\0" in name or name.startswith("/"):
        raise BootError(f"the path {name[:120]!r} is not below the image's root")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise BootError(f"the path {name[:120]!r} leads out of the image's root")
    return parts


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def write_file(archive: tarfile.TarFile, entry: tarfile.TarInfo, target: Path) -> None:
    """Writes an entry to a new file; nothing that is there is followed or written over."""
    source = archive.extractfile(entry)
    assert source is not None
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with source, os.fdopen(fd, "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)


def _verify_diff_id(layer: Path, diff_id: str) -> None:
    sha256 = hashlib.sha256()
    num_bytes = 0
    with _opened(layer) as file:
        while chunk := file.read(1 << 20):
            num_bytes += len(chunk)
            if num_bytes > MAX_UNPACKED_BYTES:
                raise BootError(f"it is larger than {MAX_UNPACKED_BYTES} bytes")
            sha256.update(chunk)
    if sha256.hexdigest() != diff_id:
        raise BootError("it is damaged: its checksum differs from the one in the image's configuration")


def _opened(layer: Path) -> IO[bytes]:
    with layer.open("rb") as file:
        magic = file.read(4)
    if magic == b"\x28\xb5\x2f\xfd":
        raise BootError("it is compressed with zstd; save the image with gzip or uncompressed layers")
    return cast("IO[bytes]", gzip.open(layer)) if magic[:2] == b"\x1f\x8b" else layer.open("rb")


@contextmanager
def _open_layer(layer: Path) -> Generator[tarfile.TarFile]:
    with _opened(layer) as file, tarfile.open(fileobj=file, mode="r|", tarinfo=BoundedTarInfo) as archive:
        yield archive


def entries_of(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The entries of an archive one by one; the parser would keep them all."""
    while (entry := archive.next()) is not None:
        cast("Any", archive).members.clear()
        yield entry


class BoundedTarInfo(tarfile.TarInfo):
    """A header, which the parser reads into memory if it is one of a long name, of attributes or the like."""

    def _proc_member(
        self, tarfile: tarfile.TarFile
    ) -> tarfile.TarInfo:  # which `tarfile` says is to be overridden
        if self.type in _HEADERS_IN_MEMORY and not 0 <= self.size <= _MAX_HEADER_BYTES:
            raise BootError(f"it has a header of {self.size} bytes, which is too long")
        return cast("Any", super())._proc_member(tarfile)
