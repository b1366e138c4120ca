"""Checkpoints that move: exported by one process and imported by another, whole, damaged and foreign."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import CheckpointError
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.image.store import cache_dir
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.export import export_checkpoints, import_checkpoint
from rollout.sandbox.microvm.identity import machine_of, require_same
from rollout.sandbox.microvm.machine import MachineShape
from rollout.sandbox.microvm.memory import Pages
from rollout.sandbox.microvm.sandbox import MicroVMSandbox
from rollout.sandbox.microvm.snapshot import MAX_BLOCKS, PageBlock, Snapshot
from rollout.sandbox.microvm.transfer import Depot, snapshot_from_parts, snapshot_parts
from rollout.types import Randomness, RngPolicy

_missing = what_is_missing("microvm", ImageConfig())
needs_vm = [
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
]
INHERIT = Randomness(RngPolicy.INHERIT)
NUM_PAGES = 16
DEADLINE_S = 120

IMPORTER = """
import asyncio, json, sys
from rollout.config import EngineConfig, ImageConfig
from rollout.errors import RolloutError
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.export import import_checkpoint
from rollout.types import Randomness, RngPolicy

async def main(location, name):
    async with MicroVMEngine(EngineConfig(kind="microvm"), ImageConfig()) as engine:
        try:
            lineage, origin = await import_checkpoint(engine, location, name)
        except RolloutError as error:
            print(json.dumps({"error": type(error).__name__, "message": error.message}))
            return
        drawn = []
        for checkpoint in lineage:
            [clone] = await engine.fork(checkpoint, randomness=[Randomness(RngPolicy.INHERIT)])
            step = await clone.call("env.step", action=1)
            note = (await clone.read_file("/tmp/note")).decode()
            drawn.append([checkpoint.id, step["observation"], note, await clone.call("env.state_hash")])
            await clone.kill()
        print(json.dumps({"drawn": drawn, "origin": origin}))

