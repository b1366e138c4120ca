"""Small exact models that a search can be measured on: table environments and tic-tac-toe.

A model answers trials as an environment would, from the branch's seed alone, so that figures of the search
are not those of a sandbox. Optimal values come from dynamic programming over the whole model.

Invariant: `outcome(state, action, seed)` is a function of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar, cast

from rollout.config import SearchConfig
from rollout.search.base import ROOT_TRIAL, NodeInfo, Outcome, Search
from rollout.search.factory import make_search
from rollout.types import derive_seed

__all__ = ["Model", "TableModel", "TableState", "TicTacToe", "play_episode", "run_search"]

S = TypeVar("S")
Transitions = Sequence[Sequence[Sequence[tuple[float, int, float, bool]]]]
"""[state][action] -> (probability, next state, reward, terminated), as Gymnasium's `P`."""


class Model(Protocol[S]):
    """What a search is run on."""

    def info(self, state: S) -> NodeInfo:
        """What is known of a state when it enters a tree."""
        ...

    def outcome(self, state: S, action: int, seed: int) -> tuple[S, Outcome]:
        """The next state, and what the search is told of it."""
        ...


def run_search(search: Search, model: Model[S], root: S, *, batch: int = 1) -> dict[int, S]:
    """Runs a search to its end; returns the state that each trial led to."""
    states = {ROOT_TRIAL: root}
    while not search.done:
        for trial in search.ask(batch):
            states[trial.trial_id], outcome = model.outcome(states[trial.source], trial.action, trial.seed)
            search.tell(trial.trial_id, outcome)
    return states


@dataclass(frozen=True, slots=True)
class TableState:
    """A state of a table environment.

    Attributes:
        cell: The environment's own state.
        steps_left: Steps before the time limit.
        generator: State of a random generator that lives in the environment, None under the seeded policy:
            then every draw comes from the branch's seed.
    """

    cell: int
    steps_left: int
    generator: int | None = None


class TableModel:
    """A Gymnasium toy-text environment as a table, with a time limit.

    Args:
        transitions: Its `P`.
        horizon: The time limit, in steps.
        evaluate: Value of a state that is not terminal; None is 0.
    """

    def __init__(
        self,
        transitions: Transitions,
        horizon: int,
        evaluate: Callable[[int, int], float] | None = None,
    ) -> None:
        self._transitions = transitions
        self._num_actions = len(transitions[0])
        self.horizon = horizon
        self._evaluate: Callable[[int, int], float] = evaluate or _zero

    @classmethod
    def of_gymnasium(cls, env_id: str, horizon: int, **kwargs: object) -> TableModel:
        """The table of a registered environment."""
        import gymnasium

        env = gymnasium.make(env_id, **cast("Any", kwargs))
        table = cast("Mapping[int, Mapping[int, Any]]", cast("Any", env.unwrapped).P)
        env.close()
        rows = [
            [
                [(float(p), int(cell), float(r), bool(done)) for p, cell, r, done in table[s][a]]
                for a in sorted(table[s])
            ]
            for s in sorted(table)
        ]
        return cls(rows, horizon)

    def with_evaluator(self, evaluate: Callable[[int, int], float]) -> TableModel:
        """The same environment, with leaf values from `evaluate(cell, steps left)`."""
        return TableModel(self._transitions, self.horizon, evaluate)

    def start(self, cell: int = 0, generator: int | None = None) -> TableState:
        """The first state of an episode."""
        return TableState(cell, self.horizon, generator)

    def info(self, state: TableState) -> NodeInfo:
        """Its value by the evaluator, and a state hash that leaves the generator out."""
        value = self._evaluate(state.cell, state.steps_left)
        return NodeInfo(self._num_actions, value, state_hash=f"{state.cell}:{state.steps_left}")

    def outcome(self, state: TableState, action: int, seed: int) -> tuple[TableState, Outcome]:
        """Draws from the seed, or, where the generator was inherited, from that."""
        generator = state.generator
        if generator is not None:
            seed = generator
            generator = derive_seed(generator, "next")
        cell, reward, terminated = self.draw(state.cell, action, seed)
        after = TableState(cell, state.steps_left - 1, generator)
        truncated = after.steps_left == 0 and not terminated
        return after, Outcome(reward, self.info(after), terminated, truncated)

    def draw(self, cell: int, action: int, seed: int) -> tuple[int, float, bool]:
        """The next cell, the reward, and whether the episode is over."""
        mark = (seed & 0xFFFFFFFF) / 0x100000000
        for probability, after, reward, done in self._transitions[cell][action]:
            mark -= probability
            if mark < 0.0:
                return after, reward, done
        return self._transitions[cell][action][-1][1:]

    def optimal_values(self, discount: float = 1.0) -> list[list[float]]:
        """V*[steps left][cell], by backward induction; 0 when no step is left."""
        values = [[0.0] * len(self._transitions)]
        for _ in range(self.horizon):
            after = values[-1]
            values.append(
                [max(self._action_value(row, after, discount) for row in rows) for rows in self._transitions]
            )
        return values

    def policy_value(self, choose: Callable[[TableState], int], start: int = 0) -> float:
        """The exact undiscounted return, from `start` on, of a policy that is a function of the state."""
        values = [0.0] * len(self._transitions)
        for steps_left in range(1, self.horizon + 1):
            after = values
            values = [
                0.0
                if all(done and cell == here for row in actions for _, cell, _, done in row)  # never left
                else self._action_value(actions[choose(TableState(here, steps_left))], after, 1.0)
                for here, actions in enumerate(self._transitions)
            ]
        return values[start]

    def random_value(self, start: int = 0) -> float:
        """The exact undiscounted return, from `start` on, of uniformly random play."""
        values = [0.0] * len(self._transitions)
        for _ in range(self.horizon):
            after = values
            values = [
                sum(self._action_value(row, after, 1.0) for row in rows) / len(rows)
                for rows in self._transitions
            ]
        return values[start]

    @staticmethod
    def _action_value(
        row: Sequence[tuple[float, int, float, bool]], after: Sequence[float], discount: float
    ) -> float:
        return sum(p * (r + (0.0 if done else discount * after[cell])) for p, cell, r, done in row)


