"""Sections of the sandbox benchmark that only machines have: VMMs that wait, pauses, rivals, tiny guests."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from rollout.commands.bench_engine import STAY, Bench
from rollout.commands.bench_gvisor import GvisorFigures
from rollout.commands.bench_rival import private_mib
from rollout.commands.bench_row import BenchRow, Rival, at_most
from rollout.commands.bench_stock import measure_stock
from rollout.config import EngineConfig, ImageConfig
from rollout.errors import BootError, RolloutError
from rollout.sandbox.base import Sandbox
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.snapshot import Snapshot
from rollout.sandbox.microvm.tiny_guest import TinyGuests, ask
from rollout.sandbox.microvm.vmm import Vmm

__all__ = ["gvisor", "machine_clones", "machine_pauses", "tiny_guests"]

_NUM_CLONES = 100
_FILL_DEADLINE_S = 10.0


async def machine_clones(bench: Bench) -> AsyncIterator[BenchRow]:
    """A clone from a VMM that was started ahead, and where none waits; beside the one that is put back.

    Every clone of a sample stays alive until the next one is made, so that none is put back. Where none
    waits, the prototype is forked; beside it stands a clone whose VMM is started as a program.
    """
    engine = bench.engine
    assert isinstance(engine, MicroVMEngine)
    samples = min(bench.samples, 15)
    program = Rival.of("first reply of one started as a program", await _program_times(bench, samples))
    for what, is_ahead, targets in (
        ("from a VMM started ahead", True, (at_most(20), at_most(45))),
        ("where none waits", False, (at_most(50), at_most(80))),
    ):
        for place, target, takes_step in zip(
            ("first reply", "first step"), targets, (False, True), strict=True
        ):
            times_ms = await _clone_times(bench, engine, samples, is_ahead=is_ahead, takes_step=takes_step)
            rivals = [program, Rival("cold boot", bench.boot_ms)]
            yield BenchRow.of(
                f"clone to {place}, {what}", times_ms, "ms", subject=bench.kind, target=target, rivals=rivals
            )


async def _program_times(bench: Bench, samples: int) -> list[float]:
    """From the call to fork to the first reply, with nothing that VMMs may share."""
    config = EngineConfig(kind="microvm", reuse_vmms=False)
    times_ms: list[float] = []
    async with MicroVMEngine(config, ImageConfig(name=bench.image)) as engine:
        async with await engine.boot(bench.image) as sandbox:
            checkpoint = await sandbox.checkpoint()
        for _ in range(samples):
            await engine.drain()
            start_s = time.perf_counter()
            [clone] = await engine.fork(checkpoint)
            async with clone:
                await clone.call("ping")
                times_ms.append((time.perf_counter() - start_s) * 1000)
    return times_ms


async def _clone_times(
    bench: Bench, engine: MicroVMEngine, samples: int, *, is_ahead: bool, takes_step: bool
) -> list[float]:
    times_ms: list[float] = []
    alive: list[Sandbox] = []
    try:
        for _ in range(samples):
            if is_ahead:
                await _filled(engine)
            else:
                await engine.drain()
            start_s = time.perf_counter()
            alive.append(await bench.clone())
            if takes_step:
                await bench.env.step(alive[-1], STAY)
            else:
                await alive[-1].call("ping")
            times_ms.append((time.perf_counter() - start_s) * 1000)
    finally:
        await asyncio.gather(*(sandbox.kill() for sandbox in alive))
        await engine.drain()
    return times_ms


async def _filled(engine: MicroVMEngine) -> None:
    """Waits until VMMs wait, or for as long as that may take."""
    give_up_at_s = time.perf_counter() + _FILL_DEADLINE_S
    while engine.num_waiting < 2 and time.perf_counter() < give_up_at_s:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0.02)


async def machine_pauses(bench: Bench) -> AsyncIterator[BenchRow]:
    """How long a guest stands still for a checkpoint, numpy and gymnasium imported, beside what others do."""
    name = "checkpoint, pause of a guest without an episode"
    pause_ms: list[float] = []
    async with await bench.engine.boot(bench.image) as sandbox:
        for _ in range(bench.samples):
            await sandbox.call("ping")
            before_s = bench.engine.timings.seconds.get("pause", 0.0)
            checkpoint = await sandbox.checkpoint()
            pause_ms.append((bench.engine.timings.seconds["pause"] - before_s) * 1000)
            await bench.engine.discard(checkpoint)
    try:
        stock = await asyncio.to_thread(measure_stock, bench.image)
        rivals = [Rival("stock QEMU, migration of all memory to a file", stock.save_ms)]
        note = f"stock QEMU restores it in {stock.restore_ms:.0f} ms, from {stock.file_mib:.0f} MiB"
    except (RolloutError, OSError) as error:
        rivals, note = [], f"stock QEMU was not measured: {error}"
    gvisor = await asyncio.to_thread(bench.rivals.gvisor.figures)
    if isinstance(gvisor, GvisorFigures):
        rivals.append(Rival.of("gVisor, checkpoint", gvisor.checkpoint_ms))
    yield BenchRow.of(name, pause_ms, "ms", subject=bench.kind, target=at_most(2.5), rivals=rivals, note=note)


async def gvisor(bench: Bench) -> AsyncIterator[BenchRow]:
    """Figures of gVisor's own, where it is installed: its checkpoint, restore and memory."""
    figures = await asyncio.to_thread(bench.rivals.gvisor.figures)
    if isinstance(figures, str):
        yield BenchRow.absent("all figures", "", figures, subject="gVisor")
        return
    note = figures.note
    saved = f"{note}; {figures.file_mib:.1f} MiB saved"
    for name, values, unit, what in (
        ("checkpoint", figures.checkpoint_ms, "ms", saved),
        ("restore, until it runs", figures.restore_ms, "ms", note),
        ("private memory of an idle restored sandbox", figures.private_mib, "MiB", note),
    ):
        yield BenchRow.of(name, values, unit, subject="gVisor", note=what)


