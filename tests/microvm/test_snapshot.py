import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import CheckpointError
from rollout.sandbox.microvm.machine import GUEST_PAGE_BYTES
from rollout.sandbox.microvm.snapshot import MAX_BLOCKS, PageBlock, RawCache, Snapshot
from rollout.sandbox.microvm.vmm import RawState

CACHE_BYTES = 1 << 20


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
        origin = Snapshot.of(raw_state(state), origin, cache)
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
        assert np.array_equal(snapshot.unpack_pages(cache), raw_state(expected).pages)
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
    assert np.array_equal(child.unpack_pages(cache), raw_state({1: 1, 2: 2}).pages)


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
        lambda block: dataclasses.replace(block, num_pages=block.num_pages + 1),
        lambda block: PageBlock(1, PageBlock.of(np.ones((1, 4096), np.uint8)).compressed, block.checksum),
    ],
    ids=["altered", "truncated", "empty", "short", "swapped"],
)
def test_a_damaged_block_is_refused(harm) -> None:
    [snapshot] = lineage([{1: 1, 2: 2}], RawCache(0))
    broken = dataclasses.replace(snapshot, blocks=tuple(harm(block) for block in snapshot.blocks))
    with pytest.raises(CheckpointError, match="damaged"):
        broken.unpack_pages(RawCache(0))


def test_damaged_device_state_is_refused() -> None:
    snapshot = dataclasses.replace(Snapshot.at_base(b"devices"), device_state=b"garbage")
    with pytest.raises(CheckpointError, match="damaged"):
        snapshot.unpack_device_state()


def test_the_cache_keeps_its_budget() -> None:
    cache = RawCache(10 * GUEST_PAGE_BYTES)
    lineage([{number: number for number in range(first, first + 4)} for first in range(0, 40, 4)], cache)
    assert cache.size_bytes <= 10 * GUEST_PAGE_BYTES
