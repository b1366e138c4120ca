"""Intervals: against published values, and against what they promise."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.report.stats import (
    difference,
    estimate,
    paired_difference,
    running_estimates,
    t_quantile,
)

TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365, 10: 2.228, 29: 2.045, 30: 2.042, 120: 1.980}
"""97.5% quantiles of Student's t, as tables print them."""


@pytest.mark.parametrize(("freedom", "quantile"), TABLE.items())
def test_t_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-4)


def test_t_quantile_has_no_step_where_its_formula_changes() -> None:
    steps = [t_quantile(freedom) - t_quantile(freedom + 1) for freedom in (99, 100, 101)]
    assert steps[0] > steps[1] > steps[2] > 0
    assert steps[1] == pytest.approx((steps[0] + steps[2]) / 2, rel=1e-3)
    assert t_quantile(10**9) == pytest.approx(1.959964, abs=1e-6)


def test_t_quantile_refuses_no_degrees_of_freedom() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        t_quantile(0)


def test_success_rates_have_wilsons_interval() -> None:
    """Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3: 81 of 263."""
    found = estimate([1.0] * 81 + [0.0] * 182)
    assert found is not None
    assert found.method == "wilson"
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


def test_difference_of_success_rates_has_newcombes_interval() -> None:
    """Newcombe 1998 (Statistics in Medicine 17:873), table II, method 10: 56/70 against 48/80."""
    found = difference([1.0] * 48 + [0.0] * 32, [1.0] * 56 + [0.0] * 14)
    assert found is not None
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))
    assert found.significant


def test_all_wins_are_not_certainty() -> None:
    found = estimate([1.0] * 8)
    assert found is not None
    assert found.low == pytest.approx(0.6756, abs=5e-5)
    assert found.high == 1.0


def test_equal_returns_of_another_kind_give_no_interval() -> None:
    found = estimate([-13.0] * 5)
    assert found is not None
    assert (found.mean, found.low, found.high, found.method) == (-13.0, None, None, "")


@pytest.mark.parametrize("values", [[], [2.5]])
def test_too_few_values_give_no_interval(values: list[float]) -> None:
    found = estimate(values)
    assert (found is None) == (not values)
    if found is not None:
        assert found.low is None


def test_t_intervals_cover_as_often_as_they_say() -> None:
    rng = random.Random(4)
    trials = 3000
    covered = 0
    for _ in range(trials):
        found = estimate([rng.gauss(3.0, 2.0) for _ in range(6)])
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 3.0 <= found.high
    assert 0.94 < covered / trials < 0.96


def test_welch_intervals_cover_as_often_as_they_say() -> None:
    rng = random.Random(5)
    trials = 2000
    covered = 0
    for _ in range(trials):
        found = difference([rng.gauss(1.0, 5.0) for _ in range(5)], [rng.gauss(2.0, 1.0) for _ in range(20)])
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 1.0 <= found.high
    assert 0.935 < covered / trials < 0.975  # rounding the degrees of freedom down errs on the safe side


def test_pairs_take_the_difficulty_of_the_task_out() -> None:
    first: dict[object, float] = {task: 10.0 * task for task in range(10)}
    second = {task: value + 1.0 + 0.1 * (hash(task) % 3) for task, value in first.items()}
    paired = paired_difference(first, second)
    apart = difference(list(first.values()), list(second.values()))
    assert paired is not None
    assert apart is not None
    assert paired.value == pytest.approx(apart.value)
    assert paired.significant
    assert not apart.significant


def test_pairs_without_a_common_key_are_no_pairs() -> None:
    assert paired_difference({1: 0.0}, {2: 1.0}) is None
    assert difference([], [1.0]) is None


@given(st.lists(st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=40))
def test_running_estimates_are_those_of_the_beginnings(values: list[float]) -> None:
    counts = list(range(1, len(values) + 1))
    for count, running in zip(counts, running_estimates(values, counts), strict=True):
        alone = estimate(values[:count])
        assert alone is not None
        assert running.mean == pytest.approx(alone.mean, abs=1e-6)
        assert running.count == count
        if statistics.pvariance(values[:count]) > 1e-6:
            assert running.low == pytest.approx(alone.low, rel=1e-6, abs=1e-3)
            assert running.high == pytest.approx(alone.high, rel=1e-6, abs=1e-3)
