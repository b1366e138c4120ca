"""Sections of the sandbox benchmark: one clone, one checkpoint, one branch, one call."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from rollout.commands.bench_engine import STAY, Bench, EngineKind
from rollout.commands.bench_row import BenchRow, Rival, at_least, at_most
from rollout.errors import RolloutError
from rollout.types import Randomness

__all__ = [
    "branch_rates",
    "checkpoint_times",
    "clone_times",
    "continued_children",
    "depth",
    "round_trips",
    "stored_bytes",
]

DEEP = 64
_WINDOW_S = 1.5
_NUM_WINDOWS = 5


async def clone_times(bench: Bench) -> AsyncIterator[BenchRow]:
    """From the call to fork to the clone's first reply, and to its first step."""
    beside = [
        Rival.of("bare os.fork", bench.rivals.bare.fork_ms),
        Rival.of("start of the same program", bench.rivals.start_ms),
        Rival("cold boot", bench.boot_ms),
    ]
    step_ms: list[float] = []
    fork_ms: list[float] = []
    for _ in range(bench.samples):
        start_s = time.perf_counter()
        async with await bench.clone() as sandbox:
            await sandbox.call("ping")
            fork_ms.append((time.perf_counter() - start_s) * 1000)
        start_s = time.perf_counter()
        async with await bench.clone() as sandbox:
            await bench.env.step(sandbox, STAY)
            step_ms.append((time.perf_counter() - start_s) * 1000)
    target = at_most(20) if bench.kind == "microvm" else None
    yield BenchRow.of(
        "clone to first reply", fork_ms, "ms", subject=bench.kind, target=target, rivals=beside,
        note="agent only, handshake included",
    )  # fmt: skip
    yield BenchRow.of(
        "clone to first FrozenLake step", step_ms, "ms", subject=bench.kind,
        target=at_most(45) if bench.kind == "microvm" else None, rivals=beside[1:],
    )  # fmt: skip


async def continued_children(bench: Bench) -> AsyncIterator[BenchRow]:
    """A child that goes on in its parent's sandbox, and the last one, for which the checkpoint is given up.

    From the parent's checkpoint to the child's next one: the sandbox, a step, a save. The ways take turns,
    beside the same child in a clone; the end of the parent's sandbox counts as part of that.
    """
    times_ms: dict[str, list[float]] = {"clone": [], "continue": [], "inherit": []}
    for _ in range(bench.samples):
        for way, found_ms in times_ms.items():
            sandbox = await bench.clone()
            await bench.env.step(sandbox, STAY)
            checkpoint = await sandbox.checkpoint()
            start_s = time.perf_counter()
            if way == "clone":
                await sandbox.kill()
                sandbox = await bench.clone(checkpoint)
            else:
                if way == "inherit":
                    await bench.engine.discard(checkpoint)
                await sandbox.take_over(Randomness())
            await bench.env.step(sandbox, STAY)
            saved = await sandbox.checkpoint()
            found_ms.append((time.perf_counter() - start_s) * 1000)
            await sandbox.kill()
            for each in (checkpoint, saved):
                await bench.engine.discard(each)
    beside = [Rival.of("in a clone", times_ms["clone"])]
    names = {"continue": "child in its parent's sandbox", "inherit": "last child, which inherits"}
    for way, name in names.items():
        yield BenchRow.of(
            f"{name}, with step and save", times_ms[way], "ms", subject=bench.kind, rivals=beside
        )


async def checkpoint_times(bench: Bench) -> AsyncIterator[BenchRow]:
    """The whole call, and the pause of the guest where the engine tells it."""
    call_ms: list[float] = []
    pause_ms: list[float] = []
    async with await bench.clone() as sandbox:
        await bench.env.step(sandbox, STAY)
        for _ in range(bench.samples):
            await sandbox.call("ping")
            paused_s = bench.engine.timings.seconds.get("pause")
            start_s = time.perf_counter()
            checkpoint = await sandbox.checkpoint()
            call_ms.append((time.perf_counter() - start_s) * 1000)
            if (now_s := bench.engine.timings.seconds.get("pause")) is not None:
                pause_ms.append((now_s - (paused_s or 0.0)) * 1000)
            await bench.engine.discard(checkpoint)
    yield BenchRow.of("checkpoint, whole call", call_ms, "ms", subject=bench.kind)
    if pause_ms:
        yield BenchRow.of(
            "checkpoint, pause of the guest", pause_ms, "ms", subject=bench.kind, target=at_most(10)
        )


