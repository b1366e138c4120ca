"""Figures of the search: speed and memory of the core, quality of play, and what parallel trials are worth.

- "core": the pure search with a table model inline, one thread, in CPU time, so that other load on the
  machine counts less. Rivals play what they can play (see `bench_search_rivals`).
- "run": whole searches on real sandboxes (see `bench_search_runs`).
- "quality": known games (see `bench_search_quality`).
- "parallel": virtual time, in which a trial takes its evaluator one unit on average. No machine is measured.
"""

from __future__ import annotations

import heapq
import random
import tracemalloc
from array import array
from collections.abc import Iterator
from math import inf, sqrt
from time import process_time

from rollout.commands.bench_models import TableModel, run_search
from rollout.commands.bench_row import BenchRow, Rival, at_least, at_most
from rollout.commands.bench_search_quality import (
    HONEST,
    cliff_row,
    exact_lake,
    lake_rows,
    policy_returns,
    search_config,
    tic_tac_toe_row,
)
from rollout.commands.bench_search_rivals import INSTALL, RIVALS
from rollout.commands.bench_search_runs import run_rows
from rollout.search.base import NodeInfo, Outcome, Search
from rollout.search.factory import make_search

__all__ = ["rows"]


def rows(
    *,
    episodes: int = 20,
    games: int = 200,
    budgets: tuple[int, ...] = (200, 1000, 5000),
    exact_up_to: int = 200,
) -> Iterator[BenchRow]:
    """Measures everything, cheap figures first; the quality at 5,000 simulations takes minutes.

    Args:
        episodes: Played episodes of FrozenLake for each budget.
        games: Games of tic-tac-toe.
        budgets: Simulations a move.
        exact_up_to: Largest budget whose policy is valued exactly, by a search in each of 1,600 states.
    """
    yield from _core()
    yield from run_rows()
    yield from _parallel()
    yield cliff_row()
    yield tic_tac_toe_row(games)
    yield from lake_rows(episodes, budgets, exact_up_to)


def _core() -> Iterator[BenchRow]:
    rivals: list[Rival] = []
    for name, measure in RIVALS.items():
        try:
            rivals.append(Rival.of(name, [measure() for _ in range(3)]))
        except ImportError:
            yield BenchRow.absent(f"simulations of {name}", "simulations/s", INSTALL, subject="core")
    lake = TableModel.of_gymnasium("FrozenLake-v1", 100, is_slippery=True)
    for algorithm in ("uct", "puct", "gumbel"):
        yield BenchRow.of(
            f"simulations, {algorithm}",
            [_rate(lake, algorithm) for _ in range(5)],
            "simulations/s",
            subject="core",
            target=at_least(20_000) if algorithm == "uct" else None,
            rivals=rivals if algorithm == "uct" else (),
            note="FrozenLake as a table, zero values, 10,000 simulations, CPU time",
        )
    yield from _growth()
    yield BenchRow.of(
        "memory of a node, 16 actions",
        [_bytes_a_node()],
        "bytes",
        subject="core",
        target=at_most(600),
        note="tree, edges, outcomes and unequal priors; no state hashes, no checkpoints",
    )


def _rate(lake: TableModel, algorithm: str) -> float:
    search = make_search(search_config(algorithm=algorithm, simulations=10_000), lake.info(lake.start()), 1)
    start_s = process_time()
    run_search(search, lake, lake.start(), batch=8)
    return 10_000 / (process_time() - start_s)


def _growth() -> Iterator[BenchRow]:
    """Cost at 100,000 nodes against 1,000, in blocks that take turns, so that load hits all alike.

    A simulation costs F + s·d, with d the steps of its path, which grow with the logarithm of the tree. F and
    s are solved for from trees of 100 and of 1,000 nodes, both of which a processor's caches hold, by their
    fastest turns: other load only adds. What is left of the growth is memory that is further away.
    """
    large = _noise_search()
    _grow(large, 100_000)
    turns: list[tuple[float, ...]] = []
    for _ in range(15):
        (tiny_s, tiny_d), (small_s, small_d) = _fresh(100, 150), _fresh(750, 500)
        large_s, large_d = _timed(large, 500)
        turns.append((tiny_s, tiny_d, small_s, small_d, large_s, large_d))
    tiny_s, tiny_d, small_s, small_d, large_s, large_d = (min(column) for column in zip(*turns, strict=True))
    step_s = (small_s - tiny_s) / (small_d - tiny_d)
    fixed_s = small_s - step_s * small_d
    by_depth = (fixed_s + step_s * large_d) / small_s
    yield BenchRow.of(
        "cost of a simulation, 100,000 nodes against 1,000",
        [turn[4] / turn[2] for turn in turns],
        "x",
        subject="core",
        target=at_most(1.3),
        note=f"UCT, 16 actions, random values; paths of {large_d:.1f} steps against {small_d:.1f}",
    )
    needed_us = 0.3 * fixed_s * 1e6 / (large_d - 1.3 * small_d)
    parts = (
        ("of which longer paths", by_depth, "x", f"F + s·d; 1.3 would need s = {needed_us:.1f} µs", ()),
        ("of which memory further away", large_s / small_s / by_depth, "x", "the rest", ()),
        ("fixed cost of a simulation, F", fixed_s * 1e6, "µs", "the trial, its outcome, the new node", ()),
        (
            "cost of a step, s",
            step_s * 1e6,
            "µs",
            "16 scores; counts and values on the way down and up",
            (Rival.of("16 scores in a bare loop", [_bare_scores_us() for _ in range(15)]),),
        ),
    )
    for name, value, unit, note, rivals in parts:
        yield BenchRow(
            name=name, unit=unit, value=value, samples=len(turns), subject="core", note=note, rivals=rivals
        )


