"""Quality of play, for the benchmark of the search: known games, with evaluators that are stated.

FrozenLake 4x4 slippery within 100 steps with exact leaf values, CliffWalking, and tic-tac-toe. "Episodes" are
means of played episodes; "policy" is the exact return of the policy that a search with one seed amounts to,
by dynamic programming over every (cell, steps left), so there is no luck of the dice in it.

Run as a program (`python -m rollout.commands.bench_search_quality GAME < jobs`) it plays a list of jobs,
given and answered in JSON: the benchmark has two such programs play at once.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from math import sqrt
from statistics import fmean
from typing import Any

from rollout.commands.bench_models import Board, TableModel, TableState, TicTacToe, play_episode, run_search
from rollout.commands.bench_row import BenchRow, Rival, at_least, at_most
from rollout.commands.bench_search_rivals import INSTALL, openspiel_games
from rollout.config import SearchConfig
from rollout.search.factory import make_search
from rollout.types import derive_seed

__all__ = [
    "HONEST",
    "cliff_row",
    "exact_lake",
    "lake_rows",
    "policy_returns",
    "search_config",
    "tic_tac_toe_row",
]

OPTIMUM = 0.74419
"""Of FrozenLake 4x4 slippery within 100 steps, by dynamic programming."""
HONEST: dict[str, Any] = {
    "backup": "expectation",
    "outcomes": "widening",
    "outcome_k": 2.0,
    "outcome_alpha": 0.85,
    "evaluation_weight": 8.0,
    "exploration": 0.2,
    "wave": 1,
}
"""UCT for stochastic environments with a good evaluator, whose returns are from 0 to 1."""
PLAIN: dict[str, Any] = {
    **HONEST,
    "outcome_k": 1.0,
    "outcome_alpha": 0.5,
    "evaluation_weight": 0.0,
    "exploration": sqrt(2),
}
"""The same by the published formula alone."""
CLIFF: dict[str, Any] = {"backup": "max", "normalise": "tree", "evaluation_weight": 1.0, "wave": 1}


def search_config(**settings: object) -> SearchConfig:
    """A checked configuration."""
    return SearchConfig.model_validate(settings)


def lake_rows(episodes: int, budgets: tuple[int, ...], exact_up_to: int = 1000) -> Iterator[BenchRow]:
    """FrozenLake at each budget of simulations a move; the policy is valued exactly at the smaller ones."""
    for budget in budgets:
        settings = {**HONEST, "simulations": budget}
        returns = _play("episode", [(settings, seed) for seed in range(episodes)])
        mean, (low, high) = fmean(returns), _interval(fmean(returns), episodes)
        place = "holds" if low <= OPTIMUM <= high else "lies below" if high < OPTIMUM else "lies above"
        yield BenchRow(
            name=f"FrozenLake 4x4 slippery, episodes, {budget:,} simulations a move",
            unit="return",
            value=mean,
            spread=(low, high),
            samples=episodes,
            subject="quality",
            rivals=(Rival("exact optimum", OPTIMUM),),
            note=f"UCT, expectation backup, exact leaf values; the 95% interval {place} the optimum",
        )
        if budget > exact_up_to:
            continue
        rivals = [Rival("exact optimum", OPTIMUM)]
        if budget <= 1000:
            plain, mean_backup = policy_returns(
                [
                    ({**PLAIN, "simulations": budget}, 0),
                    ({**PLAIN, "simulations": budget, "backup": "mean"}, 0),
                ]
            )
            rivals += [Rival("expectation, formula alone", plain), Rival("mean backup", mean_backup)]
        yield BenchRow.of(
            f"FrozenLake 4x4 slippery, policy, {budget:,} simulations a move",
            policy_returns([(settings, seed) for seed in range(2)]),
            "return",
            subject="quality",
            rivals=rivals,
            note="as above, exact return",
        )


def _interval(mean: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a success rate."""
    z = 1.959964
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return centre - half, centre + half


@cache
def exact_lake() -> TableModel:
    """FrozenLake 4x4 slippery within 100 steps, with its optimal values as the evaluator."""
    model = TableModel.of_gymnasium("FrozenLake-v1", 100, is_slippery=True)
    values = model.optimal_values()
    return model.with_evaluator(lambda cell, steps_left: values[steps_left][cell])


