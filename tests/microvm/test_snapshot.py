import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import CheckpointError
from rollout.sandbox.microvm.machine import GUEST_PAGE_BYTES
from rollout.sandbox.microvm.memory import RawState
from rollout.sandbox.microvm.snapshot import MAX_BLOCKS, PageBlock, RawCache, Snapshot

CACHE_BYTES = 1 << 20
BASE = np.random.default_rng(7).integers(0, 256, (64, GUEST_PAGE_BYTES), np.uint8)
BASE[:8] = 0  # a page that nobody had used
BASE_PAGES = np.concatenate([BASE, np.zeros((64, GUEST_PAGE_BYTES), np.uint8)])


def raw_state(contents: dict[int, int]) -> RawState:
    """A machine whose page n is filled with words derived from contents[n]."""
    numbers = np.array(sorted(contents), np.uint32)
    pages = np.zeros((len(numbers), GUEST_PAGE_BYTES), np.uint8)
    for row, number in enumerate(numbers.tolist()):
        pages[row] = np.random.default_rng(contents[number]).integers(0, 256, GUEST_PAGE_BYTES, np.uint8)
    return RawState(b"devices", numbers, pages, pause_s=0.0)


def lineage(states: Sequence[dict[int, int]], cache: RawCache) -> list[Snapshot]:
    snapshots: list[Snapshot] = []
    origin = Snapshot.at_base(b"devices")
    for state in states:
        origin = Snapshot.of(raw_state(state), origin, cache, BASE_PAGES)
        snapshots.append(origin)
    return snapshots


changes = st.dictionaries(st.integers(0, 60), st.integers(0, 5), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(changes, min_size=1, max_size=2 * MAX_BLOCKS + 3), cache_pages=st.integers(0, 300))
def test_every_snapshot_of_a_lineage_is_whole(steps: list[dict[int, int]], cache_pages: int) -> None:
    state: dict[int, int] = {}
    states = [state := {**state, **step} for step in steps]
    cache = RawCache(cache_pages * GUEST_PAGE_BYTES)
    for snapshot, expected in zip(lineage(states, cache), states, strict=True):
        assert snapshot.page_numbers.tolist() == sorted(expected)
        assert np.array_equal(snapshot.unpack_pages(cache, BASE_PAGES), raw_state(expected).pages)
        assert len(snapshot.blocks) <= MAX_BLOCKS
        assert snapshot.unpack_device_state() == b"devices"


def test_a_child_stores_only_what_changed() -> None:
    parent_state = dict.fromkeys(range(100), 1)
    for number in parent_state:
        parent_state[number] = number
    parent, child = lineage([parent_state, {**parent_state, 7: 1000}], RawCache(CACHE_BYTES))
    assert sum(block.num_pages for block in child.blocks) == 101
    assert child.blocks[0] is parent.blocks[0]
    assert child.blocks[1].num_pages == 1
    assert child.own_bytes < parent.own_bytes / 10


def test_a_child_outlives_its_discarded_parent() -> None:
    cache = RawCache(0)
    snapshots = lineage([{1: 1}, {1: 1, 2: 2}], cache)
    child = snapshots.pop()
    snapshots.clear()
    assert np.array_equal(child.unpack_pages(cache, BASE_PAGES), raw_state({1: 1, 2: 2}).pages)


def damaged(block: PageBlock) -> PageBlock:
    middle = len(block.compressed) // 2
    flipped = bytes([block.compressed[middle] ^ 0x40])
    compressed = block.compressed[:middle] + flipped + block.compressed[middle + 1 :]
    return dataclasses.replace(block, compressed=compressed)


@pytest.mark.parametrize(
    "harm",
    [
        damaged,
        lambda block: dataclasses.replace(block, compressed=block.compressed[:-9]),
        lambda block: dataclasses.replace(block, compressed=b""),
        lambda block: dataclasses.replace(block, page_numbers=np.arange(len(block.page_numbers) + 1)),
        lambda block: dataclasses.replace(
            block, compressed=PageBlock.of(block.page_numbers, BASE[: block.num_pages], BASE_PAGES).compressed
        ),
    ],
    ids=["altered", "truncated", "empty", "short", "swapped"],
)
def test_a_damaged_block_is_refused(harm) -> None:
    [snapshot] = lineage([{1: 1, 2: 2}], RawCache(0))
    broken = dataclasses.replace(snapshot, blocks=tuple(harm(block) for block in snapshot.blocks))
    with pytest.raises(CheckpointError, match="damaged"):
        broken.unpack_pages(RawCache(0), BASE_PAGES)


def test_damaged_device_state_is_refused() -> None:
    snapshot = dataclasses.replace(Snapshot.at_base(b"devices"), device_state=b"garbage")
    with pytest.raises(CheckpointError, match="damaged"):
        snapshot.unpack_device_state()


def memory_of(contents: dict[int, int]) -> dict[int, bytes]:
    raw = raw_state(contents)
    written = dict(zip(raw.page_numbers.tolist(), raw.pages, strict=True))
    return {number: written.get(number, BASE_PAGES[number]).tobytes() for number in range(len(BASE_PAGES))}


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(changes, min_size=2, max_size=MAX_BLOCKS + 3), data=st.data())
def test_changes_lead_from_anywhere_to_anywhere(steps: list[dict[int, int]], data: st.DataObject) -> None:
    state: dict[int, int] = {}
    states = [state := {**state, **step} for step in steps]
    cache = RawCache(CACHE_BYTES)
    snapshots = [Snapshot.at_base(b"devices"), *lineage(states, cache)]
    states = [{}, *states]
    places = st.integers(0, len(states) - 1)
    now, then = data.draw(places), data.draw(places)
    read = raw_state(states[now])
    for numbers, pages in (
        snapshots[then].changes_since(snapshots[now], cache, BASE_PAGES),
        snapshots[then].changes_from(read.page_numbers, read.pages, cache, BASE_PAGES),
    ):
        assert (np.diff(numbers.astype(np.int64)) > 0).all()
        memory = memory_of(states[now])
        memory.update({number: page.tobytes() for number, page in zip(numbers.tolist(), pages, strict=True)})
        assert memory == memory_of(states[then])


def test_pages_that_hold_what_the_base_holds_are_left_out() -> None:
    raw = raw_state({1: 1, 9: 9, 20: 20})
    raw.pages[1] = BASE_PAGES[9]
    snapshot = Snapshot.of(raw, None, RawCache(CACHE_BYTES), BASE_PAGES)
    assert snapshot.page_numbers.tolist() == [1, 20]


def test_a_changed_word_takes_few_bytes() -> None:
    raw = raw_state(dict.fromkeys(range(10, 40), 0))
    raw.pages[:] = BASE_PAGES[raw.page_numbers]
    raw.pages[:, 100] += 1
    assert Snapshot.of(raw, None, RawCache(CACHE_BYTES), BASE_PAGES).blocks[0].compressed.__sizeof__() < 2000


def test_the_cache_keeps_its_budget() -> None:
    cache = RawCache(10 * GUEST_PAGE_BYTES)
    lineage([{number: number for number in range(first, first + 4)} for first in range(0, 40, 4)], cache)
    assert cache.size_bytes <= 10 * GUEST_PAGE_BYTES
