"""Saving and cloning without an operating system in the way, under KVM and under TCG."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from machines import private_kib

from rollout.config import ImageConfig
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.microvm.snapshot import Snapshot
from rollout.sandbox.microvm.tiny_guest import COUNTER_PAGE, FIRST_WRITTEN_PAGE, TinyGuests, ask
from rollout.sandbox.microvm.vmm import Vmm

_missing = what_is_missing("microvm", ImageConfig())
_has_kvm = os.access("/dev/kvm", os.R_OK | os.W_OK)
pytestmark = [
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
]
DEPTH = 8
# Pages that the guest writes by running: its stack; and, first, its counter.
STACK_PAGE = 0x7BFE // 4096


@pytest.fixture(
    scope="module",
    params=[
        "tcg",
        pytest.param("kvm", marks=pytest.mark.skipif(not _has_kvm, reason="/dev/kvm cannot be opened")),
    ],
)
def guests(request: pytest.FixtureRequest) -> Iterator[TinyGuests]:
    with TinyGuests(request.param) as guests:
        yield guests


def clone(guests: TinyGuests, snapshot: Snapshot) -> Vmm:
    vmm = guests.start()
    guests.become(vmm, snapshot)
    return vmm


def test_a_save_has_exactly_the_pages_that_were_written(guests: TinyGuests) -> None:
    vmm = clone(guests, guests.base)
    try:
        before = guests.save(vmm)
        vmm.resume(10)
        assert ask(vmm.channel, b"w\x05") == ord("w")
        assert ask(vmm.channel, b"w\x21") == ord("w")
        after = guests.save(vmm, before)
    finally:
        vmm.kill()
    assert set(before.page_numbers.tolist()) <= {STACK_PAGE}
    new = set(after.page_numbers.tolist()) - set(before.page_numbers.tolist()) - {STACK_PAGE}
    assert new == {FIRST_WRITTEN_PAGE + 0x05, FIRST_WRITTEN_PAGE + 0x21}
    [place] = [i for i, number in enumerate(after.page_numbers) if number == FIRST_WRITTEN_PAGE + 5]
    page = after.unpack_pages(guests.cache, guests.pages)[place]
    assert page[0] == 5
    assert not page[1:].any()


def test_forks_of_forks_go_on_where_they_were(guests: TinyGuests) -> None:
    snapshots = [guests.base]
    for depth in range(1, DEPTH + 1):
        vmm = clone(guests, snapshots[-1])
        try:
            assert ask(vmm.channel, b"i") == depth
            assert ask(vmm.channel, bytes([ord("w"), depth])) == ord("w")
            snapshots.append(guests.save(vmm, snapshots[-1]))
        finally:
            vmm.kill()
    for depth in (DEPTH, 1, 4):
        vmm = clone(guests, snapshots[depth])
        try:
            assert ask(vmm.channel, b"r") == depth
            expected = {FIRST_WRITTEN_PAGE + page for page in range(1, depth + 1)}
            assert set(snapshots[depth].page_numbers.tolist()) - {STACK_PAGE, COUNTER_PAGE} == expected
        finally:
            vmm.kill()


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "read"])
def test_one_process_becomes_any_of_them(guests: TinyGuests, is_known: bool) -> None:
    vmm = clone(guests, guests.base)
    try:
        snapshots = [guests.base]
        for count in range(1, 5):
            assert ask(vmm.channel, b"i") == count
            snapshots.append(guests.save(vmm, snapshots[-1]))
            vmm.resume(10)
        for count in (2, 4, 0, 1, 3):
            assert ask(vmm.channel, b"w\x30") == ord("w")
            content = guests.save(vmm) if is_known else None
            assert vmm.retire(10)
            guests.become(vmm, snapshots[count], content=content)
            assert ask(vmm.channel, b"r") == count
            [page] = vmm.memory.read(np.array([FIRST_WRITTEN_PAGE + 0x30], np.uint32))
            assert not page.any(), "a page of an earlier life"
    finally:
        vmm.kill()


def test_a_hundred_clones_of_one_running_machine(guests: TinyGuests) -> None:
    source = clone(guests, guests.base)
    clones: list[Vmm] = []
    try:
        ask(source.channel, b"i")
        snapshot = guests.save(source)
        source.resume(10)
        for _ in range(100):
            clones.append(clone(guests, snapshot))
            assert ask(clones[-1].channel, b"i") == 2
            clones[-1].stop(10)
        assert ask(source.channel, b"r") == 1, "the original knows nothing of them"
        for vmm in clones:
            vmm.resume(10)
            assert ask(vmm.channel, b"r") == 2, "and none of the others"
            vmm.stop(10)
        kib = sorted(private_kib(vmm.pid) for vmm in clones)
        assert kib[50] < 24 << 10, "memory of a clone is its own few pages and its VMM's"
    finally:
        for vmm in (source, *clones):
            vmm.kill()
