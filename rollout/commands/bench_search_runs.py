"""Whole searches on real sandboxes, beside the bare branches of the same engine in the same run.

A simulation of a search is a branch (clone, step, checkpoint, playout, release) unless it ends in a state
that is known to be final, so a search that costs nothing itself would do at least as many of the one as of
the other. FrozenLake 4x4 without slipping, random playouts of at most 20 steps, eight branches in flight.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rollout.branch import BranchJob, Opening
from rollout.commands.bench_row import BenchRow, Rival, at_least
from rollout.config import EngineConfig, EnvConfig, ImageConfig, SearchConfig
from rollout.errors import RolloutError
from rollout.loading import load_env
from rollout.policy.evaluators import make_evaluator
from rollout.policy.planner import SearchPlanner
from rollout.policy.trials import Position
from rollout.sandbox.base import PhaseTimings
from rollout.sandbox.branching import LocalBrancher
from rollout.sandbox.engines import make_engine
from rollout.types import PlayoutRequest, Randomness

__all__ = ["run_rows"]

_ENV = EnvConfig(args={"env_id": "FrozenLake-v1", "kwargs": {"is_slippery": False}})
_WAVE = 8
_HORIZON = 20
_SIMULATIONS = {"inline": 2000, "process": 400, "microvm": 64}
"""Of one sample: some seconds on the slower engines."""


def run_rows(
    kinds: tuple[str, ...] = ("inline", "process", "microvm"), samples: int = 3
) -> Iterator[BenchRow]:
    """A row for each engine; one that cannot run here gives a row with the reason."""
    for kind in kinds:
        name = f"simulations, whole search, {kind}"
        try:
            searched, bare = asyncio.run(_measure(kind, _SIMULATIONS[kind], samples))
        except (RolloutError, ImportError) as error:
            yield BenchRow.absent(name, "simulations/s", f"cannot run here: {error}", subject="run")
            continue
        rival = Rival.of("bare branches/s", bare)
        yield BenchRow.of(
            name,
            searched,
            "simulations/s",
            subject="run",
            target=at_least(5000) if kind == "inline" else at_least(0.9 * rival.value),
            rivals=[rival],
            note="FrozenLake, random playouts, wall time; beside bare branches of the same engine",
        )


async def _measure(kind: str, simulations: int, samples: int) -> tuple[list[float], list[float]]:
    """Simulations and bare branches a second, taking turns."""
    config = EngineConfig.model_validate({"kind": kind})
    search = SearchConfig(
        simulations=simulations, wave=_WAVE, discount=0.95, playout_horizon=_HORIZON, exploration=0.5
    )
    env = load_env(_ENV)
    with tempfile.TemporaryDirectory(prefix="rollout-bench-") as scratch:
        async with make_engine(config, ImageConfig(), Path(scratch)) as engine:
            brancher = LocalBrancher(engine, env, limits=config, concurrency=_WAVE)
            opening = await brancher.open(env.tasks()[0], 0)
            planner = SearchPlanner(
                env, brancher, search, make_evaluator(search), PhaseTimings(), time.perf_counter
            )
            position = Position(opening.step, opening.checkpoint)
            searched: list[float] = []
            bare: list[float] = []
            for seed in range(samples):
                bare.append(await _bare(brancher, opening, simulations // 2))
                start_s = time.perf_counter()
                await planner.choose(position, 0, seed)
                searched.append(simulations / (time.perf_counter() - start_s))
    return searched, bare


async def _bare(brancher: LocalBrancher, opening: Opening, num_branches: int) -> float:
    """Branches a second of one checkpoint, in waves as a search asks for them."""
    start_s = time.perf_counter()
    for first in range(0, num_branches, _WAVE):
        jobs = [
            BranchJob(opening.checkpoint, (i % 4,), Randomness.seeded(i), PlayoutRequest(_HORIZON, i, 0.95))
            for i in range(first, min(first + _WAVE, num_branches))
        ]
        results = await brancher.run(jobs)
        failed = [result.failure for result in results if result.failure is not None]
        if failed:
            raise RolloutError(f"a branch failed: {failed[0].cause}")
        await brancher.release([r.checkpoint for r in results if r.checkpoint is not None])
    return num_branches / (time.perf_counter() - start_s)
