from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.errors import CapacityError, CheckpointError
from rollout.sandbox.base import Checkpoint
from rollout.sandbox.store import CheckpointStore


def checkpoint(name: str, private_bytes: int = 10) -> Checkpoint:
    return Checkpoint(name, None, "fake", "f", "", private_bytes)


def test_the_least_recently_used_goes_first() -> None:
    store = CheckpointStore(budget_bytes=30)
    for name in "abc":
        assert store.put(checkpoint(name)) == []
    store.get("a")
    assert [gone.id for gone in store.put(checkpoint("d"))] == ["b"]
    assert "b" not in store
    assert store.held_bytes == 30


def test_a_pinned_one_stays_and_counts_pins() -> None:
    store = CheckpointStore(budget_bytes=20)
    store.put(checkpoint("a"))
    store.pin("a")
    store.pin("a")
    store.unpin("a")
    store.put(checkpoint("b"))
    assert [gone.id for gone in store.put(checkpoint("c"))] == ["b"]
    assert store.unpin("a") == []
    assert [gone.id for gone in store.put(checkpoint("d"))] == ["a"]


def test_the_new_one_goes_when_nothing_else_may() -> None:
    store = CheckpointStore(budget_bytes=10)
    store.put(checkpoint("a"))
    store.pin("a")
    assert [gone.id for gone in store.put(checkpoint("b"))] == ["b"]


def test_one_that_may_not_go_is_refused_when_there_is_no_room_for_it() -> None:
    store = CheckpointStore(budget_bytes=25)
    store.put(checkpoint("a"), evictable=False)
    store.put(checkpoint("b"))
    assert [gone.id for gone in store.put(checkpoint("c"), evictable=False)] == ["b"]
    with pytest.raises(CapacityError, match="checkpoint_budget_bytes"):
        store.put(checkpoint("d"), evictable=False)
    assert store.held_bytes == 20
    store.evict("a")
    assert store.put(checkpoint("d"), evictable=False) == []


def test_unknown_ones_are_refused() -> None:
    store = CheckpointStore(budget_bytes=10)
    with pytest.raises(CheckpointError, match="nope is not held"):
        store.get("nope")
    with pytest.raises(CheckpointError, match="nope is not held"):
        store.pin("nope")
    with pytest.raises(CheckpointError, match="nope is not pinned"):
        store.unpin("nope")
    assert store.evict("nope") is None


def test_what_was_over_the_budget_while_pinned_goes_when_it_is_unpinned() -> None:
    store = CheckpointStore(budget_bytes=10)
    assert store.put(checkpoint("a", 30), pin=True) == []
    assert store.held_bytes == 30
    assert [gone.id for gone in store.unpin("a")] == ["a"]
    assert store.held_bytes == 0


def test_what_is_dear_to_make_again_for_its_bytes_stays() -> None:
    store = CheckpointStore(budget_bytes=30)
    store.put(checkpoint("dear", 10), rebuild_s=5.0)
    store.put(checkpoint("large", 20), rebuild_s=5.0)
    assert [gone.id for gone in store.put(checkpoint("cheap", 10), rebuild_s=3.0)] == ["large"]
    assert [gone.id for gone in store.put(checkpoint("next", 20), rebuild_s=9.0)] == ["cheap"]


def test_what_was_used_often_stays_until_it_is_long_ago() -> None:
    store = CheckpointStore(budget_bytes=20)
    store.put(checkpoint("often"), rebuild_s=1.0)
    for _ in range(3):
        store.get("often")
    num_outlived = 0
    for number in range(50):
        gone = {each.id for each in store.put(checkpoint(str(number)), rebuild_s=1.0)}
        if "often" in gone:
            break
        num_outlived += 1
    assert 3 <= num_outlived < 10


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.integers(1, 9)), max_size=300))
def test_what_goes_is_worth_least(actions: list[tuple[int, bool, int]]) -> None:
    store = CheckpointStore(budget_bytes=40)
    worths: dict[str, tuple[float, int]] = {}
    uses: dict[str, int] = {}
    costs: dict[str, int] = {}
    floor = 0.0
    for tick, (number, is_use, cost_s) in enumerate(actions):
        name = str(number)
        if name in store and is_use:
            store.get(name)
            uses[name] += 1
        elif name not in store and not is_use:
            uses[name], costs[name] = 1, cost_s
            worths[name] = (floor + cost_s / 10, tick)
            for gone in store.put(checkpoint(name), rebuild_s=cost_s):
                assert worths[gone.id] == min(worths.values())
                floor = max(floor, worths.pop(gone.id)[0])
            continue
        else:
            continue
        worths[name] = (floor + uses[name] * costs[name] / 10, tick)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "get", "pin", "unpin", "evict"]), st.integers(0, 5), st.integers(0, 20)
        ),
        max_size=60,
    )
)
def test_the_budget_holds_but_for_what_is_pinned(actions: list[tuple[str, int, int]]) -> None:
    store = CheckpointStore(budget_bytes=40)
    sizes: dict[str, int] = {}
    pins: dict[str, int] = {}
    for action, number, size in actions:
        name = str(number)
        if action == "put" and name not in store:
            sizes[name] = size
            for gone in store.put(checkpoint(name, size)):
                assert not pins.get(gone.id)
        elif action == "get" and name in store:
            assert store.get(name).private_bytes == sizes[name]
        elif action == "pin" and name in store:
            store.pin(name)
            pins[name] = pins.get(name, 0) + 1
        elif action == "unpin" and pins.get(name):
            pins[name] -= 1
            store.unpin(name)
        elif action == "evict":
            store.evict(name)
        held = [name for name in sizes if name in store]
        assert store.held_bytes == sum(sizes[name] for name in held)
        assert store.held_bytes <= max(40, sum(sizes[name] for name in held if pins.get(name)))
        assert len(store) == len(held)
