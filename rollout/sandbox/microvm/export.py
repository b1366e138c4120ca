"""Exports checkpoints of a microvm engine to a folder, and imports them into another engine, on any host.

An import needs no checkpoint but the one that is asked for; its ancestors come with it where they are there
too. A checkpoint keeps its name. The guest image and the base are fetched if they are not in the cache.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from rollout.errors import BootError, CheckpointError
from rollout.sandbox.base import Checkpoint
from rollout.sandbox.image.store import FILES, ImageStore
from rollout.sandbox.microvm.base import BaseStore
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.machine import GUEST_PAGE_BYTES
from rollout.sandbox.microvm.memory import RawState
from rollout.sandbox.microvm.snapshot import PageBlock, RawCache, Snapshot
from rollout.sandbox.microvm.stock import Stock
from rollout.sandbox.microvm.transfer import Depot, snapshot_from_parts, snapshot_parts

__all__ = ["export_checkpoints", "import_checkpoint", "import_content"]

_BASE_FILES = frozenset({"pages.zst", "numbers.npy", "state.zst"})
_MAX_LINEAGE = 10_000
_CACHE_BYTES = 256 << 20
_NAME = re.compile(r"[0-9A-Za-z]{1,64}")
"""Of images and bases: they become names of folders."""


async def export_checkpoints(
    engine: MicroVMEngine,
    checkpoints: Sequence[Checkpoint],
    location: str,
    *,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Writes checkpoints to a folder, with all that restoring them needs.

    Args:
        engine: Which holds them.
        checkpoints: A checkpoint and those of its ancestors that are to come along, in any order.
        location: A local path or a URI of `pyarrow.fs`.
        origin: Where they come from, kept with them as it is: JSON values.

    Raises:
        CheckpointError: One is unknown to the engine, or the folder cannot be written.
    """
    depot = Depot(location)
    held = {checkpoint.id: (checkpoint, *engine.content_of(checkpoint)) for checkpoint in checkpoints}
    cache = RawCache(_CACHE_BYTES)
    written: dict[str, Snapshot] = {}

    def export_one(checkpoint: Checkpoint, snapshot: Snapshot, stock: Stock) -> None:
        parent = written.get(checkpoint.parent_id or "")
        content, root = _on_root(snapshot, stock, parent, cache)
        _export(depot, checkpoint, content, root, origin)
        written[checkpoint.id] = content

    for name in _parents_first({name: each[0].parent_id for name, each in held.items()}):
        await engine.in_thread(lambda each=held[name]: export_one(*each))


def _parents_first(parents: Mapping[str, str | None]) -> list[str]:
    """Names of checkpoints, each after its parent."""
    depths: dict[str, int] = {}
    for name in parents:
        path = [name]
        while (above := parents[path[-1]]) is not None and above in parents and above not in depths:
            path.append(above)
        for below in reversed(path):
            depths[below] = depths.get(parents[below] or "", 0) + 1
    return sorted(parents, key=lambda name: depths[name])


def _on_root(
    snapshot: Snapshot, stock: Stock, parent: Snapshot | None, cache: RawCache
) -> tuple[Snapshot, Stock]:
    """A snapshot as one on the base that is on disk, which other machines can have, and that base's stock.

    Args:
        snapshot: On the base of `stock`.
        stock: It may be derived from another.
        parent: On the base that is on disk: what to share pages with.
        cache: Pages at hand.
    """
    while stock.root is not None and stock.root_content is not None:
        under, root = stock.root_content, stock.root
        numbers = np.union1d(under.page_numbers, snapshot.page_numbers)
        pages = np.empty((len(numbers), GUEST_PAGE_BYTES), np.uint8)
        pages[np.searchsorted(numbers, under.page_numbers)] = under.unpack_pages(cache, root.pages)
        pages[np.searchsorted(numbers, snapshot.page_numbers)] = snapshot.unpack_pages(cache, stock.pages)
        raw = RawState(snapshot.unpack_device_state(), numbers, pages, 0.0)
        shared = parent if parent is not None and root.root is None else under  # both are on this base
        snapshot, stock = Snapshot.of(raw, shared, cache, root.pages), root
    return snapshot, stock


def _export(
    depot: Depot, checkpoint: Checkpoint, snapshot: Snapshot, stock: Stock, origin: Mapping[str, Any] | None
) -> None:
    images = ImageStore()
    image = images.find(stock.image_digest)
    folder, base_sha256 = BaseStore(images.root).files_of(stock.base)
    record = {
        "parent_id": checkpoint.parent_id,
        "fingerprint": checkpoint.fingerprint,
        "machine": dict(stock.machine),
        "base": {"key": stock.base.key, "digest": stock.base.digest, "files": base_sha256},
        "image": {"digest": image.digest, "files": dict(image.sha256), "recipe": dict(image.recipe)},
        "content": snapshot_parts(depot, snapshot),
        "origin": dict(origin or {}),
    }
    for name, digest in base_sha256.items():
        depot.put_file(folder / name, digest)
    for name, digest in image.sha256.items():
        depot.put_file(image.file(name), digest)
    depot.put_record(checkpoint.id, record)


