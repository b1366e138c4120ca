"""Checkpoints on their way between machines: files under one folder, local or in an object store.

Layout of the folder, which any number of exports share:

    blobs/<sha256>            content, stored once however many checkpoints name it
    checkpoints/<id>.json     one checkpoint: what it is, and the digests of all that it needs; written last
    sandboxes/<id>.json       a sandbox that has left its host: the name of its checkpoint; until it is taken

A checkpoint needs its device state, its pages, its base and its guest image, and all four travel: the base of
another host, even if made of the same image, has other content. Ancestors share their pages with it.

Invariants:

- A checkpoint's file names only content that is there in full. What an interrupted export leaves is content
  that nothing names.
- Nothing is used before its digest was compared. What does not match, in content or in the machine that it is
  for, is refused with `CheckpointError`.

Not guaranteed: secrecy. A checkpoint holds the guest's whole memory; who can read the folder can read that,
and who can write to it can choose what is restored.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.fs as fs

from rollout.errors import CheckpointError
from rollout.sandbox.microvm.snapshot import MAX_BLOCKS, PageBlock, Snapshot
from rollout.uris import is_uri, with_patience, without_secrets

__all__ = ["Depot", "Kind", "snapshot_from_parts", "snapshot_parts"]

Kind = Literal["checkpoints", "sandboxes"]

_LAYOUT = 1
_CHUNK_BYTES = 4 << 20
_ID = re.compile(r"[\w.-]{1,128}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHECKSUM_BYTES = 16


class Depot:
    """A folder of exported checkpoints.

    Args:
        location: A local path, or a URI of `pyarrow.fs` such as `s3://bucket/checkpoints`.

    Raises:
        CheckpointError: The URI names no file system that this machine can reach.
    """

    def __init__(self, location: str) -> None:
        self.location = without_secrets(location)
        try:
            if is_uri(location):
                self._fs, root = fs.FileSystem.from_uri(with_patience(location))
            else:
                self._fs, root = fs.LocalFileSystem(), str(Path(location).absolute())
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CheckpointError.wrap(error, f"cannot open {self.location}") from error
        self._root = root.rstrip("/")

    def put(self, content: bytes) -> str:
        """Stores content; returns its SHA-256.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        digest = hashlib.sha256(content).hexdigest()
        if not self._has(digest, len(content)):
            self._write(f"blobs/{digest}", lambda out: out.write(content))
        return digest

    def put_file(self, path: Path, digest: str) -> str:
        """Stores a file whose SHA-256 is known; returns it.

        Raises:
            CheckpointError: The file is not what its digest says, or the folder cannot be written.
        """
        try:
            if self._has(digest, path.stat().st_size):
                return digest
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise CheckpointError(f"{path} is damaged: its checksum differs; delete it")
                file.seek(0)
                self._write(f"blobs/{digest}", lambda out: _copy(file, out))
        except OSError as error:
            raise CheckpointError.wrap(error, f"cannot export {path}") from error
        return digest

    def get(self, digest: str) -> bytes:
        """Content by its SHA-256.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        content = self._read(f"blobs/{_checked(digest)}")
        if hashlib.sha256(content).hexdigest() != digest:
            raise CheckpointError(f"{self._blob(digest)} is damaged: its checksum differs")
        return content

    def get_file(self, digest: str, path: Path) -> None:
        """Writes content to a new file.

        Raises:
            CheckpointError: It is missing or damaged, or the file cannot be written.
        """
        sha256 = hashlib.sha256()
        try:
            with self._open(f"blobs/{_checked(digest)}") as source, path.open("wb") as target:
                while chunk := source.read(_CHUNK_BYTES):
                    sha256.update(chunk)
                    target.write(chunk)
        except (OSError, pa.ArrowException) as error:
            raise CheckpointError.wrap(error, f"cannot import {self._blob(digest)}") from error
        if sha256.hexdigest() != digest:
            raise CheckpointError(f"{self._blob(digest)} is damaged: its checksum differs")

    def put_record(self, name: str, record: Mapping[str, Any], *, kind: Kind = "checkpoints") -> None:
        """Writes the file of a checkpoint, or of a sandbox: from here on it exists.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        body = json.dumps({"layout": _LAYOUT, **record}, sort_keys=True)
        text = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body})
        self._write(f"{kind}/{_checked_id(name)}.json", lambda out: out.write(text.encode()))

    def record(self, name: str, *, kind: Kind = "checkpoints") -> dict[str, Any]:
        """Reads the file of a checkpoint, or of a sandbox.

        Raises:
            CheckpointError: There is none, or it is damaged, or of another version of this package.
        """
        where = f"{self.location}/{kind}/{name}.json"
        content = self._read(f"{kind}/{_checked_id(name)}.json")
        try:
            outer = json.loads(content)
            body: str = outer["body"]
            if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
                raise ValueError("its checksum differs")
            record: object = json.loads(body)
            if not isinstance(record, dict):
                raise ValueError("it is no object")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{where} is damaged: {error}") from error
        record = cast("dict[str, Any]", record)
        if record.get("layout") != _LAYOUT:
            raise CheckpointError(f"{where} has layout {record.get('layout')}, this version reads {_LAYOUT}")
        return record

    def take(self, name: str) -> None:
        """Removes the file of a sandbox, which only one can.

        Raises:
            CheckpointError: It is gone already, or the folder cannot be written.
        """
        try:
            self._fs.delete_file(f"{self._root}/sandboxes/{_checked_id(name)}.json")
        except FileNotFoundError as error:
            raise CheckpointError(f"the sandbox {name} has left {self.location} already") from error
        except (OSError, pa.ArrowException) as error:
            raise CheckpointError.wrap(error, f"cannot take the sandbox {name}") from error

    def ids(self) -> list[str]:
        """Names of the checkpoints here.

        Raises:
            CheckpointError: The folder cannot be listed.
        """
        try:
            selector = fs.FileSelector(f"{self._root}/checkpoints", allow_not_found=True)
            found = self._fs.get_file_info(selector)
        except (OSError, pa.ArrowException) as error:
            raise CheckpointError.wrap(error, f"cannot list {self.location}") from error
        return sorted(info.base_name.removesuffix(".json") for info in found if info.extension == "json")

    def _has(self, digest: str, size_bytes: int) -> bool:
        try:
            info = self._fs.get_file_info(f"{self._root}/blobs/{digest}")
        except (OSError, pa.ArrowException) as error:
            raise CheckpointError.wrap(error, f"cannot read {self.location}") from error
        return info.type == fs.FileType.File and info.size == size_bytes

    def _open(self, name: str) -> Any:
        return self._fs.open_input_stream(f"{self._root}/{name}")

    def _read(self, name: str) -> bytes:
        try:
            with self._open(name) as source:
                return source.read()
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.location} has no {name}") from error
        except (OSError, pa.ArrowException) as error:
            raise CheckpointError.wrap(error, f"cannot read {self.location}/{name}") from error

    def _write(self, name: str, fill: Callable[[Any], object]) -> None:
        """Writes a file that appears at once and in full, or not at all."""
        path = f"{self._root}/{name}"
        # An object store shows an object when its upload is complete; a local file is renamed into place.
        is_local = isinstance(self._fs, fs.LocalFileSystem)
        written = f"{path}.{secrets.token_hex(4)}.tmp" if is_local else path
        try:
            if is_local:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                with Path(written).open("wb") as out:
                    fill(out)
                    out.flush()
                    os.fsync(out.fileno())
                Path(written).replace(path)
            else:
                with self._fs.open_output_stream(path) as out:
                    fill(out)
        except (OSError, pa.ArrowException) as error:
            if is_local:
                with contextlib.suppress(OSError):  # it may never have been made
                    Path(written).unlink()
            raise CheckpointError.wrap(error, f"cannot write to {self.location}") from error

    def _blob(self, digest: str) -> str:
        return f"{self.location}/blobs/{digest}"