def play_episode(model: TableModel, config: SearchConfig, start: TableState, seed: int) -> float:
    """The undiscounted return of one episode, with a search before every move and a fresh draw for it."""
    state, total = start, 0.0
    for t in range(state.steps_left):
        search = make_search(config, model.info(state), derive_seed(seed, t, "search"))
        run_search(search, model, state, batch=config.wave)
        state, outcome = model.outcome(state, search.best(), derive_seed(seed, t, "move"))
        total += outcome.reward
        if outcome.terminated:
            break
    return total


def _zero(cell: int, steps_left: int) -> float:
    return 0.0


Board = tuple[int, ...]
"""Nine cells from the mover's side: 1 own, -1 the other's, 0 free."""

LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))


class TicTacToe:
    """Tic-tac-toe: a board is seen from the side that moves, and rewards go to it (discount -1).

    Leaf values are those of one uniformly random playout. The actions of a board are its free cells, in
    order, so their number differs from board to board.
    """

    start: Board = (0,) * 9

    def info(self, state: Board) -> NodeInfo:
        """The number of free cells; the value is 0."""
        return NodeInfo(max(1, state.count(0)), 0.0, state_hash="".join("-.+"[c + 1] for c in state))

    def outcome(self, state: Board, action: int, seed: int) -> tuple[Board, Outcome]:
        """Plays a free cell; a leaf is valued by a random playout from the seed."""
        after, reward, is_over = self.play(state, action)
        info = self.info(after)
        value = 0.0 if is_over else self._playout(after, seed)
        node = NodeInfo(info.num_actions, value, state_hash=info.state_hash)
        return after, Outcome(reward, node, terminated=is_over, discount=-1.0, proven=is_over)

    @staticmethod
    def free(board: Board) -> list[int]:
        """The free cells."""
        return [cell for cell, mark in enumerate(board) if mark == 0]

    @classmethod
    def play(cls, board: Board, action: int) -> tuple[Board, float, bool]:
        """The board from the other side, the mover's reward, and whether the game is over."""
        cell = cls.free(board)[action]
        after = tuple(1 if i == cell else mark for i, mark in enumerate(board))
        won = any(all(after[i] == 1 for i in line) for line in LINES)
        return tuple(-mark for mark in after), float(won), won or 0 not in after

    @classmethod
    def _playout(cls, board: Board, seed: int) -> float:
        """The return of a random game, for the side that moves on `board`."""
        sign, value = 1.0, 0.0
        is_over = False
        for ply in range(9):
            if is_over:
                break
            action = derive_seed(seed, ply) % len(cls.free(board))
            board, reward, is_over = cls.play(board, action)
            value += sign * reward
            sign = -sign
        return value

    @classmethod
    def optimal_value(cls, board: Board) -> float:
        """The game's value for the side that moves, by full enumeration."""
        return _negamax(board)


@cache
def _negamax(board: Board) -> float:
    best = -1.0
    for action in range(len(TicTacToe.free(board))):
        after, reward, is_over = TicTacToe.play(board, action)
        best = max(best, reward if is_over else -_negamax(after))
    return best
