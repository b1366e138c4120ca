"""`rollout bench sandbox`: what clones, checkpoints and whole branches cost on each engine.

Every section is an asynchronous generator of rows over a `Bench` (an engine with FrozenLake ready in it), and
`SECTIONS` says which engine has which: a figure is added by writing one more section and naming it there.

What a row stands beside is measured in the same run: a bare `os.fork` of a process with the same environment,
a fresh start of the same program, and the engine's own cold boot.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout.commands import bench_crowds, bench_forks, bench_machines
from rollout.commands.bench_engine import ENGINE_KINDS, Bench, EngineKind, Rivals, Section
from rollout.commands.bench_gvisor import GvisorRival
from rollout.commands.bench_rival import measure_bare_fork, measure_start
from rollout.commands.bench_row import BenchRow, Rival
from rollout.config import EngineConfig, EnvConfig, ImageConfig
from rollout.errors import RolloutError
from rollout.loading import load_env
from rollout.sandbox.base import Engine
from rollout.sandbox.engines import make_engine

__all__ = ["SECTIONS", "rows", "section_names"]

_COMMON: tuple[Section, ...] = (
    bench_forks.clone_times,
    bench_forks.continued_children,
    bench_forks.checkpoint_times,
    bench_forks.branch_rates,
    bench_forks.depth,
    bench_forks.stored_bytes,
    bench_forks.round_trips,
    bench_crowds.idle_memory,
    bench_crowds.idle_cpu,
    bench_crowds.clones_at_once,
    bench_crowds.cycles,
    bench_crowds.live_at_once,
)
_MACHINES: tuple[Section, ...] = (
    bench_machines.machine_clones,
    bench_machines.machine_pauses,
    bench_machines.gvisor,
    bench_machines.tiny_guests,
)
SECTIONS: dict[EngineKind, tuple[Section, ...]] = {
    "inline": _COMMON,
    "process": _COMMON,
    "microvm": (*_COMMON, *_MACHINES),
}
"""What is measured on each engine, in order."""

_BOOT = "cold-boot"
_FROZEN_LAKE = EnvConfig(args={"env_id": "FrozenLake-v1", "kwargs": {"is_slippery": False}})


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is asked of one engine; see `Bench`."""

    kind: EngineKind
    samples: int
    cycles: int
    live: int
    only: Collection[str]

    def has(self, section: str) -> bool:
        """Whether it is wanted."""
        return not self.only or section in self.only


def section_names(kinds: Sequence[EngineKind] = ENGINE_KINDS) -> list[str]:
    """What can be measured by itself on some of these engines: the cold boot, and every section."""
    names = (_name_of(section) for kind in kinds for section in SECTIONS[kind])
    return list(dict.fromkeys([_BOOT, *names]))


def _name_of(section: Section) -> str:
    return section.__name__.replace("_", "-")


def rows(
    kinds: Sequence[EngineKind] = ENGINE_KINDS,
    *,
    samples: int = 30,
    cycles: int = 200,
    live: int = 0,
    only: Collection[str] = (),
    engine: EngineConfig | None = None,
    image: ImageConfig | None = None,
) -> Iterator[BenchRow]:
    """Measures engines one after the other; one that cannot run here gives a row with the reason.

    Args:
        kinds: Which engines.
        samples: Measurements of each figure.
        cycles: Create-and-destroy cycles of the leak count.
        live: Sandboxes that are alive at once in the crowd; 0 leaves it out.
        only: The sections to measure, as `section_names` has them; none are all.
        engine: Settings of the engines; their kind is taken from `kinds`.
        image: The guest image of microVMs.
    """
    engine, image = engine or EngineConfig(), image or ImageConfig()
    rivals = Rivals(measure_bare_fork(samples), measure_start(min(samples, 5)), GvisorRival(samples))
    for kind in kinds:
        config = engine.model_copy(update={"kind": kind})
        with asyncio.Runner() as runner:
            plan = _Plan(kind, samples, cycles, live, frozenset(only))
            stream = _engine_rows(plan, config, image, rivals)
            try:
                while (row := runner.run(_next(stream))) is not None:
                    yield row
            finally:
                runner.run(stream.aclose())


async def _next(stream: AsyncIterator[BenchRow]) -> BenchRow | None:
    return await anext(stream, None)


async def _engine_rows(
    plan: _Plan, config: EngineConfig, image: ImageConfig, rivals: Rivals
) -> AsyncGenerator[BenchRow, None]:
    kind = plan.kind
    with tempfile.TemporaryDirectory(prefix="rollout-bench-") as scratch:
        try:
            engine = make_engine(config, image, Path(scratch))
        except (RolloutError, ImportError) as error:
            yield BenchRow.absent("all figures", "", f"the {kind} engine cannot run: {error}", subject=kind)
            return
        async with engine:
            try:
                bench = await _begin(plan, engine, image, rivals, Path(scratch))
            except RolloutError as error:
                yield BenchRow.absent("all figures", "", f"FrozenLake did not start: {error}", subject=kind)
                return
            if plan.has(_BOOT):
                yield BenchRow.of(
                    "cold boot, environment made, reset and saved",
                    [bench.boot_ms],
                    "ms",
                    subject=kind,
                    rivals=[Rival.of("start of the same program", rivals.start_ms)],
                )
            for section in SECTIONS[kind]:
                if not plan.has(_name_of(section)):
                    continue
                try:
                    async for row in section(bench):
                        yield row
                except RolloutError as error:
                    name = section.__name__.replace("_", " ")
                    yield BenchRow.absent(name, "", f"{type(error).__name__}: {error}", subject=kind)


async def _begin(plan: _Plan, engine: Engine, image: ImageConfig, rivals: Rivals, scratch: Path) -> Bench:
    env = load_env(_FROZEN_LAKE)
    start_s = time.perf_counter()
    async with await engine.boot(image.name) as sandbox:
        await env.prepare(sandbox)
        prepared = await sandbox.checkpoint()
    await engine.rebase(prepared)
    [sandbox] = await engine.fork(prepared)
    async with sandbox:
        await env.reset(sandbox, env.tasks()[0], seed=0)
        root = await sandbox.checkpoint()
    boot_ms = (time.perf_counter() - start_s) * 1000
    asked = plan.samples, plan.cycles, plan.live
    return Bench(plan.kind, engine, env, root, *asked, rivals, boot_ms, image.name, scratch)
