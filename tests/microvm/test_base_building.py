"""Bases when several ask at once, when they cannot be kept, and when another machine made them."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import BootError
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.image.store import cache_dir
from rollout.sandbox.microvm.base import BaseStore
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.memory_file import new_memory_file

_missing = what_is_missing("microvm", ImageConfig())
needs_vm = [
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
]
ASKER = """
import asyncio
from rollout.config import EngineConfig, ImageConfig
from rollout.sandbox.microvm.engine import MicroVMEngine

async def main():
    async with MicroVMEngine(EngineConfig(kind="microvm", accel="tcg"), ImageConfig()) as engine:
        machines = await asyncio.gather(*(engine.boot("default") for _ in range(3)))
        print((await machines[0].checkpoint()).fingerprint)

asyncio.run(main())
"""


@pytest.fixture
def empty_cache(tmp_path: Path) -> Path:
    """A cache with the images, and no base."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("images", "names", "recipes", "probes"):
        if (cache_dir() / name).exists():
            (cache / name).symlink_to(cache_dir() / name)
    return cache


class TestMachines:
    pytestmark = needs_vm

    def test_two_processes_build_one_base(self, empty_cache: Path) -> None:
        env = {**os.environ, "ROLLOUT_CACHE": str(empty_cache)}
        askers = [
            subprocess.Popen([sys.executable, "-c", ASKER], env=env, stdout=subprocess.PIPE) for _ in "ab"
        ]
        try:
            said = [asker.communicate(timeout=180)[0] for asker in askers]
        finally:
            for asker in askers:
                asker.kill()
                asker.wait()
        assert all(said)
        assert said[0] == said[1], "each built its own base"
        assert len([path for path in (empty_cache / "bases").iterdir() if path.is_dir()]) == 1

    async def test_a_damaged_base_says_what_to_delete(
        self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ROLLOUT_CACHE", str(empty_cache))
        config = EngineConfig(kind="microvm", accel="tcg")
        async with MicroVMEngine(config, ImageConfig()) as engine:
            await engine.boot("default")
        [folder] = [path for path in (empty_cache / "bases").iterdir() if path.is_dir()]
        with (folder / "pages.zst").open("r+b") as pages:
            pages.truncate(1000)
        async with MicroVMEngine(config, ImageConfig()) as engine:
            failures = await asyncio.gather(*(engine.boot("default") for _ in "ab"), return_exceptions=True)
        for failure in failures:
            assert isinstance(failure, BootError)
            assert f"{folder} is damaged; delete it" in failure.message


def test_a_full_disk_leaves_no_base(tmp_path: Path) -> None:
    store = BaseStore(tmp_path)
    fd = new_memory_file(4 << 20)
    os.pwrite(fd, os.urandom(2 << 20), 0)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with store.building("k"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
            with pytest.raises(BootError, match="cannot keep a base"):
                store.save("k", fd, b"state")
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert store.load("k", 4 << 20) is None
            assert [path.name for path in (tmp_path / "bases").iterdir()] == ["k.lock"]
            os.close(fd)
            fd = new_memory_file(4 << 20)  # that one is sealed
            os.pwrite(fd, b"content", 1 << 20)
            base = store.save("k", fd, b"state")
        loaded = store.load_imported("k", base.digest, 4 << 20)
        assert loaded is not None
        assert loaded.digest == base.digest
        loaded.close()
        assert store.load_imported("k", "0" * 32, 4 << 20) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        os.close(fd)


def imported(store: BaseStore, numbers: bytes, state: bytes = b"") -> tuple[str, str]:
    """A base of another machine, with a page of zeros for each of two numbers."""
    compress = zstandard.ZstdCompressor().compress
    contents = {
        "pages.zst": compress(bytes(2 * 4096)),
        "numbers.npy": numbers,
        "state.zst": state or compress(b"s"),
    }
    folder = store.new_folder()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    digest = hashlib.sha256(json.dumps(sha256, sort_keys=True).encode()).hexdigest()[:32]
    store.adopt(folder, "k", digest, sha256)
    return "k", digest


def saved(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_a_base_of_another_machine_stays_within_this_ones_memory(tmp_path: Path) -> None:
    store = BaseStore(tmp_path)
    good = np.array([3, 5], np.uint32)
    loaded = store.load_imported(*imported(store, saved(good)), 1 << 20)
    assert loaded is not None
    assert os.fstat(loaded.ram_fd).st_size == 1 << 20
    loaded.close()
    bomb = zstandard.ZstdCompressor().compress(bytes(80 << 20))
    for numbers, state in (
        (saved(np.array([3, 1 << 8], np.uint32)), b""),
        (saved(np.array([3, (1 << 32) - 1], np.uint32)), b""),
        (saved(np.array([5, 3], np.uint32)), b""),
        (saved(np.array([3, 3], np.uint32)), b""),
        (saved(good.astype(np.int64)), b""),
        (saved(np.array(3, np.uint32)), b""),
        (saved(good)[:-1], b""),
        (saved(good).replace(b"(2,)", b"(((("), b""),
        (b"", b""),
        (saved(good), bomb),
    ):
        with pytest.raises(BootError, match="is damaged; delete it"):
            store.load_imported(*imported(store, numbers, state), 1 << 20)


def test_a_base_that_is_not_the_one_named_is_not_kept(tmp_path: Path) -> None:
    store = BaseStore(tmp_path)
    folder = store.new_folder()
    with pytest.raises(BootError, match="another base"):
        store.adopt(folder, "k", "0" * 32, {"pages.zst": "0" * 64})
    assert list((tmp_path / "bases").iterdir()) == [folder]