def snapshot_parts(depot: Depot, snapshot: Snapshot) -> dict[str, Any]:
    """Stores what a snapshot holds; returns the names of it."""
    index = b"".join(
        array.astype(kind).tobytes()
        for array, kind in ((snapshot.page_numbers, "<u4"), (snapshot.owners, "u1"), (snapshot.rows, "<u4"))
    )
    blocks = [
        {
            "num_pages": block.num_pages,
            "content": depot.put(
                block.checksum + block.page_numbers.astype("<u4").tobytes() + block.compressed
            ),
        }
        for block in snapshot.blocks
    ]
    return {
        "device_state": depot.put(snapshot.device_state),
        "num_pages": len(snapshot.page_numbers),
        "index": depot.put(index),
        "blocks": blocks,
        "own_bytes": snapshot.own_bytes,
    }


def snapshot_from_parts(
    depot: Depot, parts: Mapping[str, Any], num_machine_pages: int, known: dict[str, PageBlock]
) -> Snapshot:
    """Reads a snapshot.

    Args:
        depot: Where it is.
        parts: What `snapshot_parts` returned.
        num_machine_pages: Pages of the machine.
        known: Blocks that were read before, by digest: snapshots that share blocks go on sharing them.

    Raises:
        CheckpointError: Something is missing, damaged, or does not fit together.
    """
    try:
        count = int(parts["num_pages"])
        index = depot.get(parts["index"])
        if len(index) != count * 9:
            raise ValueError("its index is incomplete")
        numbers = np.frombuffer(index, "<u4", count)
        owners = np.frombuffer(index, "u1", count, count * 4)
        rows = np.frombuffer(index, "<u4", count, count * 5)
        if len(parts["blocks"]) > MAX_BLOCKS:
            raise ValueError(f"it has more than {MAX_BLOCKS} blocks of pages")
        blocks = tuple(_block(depot, each, known) for each in parts["blocks"])
        _check_index(numbers, owners, rows, blocks, num_machine_pages)
        device_state, own_bytes = depot.get(parts["device_state"]), int(parts["own_bytes"])
        if own_bytes < 0:
            raise ValueError("it is said to take less than nothing")
        return Snapshot(device_state, numbers, owners, rows, blocks, own_bytes)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"a checkpoint in {depot.location} is damaged: {error}") from error


