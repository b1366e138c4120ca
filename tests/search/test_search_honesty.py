"""No search sees the future: with `seeded` randomness none beats the optimum, with `inherit` they all do.

The game is to call a fair coin: four flips, one point for each right call, so nothing can be better than 2 of
4 on average. Its generator lives in the state. A search that goes on with it knows every flip.
"""

from __future__ import annotations

from math import sqrt

import pytest
from random_worlds import ALGORITHMS, config

from rollout.commands.bench_models import TableModel, TableState, play_episode
from rollout.types import derive_seed

FLIPS, EPISODES = 4, 100
COIN = TableModel(
    [[[(0.5, 0, 1.0, False), (0.5, 0, 0.0, False)], [(0.5, 0, 0.0, False), (0.5, 0, 1.0, False)]]], FLIPS
)


def mean_return(algorithm: str, outcomes: str, *, inherit: bool) -> float:
    settings = config(algorithm=algorithm, outcomes=outcomes, simulations=20, wave=4)
    total = 0.0
    for episode in range(EPISODES):
        generator = derive_seed("coin", episode) if inherit else None
        total += play_episode(COIN, settings, TableState(0, FLIPS, generator), episode)
    return total / EPISODES


def test_the_optimum_is_half_the_flips() -> None:
    assert COIN.optimal_values()[FLIPS][0] == 2.0


@pytest.mark.parametrize("outcomes", ["single", "widening"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_seeded_never_beats_the_optimum_and_inherit_does(algorithm: str, outcomes: str) -> None:
    deviation = sqrt(FLIPS * 0.25 / EPISODES)
    honest = mean_return(algorithm, outcomes, inherit=False)
    assert abs(honest - 2.0) < 3.5 * deviation
    clairvoyant = mean_return(algorithm, outcomes, inherit=True)
    assert clairvoyant > 2.0 + 10 * deviation
