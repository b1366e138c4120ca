"""What clones of an image are made from: its base, the launcher, and the VMMs that wait on it.

An engine gets the stock of an image the first time that it boots it. Making one finds the QEMU binary,
decides the accelerator, loads the base (or boots a machine, warms it up and keeps its memory), and starts
the launcher.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import BootError, CheckpointError
from rollout.sandbox.base import Capabilities
from rollout.sandbox.image.store import Image, ImageStore
from rollout.sandbox.microvm.base import Base, BaseStore, base_key, derived_base
from rollout.sandbox.microvm.boot import InThread, boot_into
from rollout.sandbox.microvm.identity import machine_of, require_same
from rollout.sandbox.microvm.machine import BootFiles, MachineShape
from rollout.sandbox.microvm.memory import Pages, has_pagemap_scan, map_pages
from rollout.sandbox.microvm.memory_file import new_memory_file
from rollout.sandbox.microvm.pool import Demand, VmmPool
from rollout.sandbox.microvm.probe import choose_accel, filters_itself, qemu_binary
from rollout.sandbox.microvm.snapshot import RawCache, Snapshot
from rollout.sandbox.microvm.source import Ground, VmmSource
from rollout.sandbox.microvm.spawner import Spawner
from rollout.sandbox.payload import payload_contents

__all__ = ["Stock", "Stocks"]

T = TypeVar("T")
_POOL_LOW, _POOL_HIGH = 2, 32
_IMAGES = "/images"
"""Where VMMs see the image store."""


@dataclass(slots=True)
class Stock:
    """What clones of one image come from.

    Attributes:
        base: Shared memory.
        snapshot: The base itself, as a snapshot without pages.
        pages: The base's pages, shape [num_pages, 4096].
        pool: VMMs that wait.
        source: Where they come from.
        fingerprint: Of every checkpoint on this base.
        image_digest: The image.
        machine: What must be the same to restore a checkpoint, by name.
        recent: What was forked last, and will probably be forked next: VMMs started ahead warm up on it.
        shape: The machine that its VMMs are.
        files: What they are made from.
        root: The stock that it was derived from, if it was.
        root_content: What its base holds, on the base of `root`.
    """

    base: Base
    snapshot: Snapshot
    pages: Pages
    pool: VmmPool
    source: VmmSource
    fingerprint: str
    image_digest: str
    machine: Mapping[str, str]
    recent: Snapshot
    shape: MachineShape
    files: BootFiles
    root: Stock | None = None
    root_content: Snapshot | None = None


class Stocks:
    """The stocks of an engine, one an image, each made once even when many ask at the same time."""

    def __init__(
        self, config: EngineConfig, image: ImageConfig, in_thread: InThread, cache: RawCache
    ) -> None:
        self._config = config
        self._image_config = image
        self._in_thread = in_thread
        self._cache = cache
        self._store = ImageStore()
        self._use_scan = has_pagemap_scan()
        self._spawner: Spawner | None = None
        self._accel: str | None = None
        self._stocks: dict[str, Stock] = {}
        self._making = asyncio.Lock()
        self._is_closed = False

    def capabilities(self, limits: Sequence[str]) -> Capabilities:
        """What the engine offers on this machine; `limits` are those of control groups."""
        slow = "guests run under TCG, without KVM: several times slower"
        notes = [slow] if self._accel == "tcg" else []
        return Capabilities(
            engine="microvm",
            wall="a virtual machine with its own kernel, in a VMM without network, privileges or devices",
            trusted_only=False,
            forks_background_processes=True,
            isolates_files=True,
            survives_host_restart=False,
            limits=("guest memory", "processes", "file size", *limits),
            notes=tuple(notes),
        )

    async def get(self, name: str) -> Stock:
        """The stock of an image.

        Raises:
            BootError: The image or QEMU is missing, or the guest did not come up.
        """
        async with self._making:
            image = self._store.find_current(name, payload_contents())
            if (stock := self._stocks.get(image.digest)) is None:
                stock = self._stocks[image.digest] = await self._make(image)
            return stock

    async def of_base(self, image_digest: str, base: tuple[str, str], machine: Mapping[str, str]) -> Stock:
        """The stock of a base that another machine made.

        Args:
            image_digest: The image, which is in the store.
            base: Key and digest of the base, which is in the cache.
            machine: What its checkpoints need.

        Raises:
            CheckpointError: This machine is another one, or the base is not here.
            BootError: The image is of another version of this package, or something is damaged.
        """
        async with self._making:
            image = self._store.find_current(image_digest, payload_contents())
            for stock in self._stocks.values():
                if (stock.image_digest, stock.base.digest) == (image.digest, base[1]):
                    require_same(machine, stock.machine)
                    return stock
            stock = self._stocks[f"{image.digest}:{base[1]}"] = await self._make(
                image, imported=base, wanted=machine
            )
            return stock

    async def derive(self, stock: Stock, content: Snapshot) -> Stock:
        """A stock whose base is a checkpoint of another: what is forked from it has few pages of its own.

        It takes as much memory as the base does, until the engine is closed. Its checkpoints have the other's
        fingerprint, because they can be expressed on its base (`Stock.root_content`).

        Raises:
            BootError: There is no memory for it.
            CheckpointError: The checkpoint is damaged.
        """

        def work() -> Base:
            pages = content.unpack_pages(self._cache, stock.pages)
            return derived_base(stock.base, content.unpack_device_state(), content.page_numbers, pages)

        base = await self._in_thread(work)
        name = f"{stock.image_digest}:{base.digest}"
        if (known := self._stocks.get(name)) is not None:
            base.close()
            return known
        if self._is_closed:
            base.close()
            raise BootError("the engine has been closed")
        derived = self._stock(
            *(base, stock.fingerprint, stock.image_digest, stock.machine, stock.shape, stock.files),
            root=(stock, content),
        )
        derived.source.prepare()
        self._stocks[name] = derived
        return derived

    @property
    def num_waiting(self) -> int:
        """VMMs that wait, of all images."""
        return sum(stock.pool.num_ready for stock in self._stocks.values())

    async def drain(self) -> None:
        """Ends the waiting VMMs."""
        for stock in self._stocks.values():
            await stock.pool.drain()

    async def close(self) -> None:
        """Ends the waiting VMMs and the launcher. Idempotent."""
        self._is_closed = True
        for stock in self._stocks.values():
            await stock.pool.close()
        for stock in reversed(self._stocks.values()):  # derived ones first
            await stock.source.close()
        if self._spawner is not None:
            await self._in_thread(self._spawner.close)
            self._spawner = None
        for stock in self._stocks.values():
            stock.base.close()
        self._stocks.clear()

    async def _make(
        self,
        image: Image,
        *,
        imported: tuple[str, str] | None = None,
        wanted: Mapping[str, str] | None = None,
    ) -> Stock:
        accel = self._accel or await self._in_thread(lambda: choose_accel(self._config.accel, image))
        self._accel = accel
        shape = MachineShape(accel, self._config.memory_mib)
        binary = qemu_binary(accel)
        version = _version_of(binary)
        machine = machine_of(shape, version)
        if wanted is not None:
            require_same(wanted, machine)
        files = BootFiles(
            binary=binary,
            disk=Path(_IMAGES) / image.digest / "rootfs.erofs",
            kernel=Path(_IMAGES) / image.digest / "vmlinuz",
            initrd=Path(_IMAGES) / image.digest / "initrd",
            filters_itself=filters_itself(binary),
        )
        spawner = self._spawner
        if spawner is None:
            devices = [Path("/dev/kvm")] if accel == "kvm" else []
            images = {_IMAGES: self._store.root / "images"}
            spawner = self._spawner = Spawner(images, devices, programs=[binary])
        key = base_key(image, shape, version, self._image_config.warm_up)
        if imported is None:
            base = await self._base(key, image, shape, files, spawner)
        else:
            base = await self._imported_base(*imported, shape)
        fingerprint = hashlib.sha256(f"{shape.fingerprint(version)}:{base.digest}".encode()).hexdigest()[:32]
        return self._stock(base, fingerprint, image.digest, machine, shape, files)

    def _stock(
        self,
        base: Base,
        fingerprint: str,
        image_digest: str,
        machine: Mapping[str, str],
        shape: MachineShape,
        files: BootFiles,
        root: tuple[Stock, Snapshot] | None = None,
    ) -> Stock:
        spawner = self._spawner
        assert spawner is not None, "whoever has a base has started the launcher"
        ground = Ground(
            spawner=spawner,
            shape=shape,
            files=files,
            base=base,
            pages=map_pages(base.ram_fd, shape.memory_bytes),
            snapshot=Snapshot.at_base(base.device_state),
            cache=self._cache,
            in_thread=self._in_thread,
            timeout_s=self._config.fork_timeout_s,
            use_scan=self._use_scan,
            reuses=self._config.reuse_vmms,
        )
        source = VmmSource(ground, lambda: stock.recent, root and (root[0].source, root[1]))
        stock = Stock(
            base=base,
            snapshot=ground.snapshot,
            pages=ground.pages,
            pool=VmmPool(source, Demand(low=_POOL_LOW, high=_POOL_HIGH)),
            source=source,
            fingerprint=fingerprint,
            image_digest=image_digest,
            machine=machine,
            recent=ground.snapshot,
            shape=shape,
            files=files,
        )
        if root is not None:
            stock.root, stock.root_content = root
        return stock

    async def _imported_base(self, key: str, digest: str, shape: MachineShape) -> Base:
        bases = BaseStore(self._store.root)
        base = await self._in_thread(lambda: bases.load_imported(key, digest, shape.memory_bytes))
        if base is None:
            raise CheckpointError(f"the base {digest} is not here")
        return base

    async def _base(
        self, key: str, image: Image, shape: MachineShape, files: BootFiles, spawner: Spawner
    ) -> Base:
        store = BaseStore(self._store.root)
        lock = store.building(key)
        await self._in_thread(lock.__enter__)
        try:
            if (base := await self._in_thread(lambda: store.load(key, shape.memory_bytes))) is not None:
                return base
            await self._in_thread(lambda: self._store.verify(image))
            fd = new_memory_file(shape.memory_bytes)
            try:
                device_state = await boot_into(
                    fd,
                    shape,
                    files,
                    spawner,
                    self._image_config.warm_up,
                    self._in_thread,
                    timeout_s=self._config.boot_timeout_s,
                )
                return await self._in_thread(lambda: store.save(key, fd, device_state))
            except BaseException:
                os.close(fd)
                raise
        finally:
            lock.__exit__(None, None, None)


def _version_of(binary: str) -> str:
    """Name, version and build of a QEMU binary, as it tells them, and its size.

    Distributions rebuild versions.
    """
    done = subprocess.run([binary, "--version"], capture_output=True, check=True, text=True)
    return f"{done.stdout.splitlines()[0]} {Path(shutil.which(binary) or binary).stat().st_size}"