asyncio.run(main(*sys.argv[1:]))
"""


def in_another_process(location: Path | str, name: str, cache: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTER, str(location), name],
        env={**os.environ, "ROLLOUT_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        timeout=DEADLINE_S,
        check=True,
    )
    return json.loads(done.stdout)


class TestMachines:
    pytestmark = needs_vm

    @pytest.mark.parametrize("rebases", [False, True])
    async def test_a_lineage_goes_on_in_another_process_with_an_empty_cache(
        self, engine: MicroVMEngine, lake: MicroVMSandbox, tmp_path: Path, rebases: bool
    ) -> None:
        lineage, expected, sandbox = [], [], lake
        for depth in range(3):
            await sandbox.write_file("/tmp/note", f"depth {depth}".encode())
            lineage.append(await sandbox.checkpoint())
            if rebases and depth < 2:
                await engine.rebase(lineage[-1])
            [twin] = await engine.fork(lineage[-1], randomness=[INHERIT])
            step = await twin.call("env.step", action=1)
            assert isinstance(step, dict)
            state_hash = await twin.call("env.state_hash")
            expected.append([lineage[-1].id, step["observation"], f"depth {depth}", state_hash])
            [child] = await engine.fork(lineage[-1], randomness=[INHERIT])
            assert isinstance(child, MicroVMSandbox)
            await child.call("env.step", action=1 + depth % 2)
            sandbox = child
        there = tmp_path / "depot"
        await export_checkpoints(engine, lineage, str(there), origin={"run_id": "r"})
        num_files = len(list(there.rglob("*")))
        await export_checkpoints(engine, lineage, str(there), origin={"run_id": "r"})
        assert len(list(there.rglob("*"))) == num_files, "what is there already was stored again"
        cache = tmp_path / "cache"
        found = in_another_process(f"file://{there}", lineage[-1].id, cache)
        assert found == {"drawn": expected, "origin": {"run_id": "r"}}
        assert len(list((cache / "images").iterdir())) == 1, "the image came along"

        big = max((there / "blobs").iterdir(), key=lambda path: path.stat().st_size)
        shutil.rmtree(cache)
        with big.open("r+b") as file:
            file.truncate(1000)
        refused = in_another_process(there, lineage[-1].id, cache)
        assert refused["error"] == "CheckpointError"
        assert big.name in refused["message"]
        assert "damaged" in refused["message"]
        assert not (cache / "images").exists() or not list((cache / "images").iterdir())

    async def test_an_engine_of_another_shape_refuses(
        self, engine: MicroVMEngine, machine: MicroVMSandbox, tmp_path: Path
    ) -> None:
        checkpoint = await machine.checkpoint()
        await export_checkpoints(engine, [checkpoint], str(tmp_path))
        config = EngineConfig(kind="microvm", memory_mib=512)
        async with MicroVMEngine(config, ImageConfig()) as other:
            with pytest.raises(CheckpointError, match=r"memory_mib.*'512' here.*'768' there"):
                await import_checkpoint(other, str(tmp_path), checkpoint.id)
            with pytest.raises(CheckpointError, match="unknown here"):
                await other.fork(checkpoint)

    async def test_into_the_engine_that_it_came_from(
        self, engine: MicroVMEngine, machine: MicroVMSandbox, tmp_path: Path
    ) -> None:
        checkpoint = await machine.checkpoint()
        await export_checkpoints(engine, [checkpoint], str(tmp_path))
        await engine.discard(checkpoint)
        with pytest.raises(CheckpointError, match="unknown here"):
            await export_checkpoints(engine, [checkpoint], str(tmp_path))
        before = set((cache_dir() / "bases").iterdir())
        [again], _ = await import_checkpoint(engine, str(tmp_path), checkpoint.id)
        assert again == checkpoint
        assert set((cache_dir() / "bases").iterdir()) == before, "a base that is here is not fetched"
        [clone] = await engine.fork(again)
        assert (await clone.exec(["echo", "here"])).stdout == b"here\n"

    async def test_a_full_disk_leaves_no_checkpoint(
        self, engine: MicroVMEngine, machine: MicroVMSandbox, tmp_path: Path
    ) -> None:
        checkpoint = await machine.checkpoint()
        with small_disk(1 << 20), pytest.raises(CheckpointError, match="cannot write"):
            await export_checkpoints(engine, [checkpoint], str(tmp_path))
        assert Depot(str(tmp_path)).ids() == []
        assert not list(tmp_path.rglob("*.tmp"))  # noqa: ASYNC240 - a small folder
        await export_checkpoints(engine, [checkpoint], str(tmp_path))
        assert Depot(str(tmp_path)).ids() == [checkpoint.id]


class small_disk:
    """No file of this process may grow beyond a size: a write fails as it does on a full disk."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size_bytes, self._before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)
        signal.signal(signal.SIGXFSZ, self._handler)


@pytest.fixture
def pages() -> Pages:
    return np.random.default_rng(1).integers(0, 256, (NUM_PAGES, 4096), np.uint8)


@pytest.fixture
def snapshot(pages: Pages) -> Snapshot:
    first, second = np.array([1, 3, 5], np.uint32), np.array([3, 9], np.uint32)
    one, two = np.uint8(1), np.uint8(2)
    blocks = (
        PageBlock.of(first, pages[first] ^ one, pages),
        PageBlock.of(second, pages[second] ^ two, pages),
    )
    numbers = np.array([1, 3, 5, 9], np.uint32)
    owners, rows = np.array([0, 1, 0, 1], np.uint8), np.array([0, 0, 2, 1], np.uint32)
    return Snapshot(b"state", numbers, owners, rows, blocks, 77)


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    return Depot(str(tmp_path / "depot"))


