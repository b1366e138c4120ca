"""Whole episodes in microVMs: the same rows as on the other engines, and a search that wins."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rollout.config import ImageConfig, load_config
from rollout.runner import play_locally
from rollout.sandbox.engines import what_is_missing
from rollout.testing import comparable
from rollout.trajectory import Trajectory

_missing = what_is_missing("microvm", ImageConfig())
pytestmark = [
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
]
CONFIGS = Path(__file__).parent.parent.parent / "configs"


def play(folder: Path, config: str, *overrides: str) -> list[Trajectory]:
    return asyncio.run(play_locally(load_config(CONFIGS / config, overrides), folder))


@pytest.mark.slow
def test_a_seed_gives_the_same_rows_on_all_engines(tmp_path: Path) -> None:
    small = ["episodes=2", "search.simulations=12", "max_steps=4"]
    played = {
        engine: [
            comparable(each)
            for each in play(tmp_path, "frozenlake-slippery.toml", *small, f"engine.kind={engine}")
        ]
        for engine in ("inline", "process", "microvm")
    }
    assert played["microvm"] == played["inline"]
    assert played["process"] == played["inline"]
    assert {each["episode"]["failure"] for each in played["microvm"]} == {None}
    assert sum(len(each["nodes"]) for each in played["microvm"]) > 30


@pytest.mark.slow
def test_the_search_wins_on_ice_that_is_not_slippery(tmp_path: Path) -> None:
    [trajectory] = play(tmp_path, "frozenlake.toml", "episodes=1", "engine.kind=microvm")
    assert trajectory.episode.return_ == 1.0
    assert 6 <= trajectory.episode.length <= 8
