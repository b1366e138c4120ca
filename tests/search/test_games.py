"""Quality of play on known games, through the same interface as everything else."""

from __future__ import annotations

import random
from math import sqrt

import pytest
from random_worlds import config

from rollout.commands.bench_models import TableModel, TicTacToe, play_episode, run_search
from rollout.search.factory import make_search
from rollout.types import derive_seed

HONEST = {"outcomes": "widening", "outcome_k": 2.0, "outcome_alpha": 0.85, "backup": "expectation", "wave": 1}


@pytest.fixture(scope="module")
def lake() -> TableModel:
    model = TableModel.of_gymnasium("FrozenLake-v1", 100, is_slippery=True)
    values = model.optimal_values()
    return model.with_evaluator(lambda cell, steps_left: values[steps_left][cell])


def test_optima_by_dynamic_programming() -> None:
    slippery = TableModel.of_gymnasium("FrozenLake-v1", 100, is_slippery=True)
    assert slippery.optimal_values()[100][0] == pytest.approx(0.74419, abs=1e-5)
    assert slippery.optimal_values(0.99)[100][0] == pytest.approx(0.52228, abs=1e-5)
    big = TableModel.of_gymnasium("FrozenLake-v1", 200, is_slippery=True, map_name="8x8")
    assert big.optimal_values()[200][0] == pytest.approx(0.91322, abs=1e-5)
    dry = TableModel.of_gymnasium("FrozenLake-v1", 100, is_slippery=False)
    assert dry.optimal_values()[100][0] == 1.0
    cliff = TableModel.of_gymnasium("CliffWalking-v1", 100)
    assert cliff.optimal_values()[100][36] == -13.0


@pytest.mark.slow
def test_an_honest_search_on_slippery_ice_is_good_and_never_too_good(lake: TableModel) -> None:
    settings = config(**HONEST, simulations=200, evaluation_weight=8)
    returns = [play_episode(lake, settings, lake.start(), seed) for seed in range(40)]
    mean, deviation = sum(returns) / 40, sqrt(0.744 * 0.256 / 40)
    assert mean > 0.3  # random play gets 0.014, UCT with the mean backup and this evaluator 0.4
    assert mean < 0.744 + 3.5 * deviation


def test_the_expectation_comes_near_the_optimum_at_the_root(lake: TableModel) -> None:
    search = make_search(config(**HONEST, simulations=3000, evaluation_weight=8), lake.info(lake.start()), 1)
    run_search(search, lake, lake.start())
    assert search.root_value() == pytest.approx(0.744, abs=0.02)


@pytest.mark.parametrize("seed", range(10))
def test_the_cliff_is_walked_around_in_thirteen_steps(seed: int) -> None:
    """With 64 simulations a move, and the distance to the goal as the evaluator."""
    model = TableModel.of_gymnasium("CliffWalking-v1", 100)
    model = model.with_evaluator(lambda cell, _: -float(abs(cell // 12 - 3) + abs(cell % 12 - 11)))
    settings = config(simulations=64, wave=1, normalise="tree", backup="max", evaluation_weight=1)
    assert play_episode(model, settings, model.start(36), seed) == -13.0


def play_against_chance(seed: int, **settings: object) -> float:
    """The search's result as the second player: 1 won, 0 drawn, -1 lost."""
    game, rng = TicTacToe(), random.Random(seed)
    board, sign, is_over, result = game.start, 1.0, False, 0.0
    while not is_over:
        if sign > 0:
            action = rng.randrange(len(game.free(board)))
        else:
            search = make_search(config(**settings), game.info(board), derive_seed(seed, board.count(0)))
            run_search(search, game, board)
            action = search.best()
        board, reward, is_over = game.play(board, action)
        result -= sign * reward
        sign = -sign
    return result


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["uct", "puct"])
def test_tic_tac_toe_is_never_lost_to_a_random_player(algorithm: str) -> None:
    results = [play_against_chance(s, algorithm=algorithm, simulations=300, wave=1) for s in range(12)]
    assert min(results) >= 0.0
    assert sum(results) >= 6


def test_proofs_solve_endgames_exactly() -> None:
    game, rng = TicTacToe(), random.Random(0)
    for seed in range(25):
        board = game.start
        for _ in range(4):
            board, _, is_over = game.play(board, rng.randrange(len(game.free(board))))
            assert not is_over
        search = make_search(
            config(simulations=5000, wave=1, proofs=True, return_bounds=(-1, 1)), game.info(board), seed
        )
        run_search(search, game, board)
        assert search.done
        assert search.stats()["simulations"] < 5000  # it knew that it was done
        assert search.root_value() == game.optimal_value(board)
        after, reward, is_over = game.play(board, search.best())
        assert (reward if is_over else -game.optimal_value(after)) == game.optimal_value(board)


@pytest.mark.parametrize(("wave", "loss"), [(8, 0.05), (32, 0.08)])
def test_waves_cost_little_quality(lake: TableModel, wave: int, loss: float) -> None:
    """Root values after equal simulations, in waves and one by one."""

    def value(size: int, seed: int) -> float:
        settings = config(**{**HONEST, "wave": size}, simulations=1000, evaluation_weight=8)
        search = make_search(settings, lake.info(lake.start()), seed)
        run_search(search, lake, lake.start(), batch=size)
        return search.root_value()

    for seed in range(3):
        assert value(wave, seed) == pytest.approx(value(1, seed), abs=loss)