def test_a_snapshot_comes_back_with_its_sharing(depot: Depot, snapshot: Snapshot) -> None:
    known: dict[str, PageBlock] = {}
    parts = json.loads(json.dumps(snapshot_parts(depot, snapshot)))
    one = snapshot_from_parts(depot, parts, NUM_PAGES, known)
    two = snapshot_from_parts(depot, parts, NUM_PAGES, known)
    for name in ("page_numbers", "owners", "rows"):
        assert getattr(one, name).tolist() == getattr(snapshot, name).tolist()
    assert (one.device_state, one.own_bytes) == (b"state", 77)
    assert all(ours is theirs for ours, theirs in zip(one.blocks, two.blocks, strict=True))
    assert [block.compressed for block in one.blocks] == [block.compressed for block in snapshot.blocks]


@pytest.mark.parametrize("how", ["truncated", "altered", "missing", "empty"])
def test_every_damaged_part_is_refused(depot: Depot, snapshot: Snapshot, how: str) -> None:
    parts = snapshot_parts(depot, snapshot)
    blobs = sorted((Path(depot.location) / "blobs").iterdir())
    assert len(blobs) == 4
    for blob in blobs:
        content = blob.read_bytes()
        damaged = {"truncated": content[:-1], "altered": bytes([content[0] ^ 1]) + content[1:], "empty": b""}
        blob.unlink()
        if how != "missing":
            blob.write_bytes(damaged[how])
        with pytest.raises(CheckpointError, match=blob.name):
            snapshot_from_parts(depot, parts, NUM_PAGES, {})
        blob.write_bytes(content)
    snapshot_from_parts(depot, parts, NUM_PAGES, {})


@pytest.mark.parametrize(
    "change",
    [
        {"page_numbers": np.array([1, 3, 5, NUM_PAGES], np.uint32)},
        {"page_numbers": np.array([3, 1, 5, 9], np.uint32)},
        {"page_numbers": np.array([1, 3, 5, 10], np.uint32)},
        {"owners": np.array([0, 1, 0, 2], np.uint8)},
        {"rows": np.array([0, 0, 9, 1], np.uint32)},
    ],
)
def test_an_index_that_lies_is_refused(depot: Depot, snapshot: Snapshot, change: dict[str, Any]) -> None:
    parts = snapshot_parts(depot, dataclasses.replace(snapshot, **change))
    with pytest.raises(CheckpointError, match="damaged"):
        snapshot_from_parts(depot, parts, NUM_PAGES, {})


@pytest.mark.parametrize(
    "change",
    [
        {"num_pages": math.inf},
        {"num_pages": -1},
        {"own_bytes": math.inf},
        {"own_bytes": -1},
        {"blocks": 5},
        {"blocks": [None]},
    ],
    ids=str,
)
def test_numbers_that_are_none_are_refused(depot: Depot, snapshot: Snapshot, change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        snapshot_from_parts(depot, {**snapshot_parts(depot, snapshot), **change}, NUM_PAGES, {})


def test_more_blocks_than_a_snapshot_may_name_are_refused(depot: Depot, snapshot: Snapshot) -> None:
    parts = snapshot_parts(depot, snapshot)
    parts["blocks"] += [parts["blocks"][0]] * MAX_BLOCKS
    with pytest.raises(CheckpointError, match="more than 16 blocks"):
        snapshot_from_parts(depot, parts, NUM_PAGES, {})


def test_what_would_unpack_to_much_more_is_refused(snapshot: Snapshot, pages: Pages) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(80 << 20))
    block = dataclasses.replace(snapshot.blocks[0], compressed=bomb)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="said to hold 83886080 bytes"):
            block.unpack(pages)
        with pytest.raises(CheckpointError, match="said to hold 83886080 bytes"):
            dataclasses.replace(snapshot, device_state=bomb).unpack_device_state()
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


class ForeignEngine:
    """What an import needs of an engine before it looks at pages."""

    async def in_thread(self, work: Callable[[], Any]) -> Any:
        return work()


