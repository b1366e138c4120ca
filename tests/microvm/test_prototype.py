"""VMMs that are forks of one that has run: whole with all their threads, and apart from each other."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from interpreters import DEADLINE_S, LIBRARY, StoppedInterpreter, interpreter_files

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import BootError, GuestError
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.microvm import source, stopping
from rollout.sandbox.microvm.confinement import FIRST_FD
from rollout.sandbox.microvm.descriptors import Opened, exchange
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.prototype import Family, Prototype
from rollout.sandbox.microvm.sandbox import MicroVMSandbox
from rollout.sandbox.microvm.source import VmmSource
from rollout.sandbox.microvm.spawner import Child, Spawner

_missing = what_is_missing("microvm", ImageConfig())
on_microvms = [
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
]
in_jail = [
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
]


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    spawner = Spawner({str(LIBRARY): LIBRARY}, programs=interpreter_files())
    yield spawner
    spawner.close()


def said(child: Child) -> Any:
    """What a fork wrote before it ended."""
    try:
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0], "the fork hangs"
        return json.loads(os.pread(child.log_fd, 1 << 16, 0))
    finally:
        child.kill()
        child.close()


# Each thread waits for its turn, on a lock that a fork has for itself, with something of its own in a float,
# in its local storage and on its stack.
WORK = """
class Waits(threading.Thread):
    def __init__(self, number):
        super().__init__(daemon=True)
        self.number, self.turn, self.answer = number, threading.Semaphore(0), None
    def run(self):
        local.number = on_stack = self.number
        ratio = on_stack / 3
        self.turn.acquire()
        self.answer = [local.number, on_stack, ratio * 3, threading.get_native_id(), threading.get_ident()]
local = threading.local()
threads = [Waits(number) for number in range(5)]
for thread in threads:
    thread.start()
while len(os.listdir('/proc/self/task')) < 6:
    time.sleep(0.001)
"""
ASK = """
for thread in threads:
    thread.turn.release()
for thread in threads:
    thread.join()
clock = time.pthread_getcpuclockid(threading.get_ident())
os.write(2, json.dumps({'answers': [thread.answer for thread in threads], 'pid': os.getpid(),
    'clock': ~(clock >> 3), 'own': threading.get_native_id()}).encode())
os._exit(0)
"""


class TestProcesses:
    """Of an interpreter, which says more than a VMM."""

    pytestmark = in_jail

    def test_every_thread_goes_on_in_every_fork(self, spawner: Spawner) -> None:
        interpreter = StoppedInterpreter(spawner, WORK, num_threads=6)
        try:
            answers = [said(interpreter.fork(ASK)) for _ in range(3)]
        finally:
            interpreter.close()
        for answer in answers:
            assert [each[:3] for each in answer["answers"]] == [[n, n, float(n)] for n in range(5)]
            ids = {each[3] for each in answer["answers"]}
            assert len(ids) == 5, "the C library knows the threads' new ids"
            assert answer["pid"] == answer["own"] == answer["clock"] == 1
            assert 1 not in ids

    def test_forks_share_no_counter(self, spawner: Spawner) -> None:
        interpreter = StoppedInterpreter(spawner, "counter = os.eventfd(3, os.EFD_NONBLOCK)")
        take = """
os.eventfd_write(counter, 4)
os.write(2, json.dumps([os.eventfd_read(counter), os.get_blocking(counter)]).encode())
os._exit(0)
"""
        try:
            assert [said(interpreter.fork(take)) for _ in range(2)] == [[7, False], [7, False]]
        finally:
            interpreter.close()

    def test_a_fork_has_what_it_was_given_and_nothing_of_its_prototype(self, spawner: Spawner) -> None:
        interpreter = StoppedInterpreter(spawner, f"other = os.dup({FIRST_FD})")
        look = """
def inode(fd):
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return None
found = {fd: inode(fd) for fd in range(256) if inode(fd) is not None}
os.write(2, json.dumps([found, other]).encode())
os._exit(0)
"""
        ours = os.memfd_create("ours")
        try:
            found, other = said(interpreter.fork(look, [ours]))
            given = [FIRST_FD, FIRST_FD + 1, FIRST_FD + 2]
            own = {int(number): inode for number, inode in found.items()}
            assert sorted(own) == sorted([0, 1, 2, other, *given]), "not the prototype's socket"
            assert own[other] == own[FIRST_FD] == os.fstat(ours).st_ino, "under every number that it has"
        finally:
            os.close(ours)
            interpreter.close()

    def test_what_cannot_be_shared_is_refused(self, spawner: Spawner) -> None:
        interpreter = StoppedInterpreter(spawner, "pair = os.pipe()")
        try:
            with pytest.raises(OSError, match=r"it has pipe:\[\d+\] open as \d+, which forks cannot share"):
                interpreter.fork("pass")
        finally:
            interpreter.close()

    def test_a_thread_that_does_not_stop_is_noticed(
        self, spawner: Spawner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stopping, "_STOP_WITHIN_S", 0.3)
        blocks = """
