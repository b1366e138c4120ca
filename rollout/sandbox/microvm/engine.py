"""The microvm engine: sandboxes are virtual machines with kernels of their own, forked at any depth.

A fork takes a VMM that waits, makes it the checkpoint, and shakes hands with the guest's agent before anyone
may use it (`reviver`). Checkpoints live in this process's memory, compressed and
sharing pages with their ancestors; they are gone with it, unless exported. The blocking steps run in worker
threads; this module only orders them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import BootError, CapacityError, CheckpointError, ForkError, RolloutError
from rollout.sandbox.base import Capabilities, Checkpoint, PhaseTimings, Sandbox
from rollout.sandbox.microvm.owner import Waking
from rollout.sandbox.microvm.reviver import Reviver
from rollout.sandbox.microvm.sandbox import MicroVMSandbox
from rollout.sandbox.microvm.snapshot import RawCache, Snapshot
from rollout.sandbox.microvm.stock import Stock, Stocks
from rollout.sandbox.microvm.vmm import Vmm
from rollout.types import Randomness

__all__ = ["MicroVMEngine"]

T = TypeVar("T")
_PARK_AFTER_S = 0.02
"""Idle time before a vCPU is stopped.

A branch's next request usually comes sooner, and stopping takes a millisecond.
"""
_RAW_CACHE_BYTES = 256 << 20
_WORKERS = 8


class MicroVMEngine:
    """Boots, forks and saves microVMs.

    Args:
        config: Memory, accelerator, limits, deadlines.
        image: The guest image, with its warm-up commands.
        scratch_dir: Unused: this engine keeps nothing on disk but its cache.
        clock: Monotonic seconds, for durations.
    """

    def __init__(
        self,
        config: EngineConfig,
        image: ImageConfig,
        scratch_dir: Path | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config = config
        self._clock = clock
        self._timings = PhaseTimings()
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="microvm")
        self._cache = RawCache(_RAW_CACHE_BYTES)
        self._stocks = Stocks(config, image, self.in_thread, self._cache)
        self._sandboxes: dict[str, MicroVMSandbox] = {}
        self._num_reserved = 0
        self._snapshots: dict[str, tuple[Snapshot, Stock]] = {}
        self._stock_of: dict[str, Stock] = {}
        self._reviver = Reviver(
            config, self._cache, self._timings, self.in_thread, lambda: list(self._sandboxes.values())
        )
        self._names = itertools.count()
        self._prefix = secrets.token_hex(4)
        self._is_closed = False

    @property
    def capabilities(self) -> Capabilities:
        """See `Engine.capabilities`."""
        return self._stocks.capabilities(self._reviver.limits)

    @property
    def timings(self) -> PhaseTimings:
        """Where its time went since it was made."""
        return self._timings

    @property
    def num_sandboxes(self) -> int:
        """Live sandboxes, hibernated ones included."""
        return len(self._sandboxes)

    async def boot(self, image: str) -> Sandbox:
        """Makes a sandbox of an image's base, which is made first if it is not there.

        Raises:
            BootError: The image is missing or damaged, or the guest did not come up in time.
            CapacityError: There is no room.
        """
        self._require_open()
        with self._timed("boot"):
            stock = await self._stocks.get(image)
        with self._reserve(1):
            try:
                return await self._clone(stock, stock.snapshot, None, Randomness())
            except ForkError as error:
                raise BootError(error.message, retryable=error.retryable) from error

    async def fork(
        self, checkpoint: Checkpoint, n: int = 1, *, randomness: Sequence[Randomness] | None = None
    ) -> list[Sandbox]:
        """Makes exactly n clones, or none and an error; see `Engine.fork`."""
        self._require_open()
        if n < 1 or (randomness is not None and len(randomness) != n):
            raise ValueError(f"fork wants n >= 1 and one randomness per clone, got n={n}")
        snapshot, stock = self._find(checkpoint)
        policies = randomness if randomness is not None else [Randomness()] * n
        stock.recent = snapshot
        stock.pool.announce(n)
        with self._reserve(n):
            tasks = [
                asyncio.create_task(self._clone(stock, snapshot, checkpoint.id, policy))
                for policy in policies
            ]
            try:
                done = await asyncio.shield(asyncio.gather(*tasks, return_exceptions=True))
            except asyncio.CancelledError:
                await asyncio.shield(_end_all(tasks))
                raise
        clones = [clone for clone in done if isinstance(clone, MicroVMSandbox)]
        if len(clones) == n:
            return list(clones)
        for clone in clones:
            await clone.kill()
        error = next(error for error in done if isinstance(error, BaseException))
        if isinstance(error, RolloutError):
            raise error
        raise ForkError.wrap(error, "a clone could not be made") from error

    async def rebase(self, checkpoint: Checkpoint) -> None:
        """See `Engine.rebase`: its memory becomes a base, which every later fork of it shares."""
        self._require_open()
        snapshot, stock = self._find(checkpoint)
        if not self._reviver.room.has_spare(stock.base.resident_bytes):
            return  # it costs what it saves
        with self._timed("rebase"):
            derived = await self._stocks.derive(stock, snapshot)
            await stock.pool.drain()  # most forks will want the other
        if checkpoint.id in self._snapshots:  # not discarded meanwhile
            self._snapshots[checkpoint.id] = (derived.snapshot, derived)

    async def discard(self, checkpoint: Checkpoint) -> None:
        """Frees a checkpoint; see `Engine.discard`."""
        self._snapshots.pop(checkpoint.id, None)

    @property
    def stocks(self) -> Stocks:
        """What its sandboxes are made from."""
        return self._stocks

    def content_of(self, checkpoint: Checkpoint) -> tuple[Snapshot, Stock]:
        """What a checkpoint holds, and what it was made from.

        Raises:
            CheckpointError: It is unknown here, or has been discarded.
        """
        return self._find(checkpoint)

    def adopt(
        self, checkpoint_id: str, parent_id: str | None, snapshot: Snapshot, stock: Stock
    ) -> Checkpoint:
        """Makes a checkpoint of a snapshot that another engine made, under its name there."""
        self._snapshots.setdefault(checkpoint_id, (snapshot, stock))
        return _checkpoint(checkpoint_id, parent_id, snapshot, stock)

    def admit(
        self, sandbox_id: str, parent_id: str | None, snapshot: Snapshot, stock: Stock
    ) -> MicroVMSandbox:
        """A hibernated sandbox that lived elsewhere; it wakes with its next request.

        Raises:
            CapacityError: There is no room.
            ForkError: One of that name lives here.
        """
        self._require_open()
        with self._reserve(1):
            if sandbox_id in self._stock_of:
                raise ForkError(f"a sandbox {sandbox_id} lives here already")
            self._sandboxes[sandbox_id] = self._new_sandbox(sandbox_id, parent_id, snapshot, stock)
        return self._sandboxes[sandbox_id]

    async def drain(self) -> None:
        """Ends every VMM that waits for a fork: their memory is free, and the next fork starts its own."""
        await self._stocks.drain()

    @property
    def num_waiting(self) -> int:
        """VMMs that wait for a fork."""
        return self._stocks.num_waiting

    async def close(self) -> None:
        """Kills every sandbox, ends the launcher and frees every checkpoint. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            await asyncio.shield(self._close())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Runs blocking work in a worker thread.

        A caller that is cancelled waits for the end of the step all the same: two threads never use one VMM.
        """
        step = asyncio.get_running_loop().run_in_executor(self._workers, function)
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            await asyncio.wait([step])
            step.exception()  # the step's own failure is of no interest to who has gone
            raise

    async def save(self, sandbox: MicroVMSandbox, vmm: Vmm) -> Snapshot:
        """Reads a machine, which stands still from then on, and makes a snapshot of it.

        Raises:
            CheckpointError: The VMM is gone or does not give its state.
        """
        timeout_s = self._config.checkpoint_timeout_s
        pages = self._stock_of[sandbox.id].pages

        def work() -> tuple[Snapshot, float]:
            raw = vmm.save(timeout_s, resume=False)
            return Snapshot.of(raw, sandbox.origin, self._cache, pages), raw.pause_s

        with self._timed("checkpoint"):
            snapshot, pause_s = await self.in_thread(work)
        self._timings.add("pause", pause_s)
        return snapshot

    def keep(self, sandbox: MicroVMSandbox, snapshot: Snapshot) -> Checkpoint:
        """Makes a checkpoint of a snapshot."""
        stock = self._stock_of[sandbox.id]
        checkpoint_id = f"ckpt-{self._prefix}-{next(self._names)}"
        self._snapshots[checkpoint_id] = (snapshot, stock)
        return _checkpoint(checkpoint_id, sandbox.parent_id, snapshot, stock)

    async def revive(self, sandbox: MicroVMSandbox, snapshot: Snapshot, randomness: Randomness) -> Waking:
        """Restores a snapshot under a sandbox's identity; see `Reviver.revive`."""
        return await self._reviver.revive(sandbox, self._stock_of[sandbox.id], snapshot, randomness)

    async def greet(self, sandbox: MicroVMSandbox, waking: Waking, randomness: Randomness) -> None:
        """Has a machine that goes on confirm a handshake; see `Reviver.greet`."""
        await self._reviver.greet(sandbox, waking.client, randomness)

    async def make_room(self) -> None:
        """Waits for memory for a machine that goes on; see `Room.to_grow`."""
        await self._reviver.room.to_grow()

    async def release(self, sandbox: MicroVMSandbox, waking: Waking, content: Snapshot | None) -> None:
        """Keeps the VMM of a dying sandbox for the next one, if it can be put back."""
        await self._reviver.release(self._stock_of.get(sandbox.id), waking, content)

    def forget(self, sandbox: MicroVMSandbox) -> None:
        """A sandbox is dead."""
        self._sandboxes.pop(sandbox.id, None)
        self._stock_of.pop(sandbox.id, None)

    async def _clone(
        self, stock: Stock, snapshot: Snapshot, parent_id: str | None, randomness: Randomness
    ) -> MicroVMSandbox:
        name = f"vm-{self._prefix}-{next(self._names)}"
        sandbox = self._new_sandbox(name, parent_id, snapshot, stock)
        try:
            sandbox.attach(await self.revive(sandbox, snapshot, randomness))
        except BaseException:
            await sandbox.kill()
            raise
        if self._is_closed:
            await sandbox.kill()
            raise ForkError("the engine has been closed")
        self._sandboxes[sandbox.id] = sandbox
        return sandbox

    def _new_sandbox(
        self, sandbox_id: str, parent_id: str | None, snapshot: Snapshot, stock: Stock
    ) -> MicroVMSandbox:
        self._stock_of[sandbox_id] = stock
        return MicroVMSandbox(
            *(self, sandbox_id, parent_id, snapshot),
            park_after_s=_PARK_AFTER_S,
            call_timeout_s=self._config.call_timeout_s,
        )

    def _find(self, checkpoint: Checkpoint) -> tuple[Snapshot, Stock]:
        if checkpoint.engine != "microvm":
            raise CheckpointError(
                f"checkpoint {checkpoint.id} is of the {checkpoint.engine} engine, not of microvm"
            )
        found = self._snapshots.get(checkpoint.id)
        if found is None:
            raise CheckpointError(f"checkpoint {checkpoint.id} is unknown here, or has been discarded")
        if checkpoint.fingerprint != found[1].fingerprint:
            raise CheckpointError(
                f"checkpoint {checkpoint.id} is of another machine ({checkpoint.fingerprint[:12]}, here "
                f"{found[1].fingerprint[:12]}): QEMU build, CPU model, memory size or base differ"
            )
        return found

    @contextmanager
    def _reserve(self, n: int) -> Generator[None]:
        live = len(self._sandboxes) + self._num_reserved
        if live + n > self._config.max_sandboxes:
            raise CapacityError(
                f"{n} more sandboxes would exceed engine.max_sandboxes={self._config.max_sandboxes} "
                f"({live} live)",
                retryable=True,
            )
        self._num_reserved += n
        try:
            yield
        finally:
            self._num_reserved -= n

    @contextmanager
    def _timed(self, phase: str) -> Generator[None]:
        begun_s = self._clock()
        try:
            yield
        finally:
            self._timings.add(phase, self._clock() - begun_s)

    def _require_open(self) -> None:
        if self._is_closed:
            raise BootError("the engine has been closed")

    async def _close(self) -> None:
        for sandbox in list(self._sandboxes.values()):
            await sandbox.kill()
        await self._reviver.stop()
        await self._stocks.close()
        self._reviver.close()
        self._snapshots.clear()
        self._workers.shutdown(wait=True)


def _checkpoint(checkpoint_id: str, parent_id: str | None, snapshot: Snapshot, stock: Stock) -> Checkpoint:
    return Checkpoint(
        id=checkpoint_id,
        parent_id=parent_id,
        engine="microvm",
        fingerprint=stock.fingerprint,
        image_digest=stock.image_digest,
        private_bytes=snapshot.own_bytes,
    )


async def _end_all(tasks: Sequence[asyncio.Task[MicroVMSandbox]]) -> None:
    """Waits for forks whose caller is gone, and kills what they made."""
    for task in tasks:
        with contextlib.suppress(Exception):
            await (await task).kill()
