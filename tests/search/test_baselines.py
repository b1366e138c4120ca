"""Best-of-n, beam, sequential revision and breadth-first on worlds small enough to say what they must do."""

from __future__ import annotations

import itertools
import random

import pytest
from random_worlds import World, config, drive

from rollout.search.base import OPEN_ENDED, NodeInfo, Outcome
from rollout.search.factory import make_search


class Binary(World):
    """A full binary tree; a state is its index in the heap, its value what `values` says."""

    def __init__(self, values: dict[int, float] | None = None, depth: int = 10, actions: int = 2) -> None:
        super().__init__(0)
        object.__setattr__(self, "values", values or {})
        object.__setattr__(self, "last", 2**depth)
        object.__setattr__(self, "actions", actions)

    def info(self, state: int) -> NodeInfo:
        return NodeInfo(self.actions, self.values.get(state, 0.0))

    def outcome(self, state: int, action: int, seed: int) -> tuple[int, Outcome]:
        after = 2 * state + 1 + action
        return after, Outcome(self.values.get(after, 0.0), self.info(after), after >= self.last)


def run(world: World, **settings: object):
    order: list[int] = []
    search = make_search(config(**{"wave": 1, **settings}), world.info(0), 0)
    states = {0: 0}
    while not search.done:
        for trial in search.ask(1):
            states[trial.trial_id], told = world.outcome(states[trial.source], trial.action, trial.seed)
            order.append(states[trial.trial_id])
            search.tell(trial.trial_id, told)
    return search, order


def test_breadth_first_reaches_states_level_by_level() -> None:
    _, order = run(Binary(), algorithm="breadth_first", simulations=14)
    assert sorted(order[:2]) == [1, 2]
    assert sorted(order[2:6]) == [3, 4, 5, 6]
    assert sorted(order[6:14]) == list(range(7, 15))


def test_beam_goes_on_from_the_best_of_each_depth() -> None:
    values = {1: 0.1, 2: 0.2, 3: 5.0, 5: 1.0, 6: 2.0}
    search, order = run(Binary(values), algorithm="beam", width=1, simulations=6)
    assert sorted(order[:2]) == [1, 2]
    assert sorted(order[2:4]) == [5, 6]  # below 2, not below 1, though 3 would have been best
    assert sorted(order[4:6]) == [13, 14]
    assert search.best() == 1
    _, wide = run(Binary(values), algorithm="beam", width=2, simulations=6)
    assert sorted(wide[2:6]) == [3, 4, 5, 6]


def test_beam_scores_the_return_on_the_way_too() -> None:
    class Paid(Binary):
        def outcome(self, state: int, action: int, seed: int) -> tuple[int, Outcome]:
            after, _told = super().outcome(state, action, seed)
            return after, Outcome(10.0 if after == 1 else 0.0, NodeInfo(2, 0.1 if after == 2 else 0.0))

    _, order = run(Paid(), algorithm="beam", width=1, simulations=4)
    assert sorted(order[2:]) == [3, 4]


def test_best_of_n_stays_at_the_root() -> None:
    search, order = run(Binary({1: 0.1, 2: 0.7}), algorithm="best_of_n", simulations=10)
    assert sorted(order) == [1, 2]  # a single outcome per action leaves nothing more to do
    assert search.best() == 1
    drawn, order = run(Binary({1: 0.1, 2: 0.7}), algorithm="best_of_n", simulations=10, outcomes="widening")
    assert (order.count(1), order.count(2)) == (5, 5)
    assert drawn.action_visits() == [5, 5]


def test_revision_goes_on_from_the_newest_state_and_back_where_it_ends() -> None:
    _, order = run(Binary(depth=3), algorithm="revision", simulations=8)
    for before, after in itertools.pairwise(order):
        ended = before >= 8
        assert ended or (after - 1) // 2 == before
    assert len(set(order)) == 8


@pytest.mark.parametrize("algorithm", ["best_of_n", "beam", "revision", "breadth_first"])
def test_open_ended_states_get_one_more_proposal_at_a_time(algorithm: str) -> None:
    world = World(3, open_share=1.0, stochastic=False, end_share=0.0)
    search = make_search(
        config(algorithm=algorithm, simulations=30, branching=3, width=2), NodeInfo(OPEN_ENDED), 0
    )
    drive(search, world, workers=4, order=random.Random(0))
    assert search.stats()["simulations"] == 30
    widths = [len([c for c in row if c >= 0]) for row in search.tree.children]
    expected = {"best_of_n": [30], "revision": [1] * 30}.get(algorithm)
    if expected is not None:
        assert [width for width in widths if width] == expected
    else:
        assert max(widths) == 3


def test_a_tree_that_is_used_up_ends_the_search() -> None:
    search, order = run(Binary(depth=2), algorithm="breadth_first", simulations=100)
    assert search.done
    assert sorted(order) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert search.stats()["simulations"] == 8