async def tiny_guests(bench: Bench) -> AsyncIterator[BenchRow]:
    """A guest of a few pages: what saving and cloning cost where no operating system is in the way."""
    for accel in ("kvm", "tcg"):
        subject = f"tiny guest, {accel}"
        if accel == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
            yield BenchRow.absent("all figures", "", "/dev/kvm cannot be opened", subject=subject)
            continue
        try:
            for row in await asyncio.to_thread(_tiny_rows, accel, subject, bench.samples):
                yield row
        except (BootError, TimeoutError) as error:
            yield BenchRow.absent("all figures", "", f"it does not run: {error}", subject=subject)


def _tiny_rows(accel: str, subject: str, samples: int) -> list[BenchRow]:
    with TinyGuests(accel) as guests:
        vmm = guests.start()
        guests.become(vmm, guests.base)
        ask(vmm.channel, b"i")
        pause_ms: list[float] = []
        for _ in range(samples):
            pause_ms.append(vmm.save(10.0, resume=True).pause_s * 1000)
        snapshot = guests.save(vmm)
        vmm.kill()
        start_ms, assign_ms = _starts(guests, snapshot, samples)
        at_once_s, memory_mib = _at_once(guests, snapshot)
        is_kvm = accel == "kvm"
        starts = [Rival.of("starting the VMM", start_ms)]
        return [
            BenchRow.of("checkpoint, pause", pause_ms, "ms", subject=subject),
            BenchRow.of(
                "dormant VMM to its vCPU running", assign_ms, "ms", subject=subject, target=at_most(3),
                rivals=starts,
            ),
            BenchRow.of(
                "private memory of an idle clone", memory_mib, "MiB", subject=subject,
                target=at_most(5) if is_kvm else None,
            ),
            BenchRow.of(
                f"{_NUM_CLONES} clones of one running machine, all answering", [at_once_s], "s",
                subject=subject, target=at_most(0.8) if is_kvm else None, note="from dormant VMMs",
            ),
        ]  # fmt: skip


def _starts(guests: TinyGuests, snapshot: Snapshot, samples: int) -> tuple[list[float], list[float]]:
    start_ms: list[float] = []
    assign_ms: list[float] = []
    for _ in range(samples):
        times_s = [time.perf_counter()]
        vmm = guests.start()
        times_s.append(time.perf_counter())
        guests.become(vmm, snapshot)
        times_s.append(time.perf_counter())
        start_ms.append((times_s[1] - times_s[0]) * 1000)
        assign_ms.append((times_s[2] - times_s[1]) * 1000)
        vmm.kill()
    return start_ms, assign_ms


def _at_once(guests: TinyGuests, snapshot: Snapshot) -> tuple[float, list[float]]:
    """Seconds until many clones have answered, and the memory of each."""
    vmms: list[Vmm] = [guests.start() for _ in range(_NUM_CLONES)]
    try:
        start_s = time.perf_counter()
        for vmm in vmms:
            guests.become(vmm, snapshot)
            ask(vmm.channel, b"r")
            vmm.stop(10.0)  # it waits for a byte in a loop
        took_s = time.perf_counter() - start_s
        return took_s, [private_mib(vmm.pid) for vmm in vmms if Path(f"/proc/{vmm.pid}").exists()]
    finally:
        for vmm in vmms:
            vmm.kill()