async def branch_rates(bench: Bench) -> AsyncIterator[BenchRow]:
    """Whole branches a second: clone, step, checkpoint, release; with 1, 4 and 8 in flight."""
    floors: dict[EngineKind, float] = {"process": 150, "microvm": 22}
    bare_ms = statistics.median(bench.rivals.bare.branch_ms)
    for in_flight in (1, 4, 8):
        rates = [await _branch_rate(bench, in_flight) for _ in range(_NUM_WINDOWS)]
        is_target = bench.kind in floors and in_flight == 8
        yield BenchRow.of(
            f"whole branches, {in_flight} in flight",
            rates,
            "branches/s",
            subject=bench.kind,
            target=at_least(floors[bench.kind]) if is_target else None,
            rivals=[
                Rival("bare os.fork, one after the other", 1000 / bare_ms, len(bench.rivals.bare.branch_ms))
            ],
        )


async def _branch_rate(bench: Bench, in_flight: int) -> float:
    done = 0
    start_s = time.perf_counter()

    async def work() -> None:
        nonlocal done
        while time.perf_counter() - start_s < _WINDOW_S:
            await bench.engine.discard(await bench.stepped(bench.root))
            done += 1

    await asyncio.gather(*(work() for _ in range(in_flight)))
    return done / (time.perf_counter() - start_s)


async def depth(bench: Bench) -> AsyncIterator[BenchRow]:
    """A fork at depth 64 against depth 1, measured in turns."""
    chain = [await bench.stepped(bench.root)]
    while len(chain) < DEEP:
        chain.append(await bench.stepped(chain[-1]))
    shallow_ms: list[float] = []
    deep_ms: list[float] = []
    for _ in range(bench.samples):
        for checkpoint, times_ms in ((chain[0], shallow_ms), (chain[-1], deep_ms)):
            start_s = time.perf_counter()
            async with await bench.clone(checkpoint) as sandbox:
                await sandbox.call("ping")
                times_ms.append((time.perf_counter() - start_s) * 1000)
    yield BenchRow.of(
        f"clone to first reply at depth {DEEP}",
        deep_ms,
        "ms",
        subject=bench.kind,
        rivals=[Rival.of("at depth 1", shallow_ms)],
    )
    ratio = statistics.median(deep_ms) / statistics.median(shallow_ms)
    yield BenchRow(f"depth {DEEP} against depth 1", "x", ratio, None, len(deep_ms), bench.kind, at_most(1.15))
    for checkpoint in reversed(chain):
        await bench.engine.discard(checkpoint)


async def stored_bytes(bench: Bench) -> AsyncIterator[BenchRow]:
    """What holding a checkpoint one step after its parent costs, as the engine counts it."""
    kib: list[float] = []
    for _ in range(min(bench.samples, 10)):
        checkpoint = await bench.stepped(bench.root)
        kib.append(checkpoint.private_bytes / 1024)
        await bench.engine.discard(checkpoint)
    target = at_most(120) if bench.kind == "microvm" else None
    yield BenchRow.of("checkpoint one step after its parent", kib, "KiB", subject=bench.kind, target=target)


async def round_trips(bench: Bench) -> AsyncIterator[BenchRow]:
    """Calls to a clone that is warm."""

    async def timed(call: Callable[[], Awaitable[object]]) -> list[float]:
        times_ms: list[float] = []
        for _ in range(bench.samples):
            start_s = time.perf_counter()
            await call()
            times_ms.append((time.perf_counter() - start_s) * 1000)
        return times_ms

    async with await bench.clone() as sandbox:
        await sandbox.call("ping")
        yield BenchRow.of("ping", await timed(lambda: sandbox.call("ping")), "ms", subject=bench.kind)
        step_ms = await timed(lambda: bench.env.step(sandbox, STAY))
        yield BenchRow.of("FrozenLake step", step_ms, "ms", subject=bench.kind)
        try:
            await sandbox.exec(["true"])
        except RolloutError as error:
            yield BenchRow.absent("exec of /bin/true", "ms", str(error), subject=bench.kind)
            return
        exec_ms = await timed(lambda: sandbox.exec(["true"]))
        yield BenchRow.of("exec of /bin/true", exec_ms, "ms", subject=bench.kind)
