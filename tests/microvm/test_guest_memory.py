"""Which pages are private is asked of the kernel about this very process, with a memory file as the base."""

import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import CheckpointError
from rollout.sandbox.microvm.machine import GUEST_PAGE_BYTES
from rollout.sandbox.microvm.memory import GuestMemory, has_pagemap_scan

NUM_PAGES = 16384
SIZE_BYTES = NUM_PAGES * GUEST_PAGE_BYTES


class Mapping:
    """A private mapping of a memory file, as a VMM has of its base."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("base")
        os.ftruncate(self.fd, SIZE_BYTES)
        self.map = mmap.mmap(self.fd, SIZE_BYTES, flags=mmap.MAP_PRIVATE)

    def memory(self, *, use_scan: bool) -> GuestMemory:
        status = os.fstat(self.fd)
        file = (status.st_dev, status.st_ino)
        return GuestMemory.find(os.getpid(), file, SIZE_BYTES, use_scan=use_scan)

    def write(self, page: int, byte: int) -> None:
        self.map[page * GUEST_PAGE_BYTES] = byte

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


@pytest.fixture
def mapping() -> Iterator[Mapping]:
    mapping = Mapping()
    yield mapping
    mapping.close()


ways = pytest.mark.parametrize(
    "use_scan",
    [
        pytest.param(
            True, marks=pytest.mark.skipif(not has_pagemap_scan(), reason="no PAGEMAP_SCAN before 6.7")
        ),
        False,
    ],
)


@ways
def test_written_pages_are_private_and_read_ones_are_not(mapping: Mapping, use_scan: bool) -> None:
    for page in (0, 5, 6, 7, 100, NUM_PAGES - 1):
        mapping.write(page, 1)
    for page in (3, 200):
        assert mapping.map[page * GUEST_PAGE_BYTES] == 0
    assert mapping.memory(use_scan=use_scan).private_pages().tolist() == [0, 5, 6, 7, 100, NUM_PAGES - 1]


@ways
def test_more_regions_than_one_call_returns(mapping: Mapping, use_scan: bool) -> None:
    for page in range(0, NUM_PAGES, 3):
        mapping.write(page, 1)
    found = mapping.memory(use_scan=use_scan).private_pages()
    assert found.tolist() == list(range(0, NUM_PAGES, 3))


@pytest.mark.skipif(not has_pagemap_scan(), reason="no PAGEMAP_SCAN before 6.7")
@settings(max_examples=40, deadline=None)
@given(pages=st.sets(st.integers(0, NUM_PAGES - 1), max_size=3000))
def test_both_ways_agree(pages: set[int]) -> None:
    mapping = Mapping()
    try:
        for page in pages:
            mapping.write(page, 1)
        scanned = mapping.memory(use_scan=True).private_pages()
        assert scanned.tolist() == mapping.memory(use_scan=False).private_pages().tolist() == sorted(pages)
    finally:
        mapping.close()


@settings(max_examples=20, deadline=None)
@given(pages=st.sets(st.integers(0, NUM_PAGES - 1), min_size=1, max_size=3000))
def test_what_is_written_is_read_back(pages: set[int]) -> None:
    numbers = np.array(sorted(pages), np.uint32)
    content = np.random.default_rng(len(pages)).integers(0, 256, (len(numbers), GUEST_PAGE_BYTES), np.uint8)
    mapping = Mapping()
    try:
        memory = mapping.memory(use_scan=has_pagemap_scan())
        memory.write(numbers, content)
        assert np.array_equal(memory.read(numbers), content)
        assert memory.private_pages().tolist() == numbers.tolist()
        base = os.pread(mapping.fd, GUEST_PAGE_BYTES, int(numbers[0]) * GUEST_PAGE_BYTES)
        assert not any(base), "a private write reached the base"
    finally:
        mapping.close()


def test_a_process_that_does_not_map_the_base() -> None:
    with pytest.raises(CheckpointError, match="does not map its base"):
        GuestMemory.find(os.getpid(), (0, 1), SIZE_BYTES, use_scan=False)


def test_a_process_that_is_gone() -> None:
    memory = GuestMemory(2**22 - 1, 0, SIZE_BYTES, use_scan=False)
    with pytest.raises(CheckpointError, match="page map"):
        memory.private_pages()
    with pytest.raises(CheckpointError, match="No such process"):
        memory.read(np.array([1], np.uint32))
