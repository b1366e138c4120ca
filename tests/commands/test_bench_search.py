"""The benchmark of the search, on budgets so small that only its bookkeeping is tested."""

from __future__ import annotations

import pytest

from rollout.commands import bench_search
from rollout.commands.bench_models import TableModel, TableState
from rollout.commands.bench_search_quality import (
    cliff_row,
    lake_rows,
    tic_tac_toe_row,
)


def test_a_policy_is_valued_exactly() -> None:
    dry = TableModel.of_gymnasium("FrozenLake-v1", 100, is_slippery=False)
    way = {0: 1, 4: 1, 8: 2, 9: 1, 13: 2, 14: 2}  # down, down, right, down, right, right
    assert dry.policy_value(lambda state: way.get(state.cell, 0)) == 1.0
    assert dry.policy_value(lambda state: 0) == 0.0
    slippery = TableModel.of_gymnasium("FrozenLake-v1", 100, is_slippery=True)
    values = slippery.optimal_values()

    def best(state: TableState) -> int:
        def value(action: int) -> float:
            rows = slippery._transitions[state.cell][action]
            after = values[state.steps_left - 1]
            return sum(p * (r + (0.0 if done else after[cell])) for p, cell, r, done in rows)

        return max(range(4), key=value)

    assert slippery.policy_value(best) == pytest.approx(values[100][0])


@pytest.mark.slow
def test_quality_rows_have_their_figures_and_rivals() -> None:
    episodes, policy = lake_rows(4, (8,))
    assert episodes.value is not None
    assert episodes.spread is not None
    assert episodes.spread[0] <= episodes.value <= episodes.spread[1]
    assert policy.value is not None
    assert 0.0 < policy.value <= 0.7442
    assert next(rival.name for rival in policy.rivals) == "exact optimum"
    assert len(policy.rivals) == 3
    game = tic_tac_toe_row(2)
    assert game.value == 0.0
    assert "2 won" in game.note or "1 won" in game.note or "0 won" in game.note


def test_the_cliff_row_reaches_its_target() -> None:
    row = cliff_row()
    assert row.reached


def test_more_workers_take_less_virtual_time() -> None:
    for deterministic in (True, False):
        one, eight = (bench_search._makespan(w, deterministic=deterministic, seed=0) for w in (1, 8))
        assert 8.0 >= one / eight > 4.0
