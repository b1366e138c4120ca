"""An honest search cannot beat the exact optimum; one that sees the future does.

FrozenLake 4x4, slippery, 100 steps, no discount. The optimum and the value of random play are computed here
by dynamic programming over the environment's own table, so that no number is taken on trust. Episodes are
seeded: the outcome of a given code is always the same.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium
import pytest

from rollout.config import RunConfig, load_config
from rollout.runner import play_locally
from rollout.testing import comparable

CONFIG = Path(__file__).parent.parent / "configs" / "frozenlake-slippery.toml"
HORIZON = 100
SIGNIFICANT = 0.05
NUM_PARTS = 4


def optimum_and_random() -> tuple[float, float]:
    """Exact values of the start within the horizon: of the best policy, and of a uniformly random one."""
    env = gymnasium.make("FrozenLake-v1", is_slippery=True)
    table = env.unwrapped.P  # type: ignore[attr-defined]
    env.close()
    best = dict.fromkeys(table, 0.0)
    uniform = dict.fromkeys(table, 0.0)
    for _ in range(HORIZON):

        def value(state: int, action: int, after: dict[int, float]) -> float:
            return sum(p * (r + (0.0 if ended else after[s])) for p, s, r, ended in table[state][action])

        best, uniform = (
            {s: max(value(s, a, best) for a in table[s]) for s in table},
            {s: sum(value(s, a, uniform) for a in table[s]) / len(table[s]) for s in table},
        )
    return best[0], uniform[0]


def p_at_least(successes: int, n: int, p: float) -> float:
    """Probability of so many successes or more in n tries."""
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(successes, n + 1))


def play(config: RunConfig) -> list[float]:
    """The returns of a run's episodes."""
    with tempfile.TemporaryDirectory() as scratch:
        trajectories = asyncio.run(play_locally(config, Path(scratch)))
    returns = [trajectory.episode.return_ for trajectory in trajectories]
    assert all(value in (0.0, 1.0) for value in returns), [each.episode.failure for each in trajectories]
    return [value for value in returns if value is not None]


def play_in_parts(num_episodes: int, *overrides: str) -> list[float]:
    """As `play`, on every core; each part has a seed of its own, whatever the number of cores."""

    def play_part(part: int) -> list[float]:
        settings = [f"seed={part}", f"episodes={num_episodes // NUM_PARTS}", *overrides]
        command = [sys.executable, __file__, *settings]  # a process each: threads would share one interpreter
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    with ThreadPoolExecutor(min(NUM_PARTS, os.cpu_count() or 1)) as pool:
        return [value for returns in pool.map(play_part, range(NUM_PARTS)) for value in returns]


def test_the_exact_values_are_the_known_ones() -> None:
    assert optimum_and_random() == (pytest.approx(0.74419, abs=1e-5), pytest.approx(0.01394, abs=1e-5))


@pytest.mark.slow
def test_a_search_beats_random_play_and_never_the_optimum() -> None:
    optimum, uniform = optimum_and_random()
    returns = play_in_parts(300)
    successes = int(sum(returns))
    assert len(returns) == 300
    assert p_at_least(successes, 300, uniform) < SIGNIFICANT, f"{successes} of 300: no better than random"
    assert p_at_least(successes, 300, optimum) > SIGNIFICANT, f"{successes} of 300: better than the optimum"


@pytest.mark.slow
def test_a_search_that_inherits_randomness_sees_the_future() -> None:
    optimum, _ = optimum_and_random()
    returns = play_in_parts(16, "search.randomness=inherit")
    assert p_at_least(int(sum(returns)), 16, optimum) < SIGNIFICANT, f"{sum(returns)} of 16"


@pytest.mark.process
def test_the_process_engine_plays_the_same_episodes_as_inline(tmp_path: Path) -> None:
    shorter = ["episodes=3", "search.simulations=40", "max_steps=8"]
    played = []
    for engine in ("inline", "process"):
        config = load_config(CONFIG, [*shorter, f"engine.kind={engine}"])
        played.append([comparable(each) for each in asyncio.run(play_locally(config, tmp_path))])
    assert played[0] == played[1]
    assert {each["episode"]["failure"] for each in played[0]} == {None}
    assert sum(len(each["nodes"]) for each in played[0]) > 100


if __name__ == "__main__":
    print(json.dumps(play(load_config(CONFIG, sys.argv[1:]))))