async def import_checkpoint(
    engine: MicroVMEngine, location: str, checkpoint_id: str
) -> tuple[list[Checkpoint], dict[str, Any]]:
    """Reads a checkpoint of a folder into an engine.

    Args:
        engine: Which is to hold it.
        location: A local path or a URI of `pyarrow.fs`.
        checkpoint_id: Its name.

    Returns:
        The checkpoint, after those of its ancestors that are in the folder, oldest first; and its origin.

    Raises:
        CheckpointError: It is missing, damaged, or of another machine; nothing was taken in.
        BootError: Its image is of another version of this package, or the cache cannot be written.
    """
    depot = Depot(location)
    records = await engine.in_thread(lambda: _lineage(depot, checkpoint_id))
    blocks: dict[str, PageBlock] = {}
    taken: list[tuple[str, str | None, Snapshot, Stock]] = []
    for name, record in records:
        content = await _import(engine, depot, name, record, blocks)
        taken.append((name, record["parent_id"], *content))
    origin = records[-1][1].get("origin", {})
    if not isinstance(origin, dict):
        raise CheckpointError(
            f"checkpoint {checkpoint_id} in {depot.location} is damaged: its origin is no object"
        )
    return [engine.adopt(*each) for each in taken], cast("dict[str, Any]", origin)


async def import_content(engine: MicroVMEngine, location: str, checkpoint_id: str) -> tuple[Snapshot, Stock]:
    """What a checkpoint of a folder holds, and the stock that it belongs to; the engine holds no checkpoint.

    Raises:
        CheckpointError: It is missing, damaged, or of another machine.
        BootError: Its image is of another version of this package, or the cache cannot be written.
    """
    depot = Depot(location)
    record = await engine.in_thread(lambda: depot.record(checkpoint_id))
    return await _import(engine, depot, checkpoint_id, record, {})


async def _import(
    engine: MicroVMEngine, depot: Depot, name: str, record: Mapping[str, Any], blocks: dict[str, PageBlock]
) -> tuple[Snapshot, Stock]:
    try:
        return await _import_parts(engine, depot, record, blocks)
    except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {name} in {depot.location} is damaged: {error!r}") from error


async def _import_parts(
    engine: MicroVMEngine, depot: Depot, record: Mapping[str, Any], blocks: dict[str, PageBlock]
) -> tuple[Snapshot, Stock]:
    base, image, machine = record["base"], record["image"], record["machine"]
    try:
        await engine.in_thread(lambda: _fetch_image(depot, image))
        await engine.in_thread(lambda: _fetch_base(depot, base))
    except BootError as error:
        raise CheckpointError(error.message) from error
    stock = await engine.stocks.of_base(image["digest"], (base["key"], base["digest"]), machine)
    if stock.fingerprint != record["fingerprint"]:
        raise CheckpointError("this checkpoint is of another machine: its fingerprint differs")
    num_pages = stock.pages.size // GUEST_PAGE_BYTES
    return await engine.in_thread(
        lambda: snapshot_from_parts(depot, record["content"], num_pages, blocks)
    ), stock


def _lineage(depot: Depot, checkpoint_id: str) -> list[tuple[str, dict[str, Any]]]:
    """A checkpoint and its ancestors as far as they are there, oldest first."""
    found = [(checkpoint_id, depot.record(checkpoint_id))]
    there = frozenset(depot.ids())
    while (parent := _parent_of(depot, *found[-1])) is not None and len(found) < _MAX_LINEAGE:
        if parent not in there:
            break
        if parent in {name for name, _ in found}:
            raise CheckpointError(f"checkpoint {checkpoint_id} in {depot.location} is its own ancestor")
        found.append((parent, depot.record(parent)))
    return found[::-1]


def _parent_of(depot: Depot, name: str, record: Mapping[str, Any]) -> str | None:
    match record:
        case {"parent_id": str() | None as parent}:
            return parent
        case _:
            raise CheckpointError(f"checkpoint {name} in {depot.location} is damaged: it names no parent")


def _fetch_image(depot: Depot, image: Mapping[str, Any]) -> None:
    store = ImageStore()
    if not _NAME.fullmatch(str(image["digest"])):
        raise CheckpointError(f"a checkpoint in {depot.location} is damaged: it names no image")
    if store.get(image["digest"]) is not None:
        return
    with store.scratch() as scratch:
        folder = scratch / "image"
        folder.mkdir()
        for name in FILES:
            depot.get_file(image["files"][name], folder / name)
        store.adopt(folder, image["digest"], image["recipe"])


def _fetch_base(depot: Depot, base: Mapping[str, Any]) -> None:
    bases = BaseStore(ImageStore().root)
    key, digest, files = str(base["key"]), str(base["digest"]), dict(base["files"])
    if not (_NAME.fullmatch(key) and _NAME.fullmatch(digest)) or files.keys() != _BASE_FILES:
        raise CheckpointError(f"a checkpoint in {depot.location} is damaged: it names no base")
    if bases.has(key, digest):
        return
    folder: Path = bases.new_folder()
    try:
        for name, sha256 in files.items():
            depot.get_file(sha256, folder / name)
        bases.adopt(folder, key, digest, files)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
