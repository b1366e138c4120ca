"""What ways of reaching a state cost and save: sums, medians, records."""

from __future__ import annotations

from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.sandbox.economics import WINDOW, Economics, RunningMedian, WayCost, add_ways, ways_record


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=16))
def test_a_running_median_is_exact_while_there_are_few(numbers: list[float]) -> None:
    running = RunningMedian()
    for number in numbers:
        running.add(number)
    assert running.value == median(numbers)


def test_a_running_median_forgets_what_is_long_ago() -> None:
    running = RunningMedian()
    assert running.value == 0.0
    for number in [1.0] * 1000 + [5.0] * (2 * WINDOW):
        running.add(number)
    assert running.value == 5.0


def test_a_clone_saves_a_reset_and_the_steps_since() -> None:
    economics = Economics()
    economics.add("open", 2.0)
    economics.add("step", 0.5)
    economics.cloned(0.3, 3, num_steps=4)
    assert economics.ways == {"clone": WayCost(3, 0.3, 3 * (2.0 + 4 * 0.5) - 0.3, 0.3 / 3)}


def test_a_clone_that_costs_more_than_it_saves_says_so() -> None:
    economics = Economics()
    economics.add("open", 0.1)
    economics.cloned(1.0, 1, num_steps=0)
    assert economics.ways["clone"].saved_s == pytest.approx(-0.9)


def test_replays_are_counted_by_where_they_began() -> None:
    economics = Economics()
    economics.add("open", 1.0)
    economics.add("step", 0.25)
    economics.replayed(0.5, 8, from_reset=False)
    economics.replayed(3.0, 8, from_reset=True)
    assert economics.ways["replay"] == WayCost(1, 0.5, 1.0 + 8 * 0.25 - 0.5, 0.5)
    assert economics.ways["reset"] == WayCost(1, 3.0, 0.0, 3.0)


def test_accounts_add_up_over_hosts_and_sessions() -> None:
    first = {"clone": WayCost(2, 1.0, 3.0)}
    second = {"clone": WayCost(1, 0.5, -1.0), "reset": WayCost(1, 1.0)}
    total = add_ways(first, second)
    assert total == {"clone": WayCost(3, 1.5, 2.0), "reset": WayCost(1, 1.0)}
    assert ways_record(second, ways_record(first, {})) == ways_record(total, {})
    assert first == {"clone": WayCost(2, 1.0, 3.0)}


def test_medians_of_several_hosts_weigh_by_their_counts() -> None:
    first, second = {"clone": WayCost(3, 3.0, 0.0, 1.0)}, {"clone": WayCost(1, 5.0, 0.0, 5.0)}
    unknown = {"clone": WayCost(100, 1.0, 0.0)}
    assert add_ways(first, second)["clone"].median_s == pytest.approx(2.0)
    assert add_ways(add_ways(first, unknown), {})["clone"].median_s == 1.0
    before_medians = {"clone": {"count": 4, "seconds": 4.0, "saved_s": 1.0}}
    assert ways_record(first, before_medians)["clone"] == {
        "count": 7,
        "seconds": 7.0,
        "saved_s": 1.0,
        "median_s": 1.0,
    }


def test_a_deferred_save_is_a_way_of_its_own() -> None:
    economics = Economics()
    economics.deferred(0.5, 0.25)
    assert economics.ways == {"defer": WayCost(1, 0.5, 0.25, 0.5)}


def test_making_a_state_again_costs_what_it_did_or_at_least_a_clone_and_a_step() -> None:
    economics = Economics()
    assert economics.rebuild_s(from_reset=False) == 0.0
    economics.add("open", 4.0)
    economics.cloned(1.0, 1, num_steps=0)
    economics.add("step", 0.5)
    assert economics.rebuild_s(from_reset=True) == 4.0
    assert economics.rebuild_s(from_reset=False) == 1.5
    economics.replayed(3.0, 1, from_reset=False)
    assert economics.rebuild_s(from_reset=False) == 3.0
