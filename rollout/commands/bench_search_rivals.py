"""What the search stands beside: public Python tree searches, on what each of them can play.

They are optional (`pip install 'rollout[bench]'`); one that is not installed is a reason instead of a figure.
All rates are simulations a second of CPU time, on one thread, measured in the same run as our own.

Not guaranteed: equal work. gymcts copies its environment and plays out at random; TreeQuest has no
environment, its states here are zeros and its scores random; OpenSpiel plays tic-tac-toe with random
playouts.
"""

# The rivals come without type stubs.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import io
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["INSTALL", "RIVALS", "openspiel_games"]

INSTALL = "not installed: pip install 'rollout[bench]'"


def gymcts_rate() -> float:
    """Of gymcts on FrozenLake, by deep copies of the environment."""
    import gymnasium
    from gymcts.gymcts_agent import GymctsAgent
    from gymcts.gymcts_deepcopy_wrapper import DeepCopyMCTSGymEnvWrapper

    env = gymnasium.make("FrozenLake-v1", is_slippery=True)
    env.reset(seed=0)
    agent: Any = GymctsAgent(env=DeepCopyMCTSGymEnvWrapper(env))

    def search(n: int) -> None:
        agent.vanilla_mcts_search(num_simulations=n)

    with contextlib.redirect_stdout(io.StringIO()):
        rate = _rate(search, 200)
    env.close()
    return rate


def treequest_rate(*, inplace: bool) -> float:
    """Of TreeQuest's standard MCTS, which by default copies the tree at every step."""
    from treequest.algos.standard_mcts import StandardMCTS

    algorithm: Any = StandardMCTS()
    rng = random.Random(0)

    def score(state: object) -> tuple[int, float]:
        return 0, rng.random()

    def search(n: int) -> None:
        state = algorithm.init_tree()
        generate = dict.fromkeys(("0", "1", "2", "3"), score)
        for _ in range(n):
            state = algorithm.step(state, generate, inplace=inplace)

    return _rate(search, 1000 if inplace else 300)


def openspiel_rate() -> float:
    """Of OpenSpiel's Python MCTS, tic-tac-toe from the empty board."""
    import pyspiel

    game = pyspiel.load_game("tic_tac_toe")

    def search(n: int) -> None:
        _openspiel_bot(game, n, 0).mcts_search(game.new_initial_state())

    return _rate(search, 1000)


def openspiel_games(games: int, simulations: int) -> tuple[int, int, int]:
    """Won, drawn and lost games of OpenSpiel's MCTS against a random player; it begins every other game."""
    import pyspiel

    game = pyspiel.load_game("tic_tac_toe")
    results: list[float] = []
    for index in range(games):
        rng, bot = random.Random(index), _openspiel_bot(game, simulations, index)
        state: Any = game.new_initial_state()
        while not state.is_terminal():
            is_ours = state.current_player() == index % 2
            state.apply_action(bot.step(state) if is_ours else rng.choice(state.legal_actions()))
        results.append(state.returns()[index % 2])
    return results.count(1.0), results.count(0.0), results.count(-1.0)


RIVALS: dict[str, Callable[[], float]] = {
    "gymcts": gymcts_rate,
    "TreeQuest, in place": lambda: treequest_rate(inplace=True),
    "TreeQuest, default": lambda: treequest_rate(inplace=False),
    "OpenSpiel (Python), tic-tac-toe": openspiel_rate,
}
"""By name: measures its simulations a second; raises ImportError where it is not installed."""


def _openspiel_bot(game: Any, simulations: int, seed: int) -> Any:
    from open_spiel.python.algorithms import mcts

    rng = np.random.RandomState(seed)
    return mcts.MCTSBot(game, 1.4, simulations, mcts.RandomRolloutEvaluator(1, rng), random_state=rng)


def _rate(search: Callable[[int], object], simulations: int) -> float:
    start_s = time.process_time()
    search(simulations)
    return simulations / (time.process_time() - start_s)