def _block(depot: Depot, part: Mapping[str, Any], known: dict[str, PageBlock]) -> PageBlock:
    digest, count = str(part["content"]), int(part["num_pages"])
    if (block := known.get(digest)) is None:
        content = depot.get(digest)
        numbers_end = _CHECKSUM_BYTES + 4 * count
        if count < 0 or len(content) < numbers_end:
            raise ValueError("a block of its pages is incomplete")
        numbers = np.frombuffer(content, "<u4", count, _CHECKSUM_BYTES)
        block = known[digest] = PageBlock(numbers, content[numbers_end:], content[:_CHECKSUM_BYTES])
    return block


def _check_index(numbers: Any, owners: Any, rows: Any, blocks: tuple[PageBlock, ...], num_pages: int) -> None:
    """Every page is one of the machine's, once, and is where the index says."""
    ascending = [numbers, *(block.page_numbers for block in blocks)]
    if any(
        len(each) and (each[-1] >= num_pages or (np.diff(each.astype(np.int64)) <= 0).any())
        for each in ascending
    ):
        raise ValueError("its pages are not the machine's")
    for place, block in enumerate(blocks):
        mine = owners == place
        if (rows[mine] >= block.num_pages).any() or (block.page_numbers[rows[mine]] != numbers[mine]).any():
            raise ValueError("its index does not fit its pages")
    if len(owners) and int(owners.max()) >= len(blocks):
        raise ValueError("its index names a block that it does not have")


def _checked(digest: object) -> str:
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise CheckpointError(f"a checkpoint names content by {str(digest)[:80]!r}, which is no digest")
    return digest


def _checked_id(checkpoint_id: object) -> str:
    if not isinstance(checkpoint_id, str) or not _ID.fullmatch(checkpoint_id) or checkpoint_id[0] == ".":
        raise CheckpointError(f"there is no checkpoint {str(checkpoint_id)[:80]!r}: that is no name of one")
    return checkpoint_id


def _copy(source: Any, target: Any) -> None:
    while chunk := source.read(_CHUNK_BYTES):
        target.write(chunk)
