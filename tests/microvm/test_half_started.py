"""VMMs that are forks of a program which has begun to start: whole machines, apart from each other."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
from machines import check_without_descriptors, own_descriptors, private_kib, source_for

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import BootError
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.microvm import source, starting
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.half_started import HalfStarted
from rollout.sandbox.microvm.machine import BootFiles, MachineShape, Start, qemu_argv
from rollout.sandbox.microvm.memory import has_pagemap_scan
from rollout.sandbox.microvm.memory_file import new_memory_file
from rollout.sandbox.microvm.probe import filters_itself, qemu_binary
from rollout.sandbox.microvm.prototype import Family
from rollout.sandbox.microvm.source import VmmSource
from rollout.sandbox.microvm.spawner import Spawner
from rollout.sandbox.microvm.starting import start_halfway
from rollout.sandbox.microvm.tiny_guest import TinyGuests, ask
from rollout.sandbox.microvm.vmm import Vmm

_missing = what_is_missing("microvm", ImageConfig())
_has_kvm = os.access("/dev/kvm", os.R_OK | os.W_OK)
pytestmark = [
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
]
DEADLINE_S = 30.0
SHAPE = MachineShape("tcg", 64, "qemu64")


@pytest.fixture
def ram_fd() -> Iterator[int]:
    fd = new_memory_file(SHAPE.memory_bytes)
    yield fd
    os.close(fd)


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    spawner = Spawner({}, programs=[qemu_binary("tcg"), "/bin/true"])
    yield spawner
    spawner.close()


@pytest.fixture
def half_started(spawner: Spawner, ram_fd: int) -> Iterator[HalfStarted]:
    found, family = start(spawner, ram_fd)
    yield found
    found.close()
    family.end()


def start(
    spawner: Spawner, ram_fd: int, *, binary: str = qemu_binary("tcg"), timeout_s: float = DEADLINE_S
) -> tuple[HalfStarted, Family]:
    files = BootFiles(binary, filters_itself=filters_itself(binary))
    return start_halfway(spawner, SHAPE, files, ram_fd, use_scan=has_pagemap_scan(), timeout_s=timeout_s)


def wait_for(holds: Callable[[], bool]) -> None:
    give_up_at_s = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < give_up_at_s
        time.sleep(0.01)


def wait_until_alone(half_started: HalfStarted) -> None:
    """Returns once no fork of a program lives, known to us or not."""
    held = psutil.Process(half_started._candidate.vmm.pid)
    family = held.parent()
    assert family is not None
    wait_for(lambda: family.children() == [held])


def test_each_fork_has_a_monitor_and_memory_of_its_own(half_started: HalfStarted, ram_fd: int) -> None:
    other_fd = new_memory_file(SHAPE.memory_bytes)
    vmms = [half_started.fork(fd) for fd in (ram_fd, other_fd)]
    try:
        assert all(vmm.is_dormant for vmm in vmms)
        for vmm in vmms:
            assert vmm.memory.end - vmm.memory.start == SHAPE.memory_bytes, "its own file is mapped"
        vmms[0].kill()
        vmms[1].stop(DEADLINE_S)  # it answers
    finally:
        for vmm in vmms:
            vmm.kill()
        os.close(other_fd)


def test_many_threads_at_once_have_a_fork_each(half_started: HalfStarted, ram_fd: int) -> None:
    vmms: list[Vmm] = []
    threads = [threading.Thread(target=lambda: vmms.append(half_started.fork(ram_fd))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert len({vmm.pid for vmm in vmms}) == 16
        for vmm in vmms:
            vmm.stop(DEADLINE_S)
    finally:
        for vmm in vmms:
            vmm.kill()


def test_forks_live_on_without_it_and_it_says_that_it_is_gone(half_started: HalfStarted, ram_fd: int) -> None:
    vmm = half_started.fork(ram_fd)
    before = own_descriptors()
    try:
        held = psutil.Process(half_started._candidate.vmm.pid)
        held.kill()
        psutil.wait_procs([held], DEADLINE_S)
        assert not half_started.can_fork
        with pytest.raises(BootError, match="cannot be forked"):
            half_started.fork(ram_fd)
        vmm.stop(DEADLINE_S)
        assert own_descriptors() <= before
    finally:
        vmm.kill()


def test_where_descriptors_run_out_nothing_stays_open(half_started: HalfStarted, ram_fd: int) -> None:
    check_without_descriptors(lambda: half_started.fork(ram_fd), 13)
    half_started.fork(ram_fd).kill()
    wait_until_alone(half_started)


def test_a_fork_that_ends_before_it_greets_is_told_and_makes_its_origin_useless(
    half_started: HalfStarted, ram_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = own_descriptors()
    monkeypatch.setattr("rollout.sandbox.microvm.half_started._GO_ON", b"!")
    with pytest.raises(BootError, match=r"the VMM did not start: .* it said: .*Base64"):
        half_started.fork(ram_fd)
    assert not half_started.can_fork
    assert own_descriptors() < before


def test_a_fork_that_comes_late_ends(half_started: HalfStarted, ram_fd: int) -> None:
    held = psutil.Process(half_started._candidate.vmm.pid)
    family = held.parent()
    assert family is not None
    half_started._candidate.control.settimeout(0.3)
    held.suspend()
    with pytest.raises(BootError, match="cannot be forked: timed out"):
        half_started.fork(ram_fd)
    held.resume()
    assert not half_started.can_fork
    wait_for(lambda: not family.children())  # it has no socket any more, and ends too


def test_what_ends_on_its_way_says_why(spawner: Spawner, ram_fd: int) -> None:
    before = own_descriptors()
    with pytest.raises(BootError, match=r"cannot be held while it starts: .* it said|cannot be forked"):
        start(spawner, ram_fd, binary="/bin/true")
    assert own_descriptors() == before


def test_what_nothing_holds_is_ended(spawner: Spawner, ram_fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_hold(shape: MachineShape, wanted: Start) -> list[str]:
        return qemu_argv(shape, replace(wanted, hold_fd=None))

    monkeypatch.setattr(starting, "qemu_argv", without_hold)
    before = own_descriptors()
    with pytest.raises(BootError, match="cannot be held while it starts: it does not come so far"):
        start(spawner, ram_fd, timeout_s=0.5)
    assert own_descriptors() == before


def test_what_cannot_be_stopped_is_ended(
    spawner: Spawner, ram_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("its 2 threads do not stop")

    monkeypatch.setattr("rollout.sandbox.microvm.stopping._stop", refuse)
    before = own_descriptors()
    with pytest.raises(BootError, match="cannot be held while it starts: its 2 threads"):
        start(spawner, ram_fd)
    assert own_descriptors() == before


@pytest.mark.skipif(not _has_kvm, reason="/dev/kvm cannot be opened")
def test_under_kvm_a_fork_has_less_memory_of_its_own_than_a_program() -> None:
    with TinyGuests("kvm") as guests:
        median_kib: list[float] = []
        for begin in (guests.start, guests.start_program):
            vmms = [begin() for _ in range(5)]
            for vmm in vmms:
                guests.become(vmm, guests.base)
                assert ask(vmm.channel, b"i") == 1
            median_kib.append(statistics.median(private_kib(vmm.pid) for vmm in vmms))
            for vmm in vmms:
                vmm.kill()
    forked_kib, program_kib = median_kib
    assert forked_kib < program_kib - 512


class TestMachines:
    """Whole guests, as under KVM, on an accelerator that boots them here."""

    @pytest.fixture(autouse=True)
    def like_kvm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(VmmSource, "_translates", False)

    @pytest.fixture
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Process ids of all forks."""
        found: list[int] = []
        fork = HalfStarted.fork

        def noting(half_started: HalfStarted, ram_fd: int) -> Any:
            vmm = fork(half_started, ram_fd)
            found.append(vmm.pid)
            return vmm

        monkeypatch.setattr(HalfStarted, "fork", noting)
        return found

    async def test_clones_are_forks_of_it_and_are_used_again(self, counted: list[int]) -> None:
        async with MicroVMEngine(EngineConfig(kind="microvm"), ImageConfig()) as engine:
            machine = await engine.boot("default")
            assert isinstance(await source_for(engine).origin(), HalfStarted)
            await engine.drain()
            await machine.write_file("word", b"kept")
            checkpoint = await machine.checkpoint()
            clones = await engine.fork(checkpoint, 4)
            assert {clone.pid for clone in clones} <= set(counted)
            for clone in clones:
                assert await clone.read_file("word") == b"kept"
            again = await clones[0].checkpoint()
            await clones[0].kill()
            [next_one] = await engine.fork(again)
            assert await next_one.read_file("word") == b"kept"

    async def test_a_derived_base_has_one_of_its_own(self, counted: list[int]) -> None:
        async with MicroVMEngine(EngineConfig(kind="microvm"), ImageConfig()) as engine:
            machine = await engine.boot("default")
            await machine.write_file("word", b"kept")
            checkpoint = await machine.checkpoint()
            await engine.rebase(checkpoint)
            assert isinstance(await source_for(engine, 1).origin(), HalfStarted)
            await engine.drain()
            clones = await engine.fork(checkpoint, 2)
            assert {clone.pid for clone in clones} <= set(counted)
            for clone in clones:
                assert await clone.read_file("word") == b"kept"

    async def test_one_that_was_killed_is_outlived_and_another_is_made(self, counted: list[int]) -> None:
        async with MicroVMEngine(EngineConfig(kind="microvm"), ImageConfig()) as engine:
            machine = await engine.boot("default")
            vmms = source_for(engine)
            first = await vmms.origin()
            assert isinstance(first, HalfStarted)
            checkpoint = await machine.checkpoint()
            await engine.drain()
            held = psutil.Process(first._candidate.vmm.pid)
            held.kill()
            psutil.wait_procs([held], DEADLINE_S)
            for clone in await engine.fork(checkpoint, 2):
                assert await clone.call("ping") is None
            second = await vmms.origin()
            assert isinstance(second, HalfStarted)
            assert second is not first

    async def test_where_there_is_none_machines_start_as_programs(
        self, counted: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise BootError("no families here")

        monkeypatch.setattr(source, "start_halfway", refuse)
        async with MicroVMEngine(EngineConfig(kind="microvm"), ImageConfig()) as engine:
            machine = await engine.boot("default")
            checkpoint = await machine.checkpoint()
            for clone in await engine.fork(checkpoint, 3):
                assert await clone.call("ping") is None
            assert await source_for(engine).origin() is None
        assert not counted

    async def test_nothing_of_it_is_shared_where_that_is_not_wanted(self, counted: list[int]) -> None:
        config = EngineConfig(kind="microvm", reuse_vmms=False)
        async with MicroVMEngine(config, ImageConfig()) as engine:
            machine = await engine.boot("default")
            [clone] = await engine.fork(await machine.checkpoint())
            assert await clone.call("ping") is None
            assert await source_for(engine).origin() is None
        assert not counted