def work():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGFPE])
    time.sleep(600)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""
        with pytest.raises(OSError, match="its 2 threads do not stop"):
            StoppedInterpreter(spawner, blocks, num_threads=2)

    def test_forks_live_on_without_their_prototype_but_not_without_the_first_process(
        self, spawner: Spawner
    ) -> None:
        interpreter = StoppedInterpreter(spawner, "pass")
        child = interpreter.fork("time.sleep(600)")
        try:
            interpreter.child.kill()
            assert select.select([interpreter.child.pidfd], [], [], DEADLINE_S)[0]
            assert not select.select([child.pidfd], [], [], 0.2)[0]
            with pytest.raises(BootError, match="cannot be forked"):
                interpreter.fork("pass")
            interpreter.family.end()
            assert select.select([child.pidfd], [], [], DEADLINE_S)[0], "it outlives its family"
        finally:
            child.close()
            interpreter.close()

    def test_a_family_that_cannot_begin_says_why(self, spawner: Spawner) -> None:
        with pytest.raises(BootError, match="no family of VMMs can be made"):
            Family(spawner, ["/no-such-program"])


def opened(number: int, target: str, *, inode: int = 0, flags: int = os.O_RDWR, info: str = "") -> Opened:
    return Opened(number, target, (1, inode), flags, info)


NULL = opened(0, "/dev/null", inode=3)


class TestExchange:
    def test_every_number_of_what_was_given_is_replaced(self) -> None:
        there = [
            NULL,
            opened(2, "/memfd:log", inode=12),
            opened(100, "socket:[10]", inode=10),
            opened(101, "socket:[11]", inode=11),
            opened(102, "socket:[10]", inode=10, flags=os.O_RDWR | os.O_CLOEXEC),
        ]
        change = exchange(there, [(1, 10), (1, 11), (1, 12)], kept=1)
        assert change.numbers == (1, 3), "the lowest free ones, in which the kernel puts what comes"
        dup3, close = 292, 3
        expected = [(dup3, (3, 2, 0)), (dup3, (1, 100, 0)), (close, (101,)), (dup3, (1, 102, os.O_CLOEXEC))]
        assert [(call.number, call.arguments) for call in change.calls] == expected
        assert [call.arguments for call in change.afterwards] == [(1,), (3,)]
        assert change.free_fd == 1

    def test_a_counter_is_made_anew_with_its_count(self) -> None:
        info = "pos:\t0\nflags:\t04002\neventfd-count:               1f\n"
        counter = opened(7, "anon_inode:[eventfd]", flags=os.O_RDWR | os.O_NONBLOCK, info=info)
        change = exchange([NULL, counter], [], kept=None)
        eventfd2, dup3, close = 290, 292, 3
        expected = [(eventfd2, (0x1F, os.O_NONBLOCK)), (dup3, (1, 7, 0)), (close, (1,))]
        assert [(call.number, call.arguments) for call in change.calls] == expected

    @pytest.mark.parametrize(
        "harmless",
        [
            opened(5, "anon_inode:[signalfd]"),
            opened(5, "anon_inode:[eventpoll]", info="pos:\t0\nflags:\t02\n"),
            opened(5, "/images/1/rootfs.erofs", flags=os.O_RDONLY),
        ],
        ids=lambda each: each.target,
    )
    def test_what_may_be_shared(self, harmless: Opened) -> None:
        assert not exchange([NULL, harmless], [], kept=None).calls

    @pytest.mark.parametrize(
        "refused",
        [
            opened(5, "anon_inode:[eventpoll]", info="pos:\t0\ntfd:        3 events:       19\n"),
            opened(5, "anon_inode:[timerfd]"),
            opened(5, "socket:[9]", inode=9),
            opened(5, "pipe:[9]", inode=9, flags=os.O_RDONLY),
            opened(5, "/images/1/rootfs.erofs", flags=os.O_RDWR),
            opened(5, "anon_inode:kvm-vm"),
        ],
        ids=lambda each: each.target,
    )
    def test_what_may_not(self, refused: Opened) -> None:
        with pytest.raises(OSError, match="which forks cannot share"):
            exchange([NULL, refused], [], kept=None)

    def test_a_kernel_that_does_not_tell_a_count(self) -> None:
        with pytest.raises(OSError, match="eventfd-count"):
            exchange([NULL, opened(7, "anon_inode:[eventfd]", info="pos:\t0\n")], [], kept=None)


async def prototype_of(source_of_vmms: VmmSource) -> Prototype:
    prototype = await source_of_vmms.prototype()
    assert prototype is not None
    return prototype


def source_for(engine: MicroVMEngine, place: int = 0) -> VmmSource:
    return list(engine.stocks._stocks.values())[place].source


