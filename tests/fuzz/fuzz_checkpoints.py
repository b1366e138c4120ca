"""Checkpoints that were exported by somebody else: files whose digests fit, and whose content is anything.

An input is the content of the files of an export, in which `@0`, `@1`, ... stand for the digests of its own
contents, so that what is written there is found; or the device state of a machine.

What must hold:

- An import ends with checkpoints that are whole, or with a `CheckpointError`, and then took nothing in; the
  cache holds nothing half made.
- Of a snapshot that was taken in every page is one of the machine's, once; reading it gives all pages, or
  says that it is damaged, in bounded memory. So does loading a base, which fits into the machine's memory.
- Device state loses the one section that it may lose, or none.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import atheris
import numpy as np
import zstandard

with atheris.instrument_imports(include=["rollout"]):
    from rollout.errors import BootError, CheckpointError
    from rollout.sandbox.image.store import FILES
    from rollout.sandbox.microvm import export
    from rollout.sandbox.microvm.base import BaseStore
    from rollout.sandbox.microvm.device_state import without_code_flush
    from rollout.sandbox.microvm.identity import machine_of, require_same
    from rollout.sandbox.microvm.machine import GUEST_PAGE_BYTES, MachineShape
    from rollout.sandbox.microvm.snapshot import MAX_BLOCKS, PageBlock, RawCache, Snapshot
    from rollout.sandbox.microvm.transfer import Depot, snapshot_parts

from fuzzing import Growth, Script, fuzz, text_of

MAX_GROWTH_BYTES = 96 << 20
NUM_PAGES = 16
BASE_PAGES = np.random.default_rng(1).integers(0, 256, (NUM_PAGES, GUEST_PAGE_BYTES), np.uint8)
DEPOT, CACHE = Path("depot"), Path("cache")
MACHINE = machine_of(MachineShape("tcg", 768), "QEMU")
SECTION_BYTES = 1 + 4 + 1 + 10 + 4 + 4 + 8 + 5
"""Of `cpu_common`: header, data, footer."""
NAME = "ckpt"
Result = TypeVar("Result")


@dataclass
class ImportingEngine:
    """What an import needs of an engine: one machine, on which it takes everything in."""

    taken: list[tuple[str, Snapshot]] = field(default_factory=list)

    @property
    def stocks(self) -> ImportingEngine:
        return self

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        return work()

    async def of_base(self, image: str, base: tuple[str, str], machine: Mapping[str, str]) -> Any:
        require_same(machine, MACHINE)
        memory_bytes = NUM_PAGES * GUEST_PAGE_BYTES
        loaded = BaseStore(CACHE).load_imported(*base, memory_bytes)
        assert loaded is not None
        assert os.fstat(loaded.ram_fd).st_size == memory_bytes
        loaded.close()
        return SimpleNamespace(fingerprint="mine", pages=BASE_PAGES)

    def adopt(self, name: str, parent: str | None, snapshot: Snapshot, stock: Any) -> str:
        self.taken.append((name, snapshot))
        return name


def check_snapshot(snapshot: Snapshot) -> None:
    """It can be read, or says that it cannot."""
    numbers = snapshot.page_numbers
    assert len(numbers) == len(snapshot.owners) == len(snapshot.rows) <= NUM_PAGES
    assert len(snapshot.blocks) <= MAX_BLOCKS
    assert (np.diff(numbers.astype(np.int64)) > 0).all()
    assert not len(numbers) or numbers[-1] < NUM_PAGES
    cache = RawCache(1 << 20)
    try:
        snapshot.unpack_device_state()
        pages = snapshot.unpack_pages(cache, BASE_PAGES)
        changed, contents = snapshot.changes_since(Snapshot.at_base(b""), cache, BASE_PAGES)
    except CheckpointError:
        return
    assert pages.shape == (len(numbers), GUEST_PAGE_BYTES)
    assert (changed == numbers).all()
    assert (contents == pages).all()


@dataclass
class Export:
    """A script of an import: contents, and records, each written as it is or with a checksum that fits."""

    contents: list[bytes]
    records: list[tuple[int, bytes]]

    @classmethod
    def read(cls, script: Script) -> Export:
        contents = [script.piece() for _ in range(script.number() % 32)]
        return cls(contents, [(script.number() & 1, script.piece()) for _ in range(script.number() % 4)])

    def text(self) -> bytes:
        """As `read` reads it."""
        parts = [part for record in self.records for part in record]
        return text_of(0, len(self.contents), *self.contents, len(self.records), *parts)

    def write(self) -> None:
        """Makes the folder."""
        digests = [hashlib.sha256(content).hexdigest() for content in self.contents]
        (DEPOT / "blobs").mkdir(parents=True)
        (DEPOT / "checkpoints").mkdir()
        for digest, content in zip(digests, self.contents, strict=True):
            (DEPOT / "blobs" / digest).write_bytes(content)
        for name, (is_raw, text) in zip((NAME, "parent", "grandparent"), self.records, strict=False):
            for number in reversed(range(len(digests))):
                text = text.replace(b"@%d" % number, digests[number].encode())
            text = text.replace(b"@base", base_digest(text).encode())
            if not is_raw:
                body = text.decode(errors="replace")
                sha256 = hashlib.sha256(body.encode()).hexdigest()
                text = json.dumps({"sha256": sha256, "body": body}).encode()
            (DEPOT / "checkpoints" / f"{name}.json").write_bytes(text)


def play_import(script: Script) -> None:
    """The import of one checkpoint."""
    Export.read(script).write()
    engine = ImportingEngine()
    try:
        taken, origin = asyncio.run(export.import_checkpoint(engine, str(DEPOT), NAME))  # type: ignore[arg-type]
    except (CheckpointError, BootError):
        assert not engine.taken, "of a failed import something was taken in"
    else:
        assert taken == [name for name, _ in engine.taken]
        assert taken[-1] == NAME
        assert isinstance(origin, dict)
    for _, snapshot in engine.taken:
        check_snapshot(snapshot)
    if CACHE.exists():
        kept = [path for kind in ("images", "bases") for path in CACHE.glob(f"{kind}/*")]
        assert all((path / "manifest.json").is_file() for path in kept), kept
        assert not list(CACHE.glob("tmp/*"))
        assert {path.name for path in CACHE.iterdir()} <= {"images", "bases", "tmp"}


def base_digest(text: bytes) -> str:
    """Of the files that a record names as its base."""
    try:
        files = json.loads(text.replace(b'"@base"', b"null"))["base"]["files"]
        return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()[:32]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "0" * 32


def play_device_state(stream: bytes) -> None:
    """One stream, which loses one section, or nothing."""
    less = without_code_flush(stream)
    if less is None:
        return
    assert len(less) == len(stream) - SECTION_BYTES
    start = next((i for i, (a, b) in enumerate(zip(less, stream, strict=False)) if a != b), len(less))
    assert less[start:] == stream[start + SECTION_BYTES :]
    assert without_code_flush(less) is None


def target(data: bytes) -> None:
    """One input."""
    script = Script(data)
    with Growth(MAX_GROWTH_BYTES):
        if script.number() & 1:
            play_device_state(script.rest())
            return
        try:
            play_import(script)
        finally:
            for folder in (DEPOT, CACHE):
                shutil.rmtree(folder, ignore_errors=True)
    before = {path.name for path in Path().iterdir()}
    assert not before & {DEPOT.name, CACHE.name}


def a_snapshot() -> Snapshot:
    """Four pages in two blocks."""
    first, second = np.array([1, 3, 5], np.uint32), np.array([3, 9], np.uint32)
    blocks = (
        PageBlock.of(first, BASE_PAGES[first] ^ np.uint8(1), BASE_PAGES),
        PageBlock.of(second, BASE_PAGES[second] ^ np.uint8(2), BASE_PAGES),
    )
    numbers = np.array([1, 3, 5, 9], np.uint32)
    owners, rows = np.array([0, 1, 0, 1], np.uint8), np.array([0, 0, 2, 1], np.uint32)
    device_state = zstandard.ZstdCompressor().compress(b"device state")
    return Snapshot(device_state, numbers, owners, rows, blocks, 77)


class Contents(Depot):
    """Notes what is put, and names it by its number."""

    def __init__(self) -> None:
        super().__init__("nowhere")
        self.contents: list[bytes] = []

    def put(self, content: bytes) -> str:
        self.contents.append(content)
        return f"@{len(self.contents) - 1}"


def export_of(contents: Sequence[bytes], *records: str | bytes) -> bytes:
    """A script of an import; a record that is bytes is written as it is."""
    as_read = [(0, each.encode()) if isinstance(each, str) else (1, each) for each in records]
    return Export([*contents], as_read).text()


def mutate(data: bytes, max_bytes: int, seed: int) -> bytes:
    """Another value somewhere in a record, other bytes in one content, or what the fuzzer makes of all."""
    rng = random.Random(seed)
    choice = rng.random()
    if not data or data[0] & 1 or choice < 0.2:
        return atheris.Mutate(data, max_bytes)
    made = Export.read(Script(data[1:]))
    if choice < 0.5 and made.contents:
        place = min(rng.randrange(len(made.contents)) for _ in range(2))  # what a snapshot holds is in front
        made.contents[place] = atheris.Mutate(made.contents[place], 16 << 10)
    elif made.records:
        place = rng.randrange(len(made.records))
        is_raw, text = made.records[place]
        try:
            record = json.loads(text)
            changed = json.dumps(with_another_value(record, rng, len(made.contents))).encode()
        except (ValueError, RecursionError):
            changed = atheris.Mutate(text, 4 << 10)
        made.records[place] = (is_raw, changed)
    return made.text()[:max_bytes]


def with_another_value(value: Any, rng: random.Random, num_contents: int) -> Any:
    """A JSON value in which one place holds something else."""
    odd = [None, [], {}, 0, -1, 1, 3, 17, 1 << 40, 1e999, 0.5, "", "x", "..", "k" * 300, NAME, "parent", True]
    is_inner = isinstance(value, dict | list) and len(value) > 0
    if not is_inner or rng.random() < 0.1:
        return f"@{rng.randrange(num_contents + 1)}" if rng.random() < 0.3 else rng.choice(odd)
    key = rng.choice([*value]) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.1:
        del value[key]
    elif rng.random() < 0.1 and isinstance(value, list):
        value *= rng.choice((2, 20))
    else:
        value[key] = with_another_value(value[key], rng, num_contents)
    return value


def seeds() -> list[bytes]:
    """An export that is fine, with a parent; and ones that lie about what they hold."""
    depot = Contents()
    parts = snapshot_parts(depot, a_snapshot())
    bomb = zstandard.ZstdCompressor().compress(bytes(200 << 20))
    files = {name: depot.put(name.encode()) for name in FILES}
    image_digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in FILES}
    image = hashlib.sha256(json.dumps(image_digests, sort_keys=True).encode()).hexdigest()
    numbers = io.BytesIO()
    np.save(numbers, np.array([2, 7], np.uint32))
    base_files = {
        "pages.zst": depot.put(zstandard.ZstdCompressor().compress(BASE_PAGES[[2, 7]].tobytes())),
        "numbers.npy": depot.put(numbers.getvalue()),
        "state.zst": depot.put(zstandard.ZstdCompressor().compress(b"device state")),
    }
    fine: dict[str, Any] = {
        "layout": 1,
        "parent_id": "parent",
        "fingerprint": "mine",
        "machine": MACHINE,
        "base": {"key": "key", "digest": "@base", "files": base_files},
        "image": {"digest": image, "files": files, "recipe": {}},
        "content": parts,
        "origin": {"run_id": "r"},
    }
    depot.put(bomb)
    depot.put(bytes(16) + np.arange(NUM_PAGES, dtype="<u4").tobytes() + bomb)
    depot.put(b"")
    for lie in (
        np.array([2, 1 << 31], np.uint32),
        np.array([7, 2], np.uint32),
        np.array(2),
        np.array([2.0, 7]),
    ):
        np.save(numbers := io.BytesIO(), lie)
        depot.put(numbers.getvalue())
    for index in (
        (b"\x01\0\0\0\x10\0\0\0", b"\0\0", bytes(8)),
        (b"\x03\0\0\0\x01\0\0\0", b"\0\0", b"\1\0\0\0" + bytes(4)),
        (b"\x01\0\0\0\x03\0\0\0", b"\0\0", b"\0\0\0\0\1\0\0\1"),
        (b"\x01\0\0\0\x03\0\0\0", b"\0\2", b"\0\0\0\0\1\0\0\0"),
        (b"\x01\0\0\0\x03\0\0\0", b"\0\0", b"\1\0\0\0\1\0\0\0"),
    ):
        depot.put(b"".join(index))
    at = len(depot.contents) - 12
    lies: list[dict[str, Any]] = [
        {"content": {**parts, "num_pages": 1e999}},
        {"content": {**parts, "own_bytes": -1}},
        {"content": {**parts, "device_state": f"@{at}"}},
        {"content": {**parts, "blocks": [{"content": f"@{at + 1}", "num_pages": NUM_PAGES}] * 2}},
        {"content": {**parts, "num_pages": 0, "index": f"@{at + 2}", "blocks": parts["blocks"] * 200}},
        {"content": None},
        {"origin": 5},
        {"parent_id": []},
        {"parent_id": NAME},
        {"layout": 2},
        {"image": {"digest": "../outside", "files": files, "recipe": {}}},
        {"base": {"key": "../outside", "digest": "0", "files": base_files}},
        {"base": {"key": "k" * 300, "digest": "0" * 300, "files": base_files}},
        {"image": {"digest": "0" * 300, "files": files, "recipe": {}}},
        {"machine": []},
        {"base": {**fine["base"], "files": {**base_files, "state.zst": f"@{at}"}}},
    ]
    for number in range(at + 2, at + 7):
        lies.append({"base": {**fine["base"], "files": {**base_files, "numbers.npy": f"@{number}"}}})
    for number in range(at + 7, at + 12):
        lies.append({"content": {**parts, "num_pages": 2, "index": f"@{number}"}})
    last, first = json.dumps(fine), json.dumps({**fine, "parent_id": None})
    found = [export_of(depot.contents, last, first), export_of(depot.contents, first)]
    found += [export_of(depot.contents, json.dumps({**fine, "parent_id": None, **lie})) for lie in lies]
    found.append(export_of(depot.contents, json.dumps({k: v for k, v in fine.items() if k != "parent_id"})))
    found += [
        export_of([], "[1]"),
        export_of([], b"{"),
        export_of([], "[" * 5000),
        export_of([], b"[" * 5000),
    ]
    section = b"\x04\x00\x00\x00\x07\x0acpu_common" + bytes(16) + b"\x7e\x00\x00\x00\x07"
    stream = b"QEVM\x00\x00\x00\x03" + b"before" + section + b"after"
    found += [b"\x01" + stream, b"\x01" + stream.replace(b"\x04", b"\x01"), b"\x01" + stream + section]
    return found


if __name__ == "__main__":
    os.environ["ROLLOUT_CACHE"] = str(CACHE)
    fuzz(target, seeds(), mutate)
