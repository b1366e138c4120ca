"""Bases: the memory of a machine that has booted and warmed up, shared by all its clones.

A base is made once for each (image, machine shape, QEMU build, warm-up) and kept on disk compressed. An
engine loads it into a sealed memory file: every clone maps that privately, so they share its pages, none of
them can write to it, and it is gone with the engine, however the engine ends.

On disk, under `bases/<key>/` of the cache folder (`bases/<key>.<digest>/` if another machine made it):
`pages.zst` and `numbers.npy` (the pages that are not empty), `state.zst` (device state), and `manifest.json`,
written last, with the checksums of the others.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from rollout.errors import BootError, CheckpointError
from rollout.sandbox.image.store import Image
from rollout.sandbox.microvm.compression import MAX_DEVICE_STATE_BYTES, decompressed
from rollout.sandbox.microvm.machine import GUEST_PAGE_BYTES, KERNEL_COMMAND_LINE, MachineShape
from rollout.sandbox.microvm.memory import PageNumbers, Pages
from rollout.sandbox.microvm.memory_file import (
    CHUNK_PAGES,
    extents,
    new_memory_file,
    seal,
    write_at,
    write_runs,
)

__all__ = ["Base", "BaseStore", "base_key", "derived_base"]

_LAYOUT = 1
_NUMBERS_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<u4', 'fortran_order': False, 'shape': \((\d{1,10}),\), \} *\n",
    re.DOTALL,
)
"""Of an array as `numpy.save` writes it. numpy's own parser raises many things at a header that is none."""
_MAX_HEADER_BYTES = 128


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base.

    Attributes:
        key: What it was made for (see `base_key`).
        digest: Of its content. Bases made twice of the same parts differ, and so do checkpoints on them.
        ram_fd: Sealed memory file with guest RAM.
        device_state: What QEMU saved.
        resident_bytes: Memory that it takes, once for all clones.
    """

    key: str
    digest: str
    ram_fd: int
    device_state: bytes
    resident_bytes: int

    def close(self) -> None:
        """Closes the memory file; clones keep their mapping of it."""
        os.close(self.ram_fd)


def base_key(image: Image | None, shape: MachineShape, qemu_version: str, warm_up: tuple[str, ...]) -> str:
    """Equal for machines that can share a base."""
    parts = {
        "image": image.digest if image else None,
        "machine": shape.fingerprint(qemu_version),
        "warm_up": warm_up,
        "layout": _LAYOUT,
        "kernel": KERNEL_COMMAND_LINE,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def derived_base(base: Base, device_state: bytes, numbers: PageNumbers, pages: Pages) -> Base:
    """A copy of a base in which some pages are others: the memory of a checkpoint on it, as a base itself.

    It is in memory only. Its key is the old one's.

    Args:
        base: The old one.
        device_state: What QEMU saved of the checkpoint.
        numbers: Pages that are others, shape [n], ascending.
        pages: Their contents, shape [n, 4096].

    Raises:
        BootError: There is no memory for it.
    """
    fd = new_memory_file(os.fstat(base.ram_fd).st_size)
    try:
        for offset, data in extents(base.ram_fd):
            write_at(fd, data, offset)
        if len(numbers):
            write_runs(fd, numbers, pages.tobytes())
    except OSError as error:
        os.close(fd)
        raise BootError.wrap(error, "there is no memory for another base") from error
    seal(fd)
    content = hashlib.sha256(numbers.tobytes() + pages.tobytes() + device_state).hexdigest()
    digest = hashlib.sha256(f"{base.digest}:{content}".encode()).hexdigest()[:32]
    return Base(base.key, digest, fd, device_state, os.fstat(fd).st_blocks * 512)


class BaseStore:
    """Bases on disk.

    Safe for many processes at once: `building` lets one of them build while the others wait.
    """

    def __init__(self, cache: Path) -> None:
        self._folder = cache / "bases"

    @contextmanager
    def building(self, key: str) -> Generator[None]:
        """Held by whoever looks for a base and builds it if it is missing.

        The kernel frees it when its process ends.

        Raises:
            BootError: The cache cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = (self._folder / f"{key}.lock").open("w")
        except OSError as error:
            raise BootError.wrap(error, f"cannot write to the cache folder {self._folder}") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def load(self, key: str, memory_bytes: int) -> Base | None:
        """Loads a base into a sealed memory file; None if it was never built.

        Raises:
            BootError: It is damaged; the message says what to delete.
        """
        return self._load(self._folder / key, key, memory_bytes)

    def load_imported(self, key: str, digest: str, memory_bytes: int) -> Base | None:
        """As `load`, the base of that content; None if it is not here.

        Raises:
            BootError: It is damaged; the message says what to delete.
        """
        folder = self._folder_of(key, digest)
        return None if folder is None else self._load(folder, key, memory_bytes)

    def has(self, key: str, digest: str) -> bool:
        """Whether the base of that content is here."""
        return self._folder_of(key, digest) is not None

    def files_of(self, base: Base) -> tuple[Path, dict[str, str]]:
        """Folder of a base, and its files with their checksums.

        Raises:
            CheckpointError: It is not in the cache any more.
        """
        folder = self._folder_of(base.key, base.digest)
        if folder is None:
            raise CheckpointError(f"the base {base.key} is gone from {self._folder}: it cannot be exported")
        return folder, dict(json.loads((folder / "manifest.json").read_text())["sha256"])

    def new_folder(self) -> Path:
        """A temporary folder, from which `adopt` takes a base.

        Raises:
            BootError: The cache cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=".import-", dir=self._folder))
        except OSError as error:
            raise BootError.wrap(error, f"cannot write to the cache folder {self._folder}") from error

    def adopt(self, folder: Path, key: str, digest: str, sha256: Mapping[str, str]) -> None:
        """Keeps the base of another machine, whose files are in a folder, which moves.

        The checksums of the files are compared when it is loaded.

        Raises:
            BootError: It is not the base of that digest, or the cache cannot be written.
        """
        if _digest_of_files(sha256) != digest:
            raise BootError(f"the base {digest}: what came is another base")
        try:
            (folder / "manifest.json").write_text(json.dumps({"digest": digest, "sha256": dict(sha256)}))
            target = self._folder / f"{key}.{digest}"
            if self._digest_of(target) != digest:
                shutil.rmtree(target, ignore_errors=True)
                folder.rename(target)
        except OSError as error:
            raise BootError.wrap(error, f"cannot keep a base in {self._folder}") from error

    def _folder_of(self, key: str, digest: str) -> Path | None:
        folders = (self._folder / key, self._folder / f"{key}.{digest}")
        return next((folder for folder in folders if self._digest_of(folder) == digest), None)

    def _digest_of(self, folder: Path) -> str | None:
        try:
            return json.loads((folder / "manifest.json").read_text())["digest"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # whoever asked for this very folder is told by `_load`

    def _load(self, folder: Path, key: str, memory_bytes: int) -> Base | None:
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise BootError(f"the base {folder} is damaged; delete it: {error}") from error
        fd = new_memory_file(memory_bytes)
        try:
            device_state = self._unpack(folder, manifest, fd)
        except (OSError, ValueError, TypeError, KeyError, zstandard.ZstdError, CheckpointError) as error:
            os.close(fd)
            raise BootError(f"the base {folder} is damaged; delete it: {error}") from error
        seal(fd)
        return Base(key, manifest["digest"], fd, device_state, os.fstat(fd).st_blocks * 512)

    def save(self, key: str, fd: int, device_state: bytes) -> Base:
        """Seals the memory that a stopped VM left, and keeps a copy. The VM must have been killed.

        Raises:
            BootError: It cannot be written; nothing of it is left.
        """
        seal(fd)
        folder = self._folder / f".{key}.{os.getpid()}"
        try:
            folder.mkdir(parents=True)
            sha256 = _pack(folder, fd, device_state)
            digest = _digest_of_files(sha256)
            (folder / "manifest.json").write_text(json.dumps({"digest": digest, "sha256": sha256}))
            folder.rename(self._folder / key)
        except OSError as error:
            raise BootError.wrap(error, f"cannot keep a base in {self._folder}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return Base(key, digest, fd, device_state, os.fstat(fd).st_blocks * 512)

    def _unpack(self, folder: Path, manifest: dict[str, Any], fd: int) -> bytes:
        for name, expected in manifest["sha256"].items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise ValueError(f"the checksum of {name} differs")
        numbers = _page_numbers(folder / "numbers.npy", os.fstat(fd).st_size // GUEST_PAGE_BYTES)
        with zstandard.ZstdDecompressor().stream_reader((folder / "pages.zst").open("rb")) as pages:
            for begin in range(0, len(numbers), CHUNK_PAGES):
                chunk = numbers[begin : begin + CHUNK_PAGES]
                write_runs(fd, chunk, pages.read(len(chunk) * GUEST_PAGE_BYTES))
        return decompressed((folder / "state.zst").read_bytes(), MAX_DEVICE_STATE_BYTES)


def _digest_of_files(sha256: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(sha256), sort_keys=True).encode()).hexdigest()[:32]


def _pack(folder: Path, fd: int, device_state: bytes) -> dict[str, str]:
    numbers: list[np.ndarray[Any, np.dtype[np.uint32]]] = []
    compressor = zstandard.ZstdCompressor(level=1)
    with (folder / "pages.zst").open("wb") as file, compressor.stream_writer(file) as pages:
        for offset, data in extents(fd):
            words = np.frombuffer(data, np.uint64).reshape(-1, GUEST_PAGE_BYTES // 8)
            filled = np.flatnonzero(words.any(axis=1))
            numbers.append((filled + offset // GUEST_PAGE_BYTES).astype(np.uint32))
            pages.write(words[filled].tobytes())
    np.save(folder / "numbers.npy", np.concatenate([np.empty(0, np.uint32), *numbers]))
    (folder / "state.zst").write_bytes(zstandard.ZstdCompressor().compress(device_state))
    names = ("pages.zst", "numbers.npy", "state.zst")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def _page_numbers(file: Path, num_pages: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """The numbers of a base's pages, which may be another machine's word.

    Raises:
        ValueError: They are not the machine's, in ascending order.
    """
    with file.open("rb") as content:
        data = content.read(_MAX_HEADER_BYTES + 4 * num_pages)
    header = _NUMBERS_HEADER.match(data)
    if header is None or len(data) - header.end() != 4 * int(header[1]):
        raise ValueError(f"{file.name} holds no numbers of pages")
    numbers = np.frombuffer(data, np.uint32, offset=header.end())
    if len(numbers) and (numbers[-1] >= num_pages or (np.diff(numbers.astype(np.int64)) <= 0).any()):
        raise ValueError(f"{file.name} holds other pages than the machine's")
    return numbers