def pid_of(prototype: Prototype) -> int:
    return prototype._candidate.vmm.pid


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Process ids of all forks of prototypes."""
    found: list[int] = []
    fork = Prototype.fork

    def noting(prototype: Prototype, ram_fd: int) -> Any:
        vmm = fork(prototype, ram_fd)
        found.append(vmm.pid)
        return vmm

    monkeypatch.setattr(Prototype, "fork", noting)
    return found


class TestMachines:
    pytestmark = on_microvms

    async def test_clones_are_forks_of_the_prototype(
        self, engine: MicroVMEngine, lake: MicroVMSandbox, counted: list[int]
    ) -> None:
        await prototype_of(source_for(engine))
        checkpoint = await lake.checkpoint()
        await engine.drain()
        clones = await engine.fork(checkpoint, 12)
        pids = {clone.pid for clone in clones}
        assert pids <= set(counted)
        answers = [await clone.call("env.step", action=2, state_hash=True) for clone in clones]
        assert len({answer["state_hash"] for answer in answers}) == 1
        names = {(await clone.exec(["hostname"])).stdout for clone in clones}
        assert len(names) == 12

    async def test_another_prototype_takes_the_place_of_one_that_was_killed(
        self, engine: MicroVMEngine, lake: MicroVMSandbox, counted: list[int]
    ) -> None:
        first = await prototype_of(source_for(engine))
        checkpoint = await lake.checkpoint()
        [old] = await engine.fork(checkpoint)
        psutil.Process(pid_of(first)).kill()
        async with asyncio.timeout(DEADLINE_S):
            while not first.has_ended:
                await asyncio.sleep(0.01)
        await engine.drain()
        clones = await engine.fork(checkpoint, 3)
        for clone in (old, *clones):
            assert await clone.call("ping") is None
        second = await prototype_of(source_for(engine))
        assert second is not first
        num_forks = len(counted)
        await engine.drain()
        [clone] = await engine.fork(checkpoint)
        assert len(counted) > num_forks
        assert await clone.call("ping") is None

    async def test_the_end_of_a_family_is_told_and_outlived(
        self, engine: MicroVMEngine, lake: MicroVMSandbox
    ) -> None:
        prototype = await prototype_of(source_for(engine))
        checkpoint = await lake.checkpoint()
        await engine.drain()
        [clone] = await engine.fork(checkpoint)
        family = psutil.Process(pid_of(prototype)).parent()
        assert family is not None
        family.kill()
        with pytest.raises(GuestError):
            await clone.call("ping")
        [clone] = await engine.fork(checkpoint)
        assert await clone.call("ping") is None

    async def test_where_there_is_none_machines_start_as_programs(
        self, monkeypatch: pytest.MonkeyPatch, counted: list[int]
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise BootError("no families here")

        monkeypatch.setattr(source, "start_candidate", refuse)
        async with MicroVMEngine(EngineConfig(kind="microvm"), ImageConfig()) as engine:
            machine = await engine.boot("default")
            checkpoint = await machine.checkpoint()
            for _ in range(source._MAX_FAILURES + 1):
                for clone in await engine.fork(checkpoint, 2):
                    assert await clone.call("ping") is None
                await engine.drain()
            assert await source_for(engine).prototype() is None
        assert not counted

    async def test_a_derived_base_has_a_prototype_of_its_own_that_knows_the_code(
        self, engine: MicroVMEngine, lake: MicroVMSandbox, counted: list[int]
    ) -> None:
        expected = await lake.call("env.state_hash")
        checkpoint = await lake.checkpoint()
        await engine.rebase(checkpoint)
        derived = await prototype_of(source_for(engine, 1))
        assert pid_of(derived) != pid_of(await prototype_of(source_for(engine)))
        await engine.drain()
        clones = await engine.fork(checkpoint, 3)
        assert {clone.pid for clone in clones} <= set(counted)
        for clone in clones:
            assert await clone.call("env.state_hash") == expected, "it was rehearsed with, and put back"
        saved = await clones[0].checkpoint()
        assert saved.private_bytes < checkpoint.private_bytes

    async def test_many_at_once_are_all_there_or_none(
        self, engine: MicroVMEngine, lake: MicroVMSandbox
    ) -> None:
        await prototype_of(source_for(engine))
        checkpoint = await lake.checkpoint()
        clones = await engine.fork(checkpoint, 64)
        answers = await asyncio.gather(*(clone.call("env.step", action=2) for clone in clones))
        assert len({str(answer["observation"]) for answer in answers}) == 1

    async def test_the_end_of_the_engine_is_the_end_of_a_family(self) -> None:
        async with MicroVMEngine(EngineConfig(kind="microvm"), ImageConfig()) as engine:
            await engine.boot("default")
            prototype = psutil.Process(pid_of(await prototype_of(source_for(engine))))
            family = prototype.parent()
            assert family is not None
            processes = [family, *family.children(recursive=True)]
            assert prototype in processes
        give_up_at_s = time.monotonic() + DEADLINE_S
        while any(process.is_running() for process in processes):
            assert time.monotonic() < give_up_at_s
            await asyncio.sleep(0.01)