def _bare_scores_us() -> float:
    """CPU time of what a step cannot do without: the argmax of 16 UCT scores, in Python."""
    values, counts = array("d", range(16)), array("i", range(1, 17))
    start_s = process_time()
    for _ in range(2000):
        best, best_score = -1, -inf
        for slot in range(16):
            score = values[slot] + 2.0 / sqrt(counts[slot])
            if score > best_score:
                best, best_score = slot, score
        assert best == 15
    return (process_time() - start_s) / 2000 * 1e6


def _fresh(nodes: int, simulations: int) -> tuple[float, float]:
    """As `_timed`, of a new tree that has grown to a size."""
    search = _noise_search()
    _grow(search, nodes)
    return _timed(search, simulations)


def _noise_search() -> Search:
    return make_search(search_config(simulations=10**9, wave=1), NodeInfo(16), 0)


def _step_noise(search: Search) -> int:
    [trial] = search.ask(1)
    search.tell(trial.trial_id, Outcome(0.0, NodeInfo(16, (trial.seed >> 20) % 1000 / 1000)))
    return trial.depth


def _grow(search: Search, nodes: int) -> None:
    while len(search.tree) < nodes:
        _step_noise(search)


def _timed(search: Search, simulations: int) -> tuple[float, float]:
    """CPU seconds, and steps of path, per simulation."""
    start_s = process_time()
    steps = sum(_step_noise(search) for _ in range(simulations))
    return (process_time() - start_s) / simulations, steps / simulations


def _bytes_a_node() -> float:
    prior = tuple((action + 1) / 136 for action in range(16))
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    search = make_search(search_config(simulations=10**9, wave=1), NodeInfo(16, 0.0, prior), 0)
    for _ in range(5000):
        [trial] = search.ask(1)
        search.tell(trial.trial_id, Outcome(0.1, NodeInfo(16, trial.seed / 2**63, prior)))
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return used / len(search.tree)


def _parallel() -> Iterator[BenchRow]:
    one = _makespan(1, deterministic=True, seed=0)
    for deterministic in (True, False):
        for workers in (8, 64):
            mode = "deterministic" if deterministic else "free-running"
            yield BenchRow.of(
                f"speed-up, {workers} workers, {mode}",
                [one / _makespan(workers, deterministic=deterministic, seed=seed) for seed in range(5)],
                "x",
                subject="parallel",
                note="latency-bound evaluator, virtual time: 0.5 to 1.5 units a trial, 2,000 simulations",
            )
    for wave in (1, 8, 32):
        yield BenchRow.of(
            f"policy at 200 simulations, {wave} in flight",
            policy_returns([({**HONEST, "simulations": 200, "wave": wave}, seed) for seed in range(2)]),
            "return",
            subject="parallel",
            note="FrozenLake 4x4 slippery, exact leaf values, exact return",
        )


def _makespan(workers: int, *, deterministic: bool, seed: int) -> float:
    """Virtual time of a search whose trials each take a worker 0.5 to 1.5 units."""
    lake, settings = exact_lake(), {**HONEST, "simulations": 2000, "wave": workers}
    search = make_search(
        search_config(**settings, deterministic=deterministic), lake.info(lake.start()), seed
    )
    rng, now, states = random.Random(seed), 0.0, {0: lake.start()}
    running: list[tuple[float, int, Outcome]] = []
    while not search.done:
        for trial in search.ask(workers - len(running)):
            after, told = lake.outcome(states[trial.source], trial.action, trial.seed)
            states[trial.trial_id] = after
            heapq.heappush(running, (now + rng.uniform(0.5, 1.5), trial.trial_id, told))
        if running:
            now, trial_id, told = heapq.heappop(running)
            search.tell(trial_id, told)
    return now
