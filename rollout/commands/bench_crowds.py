"""Sections of the sandbox benchmark: many clones, what they hold while they wait, and what they leave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil

from rollout.commands.bench_engine import STAY, Bench
from rollout.commands.bench_gvisor import GvisorFigures
from rollout.commands.bench_rival import private_mib
from rollout.commands.bench_row import BenchRow, Rival, at_most
from rollout.sandbox.base import Checkpoint, Engine, Sandbox
from rollout.sandbox.microvm.engine import MicroVMEngine

__all__ = ["clones_at_once", "cycles", "idle_cpu", "idle_memory", "live_at_once"]

_WARM_UP_CYCLES = 200
"""Before cycles are counted: so many until caches are full and every thread has been needed once."""
_STEPS_AT_ONCE = 32
"""Of a crowd: more than the machine has cores for, and fewer than would all have to be awake."""


async def idle_memory(bench: Bench, clones: int = 8) -> AsyncIterator[BenchRow]:
    """Private memory of idle clones, as the kernel counts it for their processes."""
    name, unit = "private memory of an idle clone", "MiB"
    rivals = [Rival("idle child of a bare os.fork", bench.rivals.bare.private_mib)]
    target = None
    roots = {name: bench.root}
    if bench.kind == "microvm":
        target = at_most(17)
        gvisor = await asyncio.to_thread(bench.rivals.gvisor.figures)
        if isinstance(gvisor, GvisorFigures):
            rivals.append(Rival.of("gVisor, restored and idle", gvisor.private_mib))
        async with await bench.engine.boot(bench.image) as sandbox:
            roots[f"{name} without an episode"] = await sandbox.checkpoint()
    note = f"{clones} clones at once"
    for what, root in roots.items():
        try:
            found = await _idle_mib(bench.engine, root, clones)
        except OSError as error:
            yield BenchRow.absent(what, unit, f"a process ended meanwhile: {error}", subject=bench.kind)
            continue
        if not found:
            yield BenchRow.absent(what, unit, "the clones have no processes of their own", subject=bench.kind)
            continue
        yield BenchRow.of(what, found, unit, subject=bench.kind, target=target, rivals=rivals, note=note)


async def _idle_mib(engine: Engine, root: Checkpoint, clones: int) -> list[float]:
    """What clones hold that have answered and wait.

    An engine whose sandboxes have a `pid` is measured clone by clone; otherwise all processes that came with
    the clones are taken together.

    Raises:
        OSError: A process ended meanwhile.
    """
    before = _descendants()
    sandboxes = await engine.fork(root, clones)
    try:
        for sandbox in sandboxes:
            await sandbox.call("ping")
        pids = [pid for sandbox in sandboxes if isinstance(pid := getattr(sandbox, "pid", None), int)]
        if pids:
            return [private_mib(pid) for pid in pids]
        new = _descendants() - before
        return [sum(private_mib(pid) for pid in new) / clones] if new else []
    finally:
        await asyncio.gather(*(sandbox.kill() for sandbox in sandboxes))


async def idle_cpu(bench: Bench, idle_s: float = 2.0) -> AsyncIterator[BenchRow]:
    """Processor time of a sandbox that nobody calls, in percent of one core."""
    name = "CPU of an idle sandbox"
    async with await bench.clone() as sandbox:
        await sandbox.call("ping")
        pid: object = getattr(sandbox, "pid", None)
        if not isinstance(pid, int):
            yield BenchRow.absent(
                name, "%", "the sandbox does not say which process it is", subject=bench.kind
            )
            return
        process = psutil.Process(pid)
        await asyncio.sleep(0.5)  # whatever still settles after the call
        before = process.cpu_times()
        await asyncio.sleep(idle_s)
        after = process.cpu_times()
        spent_s = after.user + after.system - before.user - before.system
        yield BenchRow.of(
            name,
            [round(100 * spent_s / idle_s, 2)],
            "%",
            subject=bench.kind,
            note="the kernel counts in 10 ms",
        )


async def clones_at_once(bench: Bench, clones: int = 100) -> AsyncIterator[BenchRow]:
    """One call that forks many, until every one of them has answered."""
    seconds: list[float] = []
    for _ in range(3):
        start_s = time.perf_counter()
        sandboxes = await bench.engine.fork(bench.root, clones)
        try:
            await asyncio.gather(*(sandbox.call("ping") for sandbox in sandboxes))
            seconds.append(time.perf_counter() - start_s)
        finally:
            await asyncio.gather(*(sandbox.kill() for sandbox in sandboxes))
    yield BenchRow.of(f"{clones} clones of one checkpoint, all answering", seconds, "s", subject=bench.kind)


async def live_at_once(bench: Bench) -> AsyncIterator[BenchRow]:
    """Many sandboxes that stay: how long the crowd takes, and whether each still steps afterwards."""
    if not bench.live:
        return
    sandboxes: list[Sandbox] = []
    times_ms: list[float] = []
    start_s = time.perf_counter()
    try:
        for _ in range(bench.live):
            clone_s = time.perf_counter()
            sandboxes.append(await bench.clone())
            await sandboxes[-1].call("ping")
            times_ms.append((time.perf_counter() - clone_s) * 1000)
        total_s = time.perf_counter() - start_s
        turns = asyncio.Semaphore(_STEPS_AT_ONCE)

        async def step(sandbox: Sandbox) -> None:
            async with turns:
                await bench.env.step(sandbox, STAY)

        answers = await asyncio.gather(*(step(sandbox) for sandbox in sandboxes), return_exceptions=True)
    finally:
        await asyncio.gather(*(sandbox.kill() for sandbox in sandboxes))
    tenth = max(1, bench.live // 10)
    slowing = statistics.median(times_ms[-tenth:]) / statistics.median(times_ms[:tenth])
    lost = float(sum(isinstance(answer, BaseException) for answer in answers))
    count = f"{bench.live} live at once"
    for name, unit, value, target in (
        (f"{count}, all made", "s", total_s, at_most(bench.live / 10)),
        (f"{count}, last tenth against first", "x", slowing, at_most(1.15)),
        (f"{count}, lost", "", lost, at_most(0)),
    ):
        yield BenchRow(name, unit, value, None, 1, bench.kind, target)


async def cycles(bench: Bench) -> AsyncIterator[BenchRow]:
    """Clones made and ended one after the other: what is left behind, and whether it gets slower."""
    for _ in range(min(_WARM_UP_CYCLES, bench.cycles)):
        await _cycle(bench)  # whatever is made once is there before the count
    await _drain(bench)
    before = _holdings(bench)
    times_ms = [await _cycle(bench) for _ in range(bench.cycles)]
    await _drain(bench)
    await asyncio.sleep(0.5)  # a killed process is not gone at once
    after = _holdings(bench)
    left = {name: max(0.0, after[name] - before[name]) for name in after}
    yield BenchRow.of("create and destroy a clone", times_ms, "ms", subject=bench.kind)
    count = f"after {bench.cycles} cycles"
    tenth = max(1, bench.cycles // 10)
    slowing = statistics.median(times_ms[-tenth:]) / statistics.median(times_ms[:tenth])
    for name, unit, value, target in (
        (f"processes left {count}", "", left["processes"], at_most(0)),
        (f"descriptors left {count}", "", left["descriptors"], at_most(0)),
        (f"files left {count}", "", left["files"], at_most(0)),
        (f"memory grown {count}", "MiB", left["memory"], at_most(1)),
        (f"last tenth against first {count}", "x", slowing, at_most(1.15)),
    ):
        yield BenchRow(name, unit, value, None, 1, bench.kind, target)


def _holdings(bench: Bench) -> dict[str, float]:
    """What this process and those below it hold; memory in MiB, without the pages of programs.

    Files are those of the engine's folder, and what is called `rollout…` in the folder for temporary files,
    which another run that begins or ends meanwhile changes, too. No engine writes anywhere else.
    """
    processes = _descendants()
    memory_mib = 0.0
    for pid in (os.getpid(), *processes):
        with contextlib.suppress(OSError):  # it ended while we were looking
            memory_mib += private_mib(pid)
    ours = list(Path(tempfile.gettempdir()).glob("rollout*"))
    return {
        "processes": float(len(processes)),
        "descriptors": float(_num_descriptors()),
        "files": float(len([*ours, *bench.scratch.rglob("*")])),
        "memory": memory_mib,
    }


async def _drain(bench: Bench) -> None:
    """Ends what an engine keeps ready on purpose: it is not left over."""
    if isinstance(bench.engine, MicroVMEngine):
        await asyncio.sleep(0.5)  # the last clone's machine may still be on its way back
        await bench.engine.drain()


async def _cycle(bench: Bench) -> float:
    start_s = time.perf_counter()
    async with await bench.clone() as sandbox:
        await sandbox.call("ping")
    return (time.perf_counter() - start_s) * 1000


def _descendants() -> set[int]:
    found: set[int] = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended while we were looking
            if child.status() != psutil.STATUS_ZOMBIE:
                found.add(child.pid)
    return found


def _num_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())