def _play_lake(settings: dict[str, Any], seed: int) -> float:
    lake = exact_lake()
    return play_episode(lake, search_config(**settings), lake.start(), derive_seed("episode", seed))


def policy_returns(jobs: Sequence[tuple[dict[str, Any], int]]) -> list[float]:
    """Exact returns on FrozenLake of the policies that (settings, seed) amount to."""
    return _play("policy", jobs)


def _policy_return(settings: dict[str, Any], seed: int) -> float:
    """Exact return of the policy that a search with a fixed seed amounts to."""
    lake, config = exact_lake(), search_config(**settings)

    def choose(state: TableState) -> int:
        search = make_search(config, lake.info(state), derive_seed(seed, state.cell, state.steps_left))
        run_search(search, lake, state, batch=config.wave)
        return search.best()

    return lake.policy_value(choose)


def cliff_row() -> BenchRow:
    """CliffWalking: how many of ten seeds walk around the cliff without a detour."""
    model = TableModel.of_gymnasium("CliffWalking-v1", 100)
    model = model.with_evaluator(lambda cell, _: -float(abs(cell // 12 - 3) + abs(cell % 12 - 11)))
    returns = [
        play_episode(model, search_config(**CLIFF, simulations=64), model.start(36), seed)
        for seed in range(10)
    ]
    return BenchRow(
        name="CliffWalking, 64 simulations a move: seeds of 10 that return -13",
        unit="seeds",
        value=float(returns.count(-13.0)),
        samples=10,
        subject="quality",
        target=at_least(9),
        note="UCT, max backup, evaluator: distance to the goal as if there were no cliff",
    )


def tic_tac_toe_row(games: int) -> BenchRow:
    """Lost games against a random player."""
    results = _play("tic-tac-toe", [[index] for index in range(games)])
    won, drawn, lost = (results.count(result) for result in (1.0, 0.0, -1.0))
    note = (
        f"{won} won, {drawn} drawn, {lost} lost; UCT, 1,000 simulations, random playouts; starts every other"
    )
    rivals: list[Rival] = []
    try:
        their_won, their_drawn, their_lost = openspiel_games(games, 1000)
        rivals.append(Rival("OpenSpiel", float(their_lost)))
        note += f"; OpenSpiel {their_won} won, {their_drawn} drawn"
    except ImportError:
        note += f"; OpenSpiel {INSTALL}"
    return BenchRow(
        name=f"tic-tac-toe against a random player: games lost of {games}",
        unit="games",
        value=float(lost),
        samples=games,
        subject="quality",
        target=at_most(0),
        rivals=tuple(rivals),
        note=note,
    )


def _play_tic_tac_toe(index: int) -> float:
    """One game's result for the search, which begins the even ones."""
    game, rng = TicTacToe(), random.Random(index)
    board: Board = game.start
    result, is_over, is_ours = 0.0, False, index % 2 == 0
    while not is_over:
        action = rng.randrange(len(game.free(board)))
        if is_ours:
            config = search_config(simulations=1000, wave=1)
            search = make_search(config, game.info(board), derive_seed(index, board.count(0)))
            run_search(search, game, board)
            action = search.best()
        board, reward, is_over = game.play(board, action)
        result += reward if is_ours else -reward
        is_ours = not is_ours
    return result


_GAMES: dict[str, Callable[..., float]] = {
    "episode": _play_lake,
    "policy": _policy_return,
    "tic-tac-toe": _play_tic_tac_toe,
}


def _play(game: str, jobs: Sequence[Sequence[object]]) -> list[float]:
    """Plays all jobs, in two processes; the results are in the order of the jobs."""
    command = [sys.executable, "-m", __name__, game]
    halves = [jobs[0::2], jobs[1::2]]
    results = [0.0] * len(jobs)
    with ExitStack() as stack:
        players = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in halves
        ]
        stack.callback(lambda: [player.kill() for player in players])
        for player, half in zip(players, halves, strict=True):
            assert player.stdin is not None
            with player.stdin:
                json.dump(half, player.stdin)
        for index, player in enumerate(players):
            assert player.stdout is not None
            results[index::2] = json.loads(player.stdout.read())
    return results


if __name__ == "__main__":
    print(json.dumps([_GAMES[sys.argv[1]](*job) for job in json.load(sys.stdin)]))