@pytest.mark.parametrize(
    "change",
    [
        {"parent_id": []},
        {"parent_id": 5},
        {"image": {"digest": "0" * 300, "files": {}, "recipe": {}}},
        {"image": {"digest": "../outside", "files": {}, "recipe": {}}},
        {"image": None},
    ],
    ids=str,
)
async def test_a_record_that_names_nothing_is_refused(
    depot: Depot, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLOUT_CACHE", str(tmp_path / "cache"))
    record = {"parent_id": None, "machine": {}, "base": {}, "image": {}, "content": {}}
    depot.put_record("ckpt-1", {**record, **change})
    with pytest.raises(CheckpointError, match=r"ckpt-1|damaged"):
        await import_checkpoint(ForeignEngine(), depot.location, "ckpt-1")  # type: ignore[arg-type]


async def test_a_record_without_a_parent_is_not_one_at_the_base(depot: Depot) -> None:
    depot.put_record("ckpt-1", {"machine": {}, "base": {}, "image": {}, "content": {}})
    with pytest.raises(CheckpointError, match=r"ckpt-1 .* names no parent"):
        await import_checkpoint(ForeignEngine(), depot.location, "ckpt-1")  # type: ignore[arg-type]


def with_checksum(body: str) -> bytes:
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[1]",
        b'{"sha256": "0", "body": "{}"}',
        b"\xff\xfe",
        b"[" * 100_000,
        with_checksum("[1]"),
        with_checksum("[" * 100_000),
    ],
    ids=lambda text: text[:30],
)
def test_a_record_that_is_none(depot: Depot, text: bytes) -> None:
    depot.put_record("ckpt-1", {"parent_id": None})
    path = Path(depot.location) / "checkpoints" / "ckpt-1.json"
    assert depot.record("ckpt-1")["parent_id"] is None
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match=r"ckpt-1\.json is damaged"):
        depot.record("ckpt-1")


@pytest.mark.parametrize("name", ["../escape", "a/b", ".hidden", "", "x" * 200])
def test_names_stay_in_the_folder(depot: Depot, name: str) -> None:
    with pytest.raises(CheckpointError, match="no name of one"):
        depot.record(name)
    with pytest.raises(CheckpointError, match="no digest"):
        depot.get(name)


def test_what_is_not_there(depot: Depot) -> None:
    assert depot.ids() == []
    with pytest.raises(CheckpointError, match=r"has no checkpoints/ckpt-9"):
        depot.record("ckpt-9")
    with pytest.raises(CheckpointError, match="cannot open"):
        Depot("nonsense://bucket/x")


def test_every_difference_of_machines_is_named() -> None:
    here = machine_of(MachineShape("tcg", 768), "QEMU 7.2")
    require_same(here, machine_of(MachineShape("tcg", 768), "QEMU 7.2"))
    others = {
        "QEMU build": machine_of(MachineShape("tcg", 768), "QEMU 8.2"),
        "accelerator": machine_of(MachineShape("kvm", 768), "QEMU 7.2"),
        "CPU model": machine_of(MachineShape("tcg", 768, cpu_model="qemu64"), "QEMU 7.2"),
        "guest memory": machine_of(MachineShape("tcg", 512), "QEMU 7.2"),
        "CPU model is .* of another": {**here, "cpu": "max of another"},
    }
    for name, other in others.items():
        with pytest.raises(CheckpointError, match="another machine: the " + name.split(" is ")[0]):
            require_same(other, here)
    with pytest.raises(CheckpointError):
        require_same({}, here)


def test_a_write_that_breaks_off_leaves_nothing(depot: Depot, tmp_path: Path) -> None:
    content = tmp_path / "content"
    content.write_bytes(b"x" * (1 << 20))
    digest = hashlib.sha256(content.read_bytes()).hexdigest()
    with small_disk(1 << 10), pytest.raises(CheckpointError, match="cannot write"):
        depot.put_file(content, digest)
    assert not list((Path(depot.location) / "blobs").iterdir())
    depot.put_file(content, digest)
    content.write_bytes(b"y" * 10)
    with pytest.raises(CheckpointError, match="content is damaged"):
        depot.put_file(content, digest)
