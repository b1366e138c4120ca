"""VMMs that are forks of one that has run: whole with all their threads, and apart from each other."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from interpreters import DEADLINE_S, LIBRARY, MEMORY_BYTES, PYTHON, StoppedInterpreter, interpreter_files
from machines import check_without_descriptors, source_for

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import BootError, GuestError
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.microvm import family, source, stopping
from rollout.sandbox.microvm.confinement import FIRST_FD, SystemCall
from rollout.sandbox.microvm.descriptors import Opened, exchange
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.half_started import HalfStarted
from rollout.sandbox.microvm.prototype import Family, Prototype
from rollout.sandbox.microvm.sandbox import MicroVMSandbox
from rollout.sandbox.microvm.source import VmmSource
from rollout.sandbox.microvm.spawner import MAX_THREADS, Child, Spawner
from rollout.sandbox.microvm.starting import max_threads_of_fork
from rollout.sandbox.microvm.template import CLONE_PARENT
from rollout.sandbox.microvm.vmm import Vmm

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

    def test_what_a_fork_was_given_blocks_only_where_its_prototype_does(self, spawner: Spawner) -> None:
        interpreter = StoppedInterpreter(spawner, f"os.set_blocking({FIRST_FD}, False)")
        look = f"""
os.write(2, json.dumps([os.get_blocking({FIRST_FD}), os.get_blocking({FIRST_FD + 1})]).encode())
os._exit(0)
"""
        ours = os.memfd_create("ours")
        try:
            assert said(interpreter.fork(look, [ours])) == [False, True]
        finally:
            os.close(ours)
            interpreter.close()

    def test_after_a_fork_that_was_refused_the_next_one_has_its_own_descriptors(
        self, spawner: Spawner
    ) -> None:
        interpreter = StoppedInterpreter(spawner, "pass")
        say = "os.write(2, b'1'); os._exit(0)"
        shares_handlers_but_no_memory = CLONE_PARENT | 0x800
        try:
            with pytest.raises(BootError, match=r"cannot be forked: .*Invalid argument"):
                interpreter.fork(say, flags=shares_handlers_but_no_memory)
            assert said(interpreter.fork(say)) == 1
        finally:
            interpreter.close()

    def test_forks_have_no_random_numbers_in_common(self, spawner: Spawner) -> None:
        interpreter = StoppedInterpreter(spawner, "gnutls_rnd = ctypes.CDLL(None).gnutls_rnd")
        ask = """
room = ctypes.create_string_buffer(1000)
result = gnutls_rnd(1, room, 990)
os.write(2, json.dumps([result, room.raw.hex()]).encode())
os._exit(0)
"""
        try:
            (first, one), (second, other) = (said(interpreter.fork(ask)) for _ in range(2))
        finally:
            interpreter.close()
        assert (first, second) == (0, 0)
        assert one[:64] != other[:64]
        for words in (one, other):
            assert words[-20:] == "00" * 10, "more than it was asked for"
            assert words[-52:-20] != "00" * 16, "less than it was asked for"

    def test_a_fork_that_becomes_a_prototype_reaches_no_other_process(self, spawner: Spawner) -> None:
        first = f"""
area = mmap.mmap({FIRST_FD}, {MEMORY_BYTES}, flags=mmap.MAP_PRIVATE)
secret = ctypes.create_string_buffer(b"secret")
os.write(2, str(ctypes.addressof(secret)).encode())
"""
        interpreter = StoppedInterpreter(spawner, first)
        place = int(interpreter.child.log())
        fork = interpreter.fork("time.sleep(600)")
        try:
            for victim in (interpreter.child, fork):
                words = Path(f"/proc/{victim.pid}/status").read_text().split("NSpid:\t")[1].split("\n")[0]
                pid = words.split()[-1 if victim is interpreter.child else -2]
                attempts = f"""
def write(pid):
    with open(f'/proc/{{pid}}/mem', 'r+b', buffering=0) as memory:
        memory.seek({place})
        return memory.write(b's')
def refusal(attempt, *arguments):
    try:
        return attempt(*arguments)
    except OSError as error:
        return type(error).__name__
os.write(2, json.dumps([
    write(os.getpid()),
    refusal(write, {pid}),
    refusal(os.kill, {pid}, 0),
    refusal(resource.prlimit, {pid}, resource.RLIMIT_NPROC),
]).encode())
os._exit(0)
"""
                own, *others = said(interpreter.successor(attempts))
                assert own == 1
                assert others[0] in ("PermissionError", "FileNotFoundError"), "it may not even be shown"
                assert others[1:] == ["PermissionError"] * 2
        finally:
            fork.kill()
            fork.close()
            interpreter.close()

    def test_a_late_fork_is_not_taken_for_the_next_one(self, spawner: Spawner) -> None:
        interpreter = StoppedInterpreter(spawner, "pass")
        prototype = psutil.Process(interpreter.child.pid)
        try:
            interpreter._control.settimeout(0.3)
            prototype.suspend()
            with pytest.raises(BootError, match="cannot be forked: timed out"):
                interpreter.fork("pass")
            prototype.resume()
            with pytest.raises(BootError, match="cannot be forked"):
                interpreter.fork("pass")
        finally:
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

    def test_a_thread_that_is_at_work_is_not_stopped_in_it(
        self, spawner: Spawner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stopping, "_STOP_WITHIN_S", 0.3)
        works = """
def work():
    while True:
        pass
threading.Thread(target=work, daemon=True).start()
"""
        with pytest.raises(OSError, match="do not come to rest"):
            StoppedInterpreter(spawner, works, num_threads=2)

    def test_a_thread_that_begins_meanwhile_is_noticed(
        self, spawner: Spawner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, seen = stopping._numbers, list[list[int]]()

        def late(pid: int) -> list[int]:
            """At first the last thread is not there yet."""
            seen.append(real(pid))
            return seen[0][:-1] if len(seen) == 1 else seen[-1]

        monkeypatch.setattr(stopping, "_numbers", late)
        begins = "threading.Thread(target=time.sleep, args=[600], daemon=True).start()"
        with pytest.raises(OSError, match="begun a thread meanwhile"):
            StoppedInterpreter(spawner, begins, num_threads=2)

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

    def test_of_a_first_process_that_does_not_speak_nothing_stays(
        self, spawner: Spawner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start = spawner.start_family

        def killing(argv: Sequence[str], control: socket.socket) -> tuple[Child, int]:
            control.shutdown(socket.SHUT_WR)  # as if it had ended before it could say that it is there
            return start(argv, control)

        monkeypatch.setattr(spawner, "start_family", killing)
        with pytest.raises(BootError, match="no family of VMMs can be made"):
            Family(spawner, [str(PYTHON), "-ISc", "pass"])

    def test_of_a_family_whose_first_process_ends_later_nothing_stays(self, spawner: Spawner) -> None:
        family_of_one = Family(spawner, [str(PYTHON), "-ISc", "pass"])
        family_of_one._first.kill()
        assert select.select([family_of_one._first.pidfd], [], [], DEADLINE_S)[0]
        with pytest.raises(BootError, match="a VMM cannot be forked"):
            family_of_one.start([], None, {})
        family_of_one.end()

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

    def test_a_process_without_a_number_to_spare(self) -> None:
        full = [opened(number, "/dev/null", inode=3) for number in range(256)]
        with pytest.raises(OSError, match="none left for its forks"):
            exchange(full, [(1, 10)], kept=None)

    def test_a_kernel_that_does_not_tell_a_count(self) -> None:
        with pytest.raises(OSError, match="eventfd-count"):
            exchange([NULL, opened(7, "anon_inode:[eventfd]", info="pos:\t0\n")], [], kept=None)


RDRAND = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write(bytes.fromhex("480fc7f0 c3"))
rdrand = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
print(rdrand(), rdrand(), rdrand())
"""
"""What a guest's CPU gives who asks it for random numbers."""


@pytest.mark.parametrize(
    ("release", "is_by_namespace"),
    [("6.18.44-fc", True), ("5.14.0", True), ("5.13.19-2-amd64", False), ("4.19", False), ("unknown", False)],
)
def test_threads_are_limited_where_the_kernel_counts_those_of_one_fork(
    release: str, is_by_namespace: bool
) -> None:
    assert (max_threads_of_fork(release) == MAX_THREADS) == is_by_namespace


async def prototype_of(source_of_vmms: VmmSource) -> Prototype:
    prototype = await source_of_vmms.origin()
    assert isinstance(prototype, Prototype)
    return prototype


def pid_of(prototype: Prototype) -> int:
    return prototype._candidate.vmm.pid


async def end(process: psutil.Process) -> None:
    """Kills a process, and waits until it is gone."""
    process.kill()
    _, alive = await asyncio.to_thread(psutil.wait_procs, [process], DEADLINE_S)
    assert not alive


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

    async def test_what_the_cpu_calls_random_differs_from_clone_to_clone(
        self, engine: MicroVMEngine, lake: MicroVMSandbox
    ) -> None:
        await prototype_of(source_for(engine))
        checkpoint = await lake.checkpoint()
        await engine.drain()
        clones = await engine.fork(checkpoint, 3)
        found = [(await clone.exec(["python3", "-c", RDRAND])).stdout.split() for clone in clones]
        assert [len(words) for words in found] == [3] * 3
        assert len({word for words in found for word in words}) == 9

    async def test_another_prototype_takes_the_place_of_one_that_was_killed(
        self, engine: MicroVMEngine, lake: MicroVMSandbox, counted: list[int]
    ) -> None:
        first = await prototype_of(source_for(engine))
        checkpoint = await lake.checkpoint()
        [old] = await engine.fork(checkpoint)
        await end(psutil.Process(pid_of(first)))
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

    async def test_a_fork_that_the_kernel_refuses_does_not_end_the_prototype(
        self, engine: MicroVMEngine, lake: MicroVMSandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = await prototype_of(source_for(engine))
        checkpoint = await lake.checkpoint()
        await engine.drain()

        def refuse(*_: object) -> None:
            raise BootError("a VMM cannot be forked: [Errno 11] Resource temporarily unavailable")

        with monkeypatch.context() as patch:
            patch.setattr(Prototype, "fork", refuse)
            for clone in await engine.fork(checkpoint, 4):
                assert await clone.call("ping") is None
            await engine.drain()
        assert await prototype_of(source_for(engine)) is first

    async def test_the_end_of_a_family_is_told_and_outlived(
        self, engine: MicroVMEngine, lake: MicroVMSandbox
    ) -> None:
        prototype = await prototype_of(source_for(engine))
        checkpoint = await lake.checkpoint()
        await engine.drain()
        [clone] = await engine.fork(checkpoint)
        first = psutil.Process(pid_of(prototype)).parent()
        assert first is not None
        machine = psutil.Process(clone.pid)
        first.kill()
        assert not psutil.wait_procs([machine], DEADLINE_S)[1]
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
            assert await source_for(engine).origin() is None
        assert not counted

    async def test_a_prototype_whose_forks_die_is_not_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = family.fork
        no_such_call = SystemCall("none", 0xFFFF, ())
        monkeypatch.setattr(family, "fork", lambda *args, **options: [*real(*args, **options), no_such_call])
        async with MicroVMEngine(EngineConfig(kind="microvm"), ImageConfig()) as engine:
            machine = await engine.boot("default")
            assert await source_for(engine).origin() is None
            checkpoint = await machine.checkpoint()
            for clone in await engine.fork(checkpoint, 3):
                assert await clone.call("ping") is None

    async def test_prototypes_are_made_again_as_long_as_forks_of_them_live(
        self, engine: MicroVMEngine, lake: MicroVMSandbox
    ) -> None:
        vmms = source_for(engine)
        checkpoint = await lake.checkpoint()
        for _ in range(source._MAX_FAILURES + 1):
            prototype = await prototype_of(vmms)
            await engine.drain()
            await engine.fork(checkpoint)
            await end(psutil.Process(pid_of(prototype)))
            await engine.drain()
            await engine.fork(checkpoint)

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

    async def test_bases_are_derived_from_derived_ones_at_any_depth(
        self, engine: MicroVMEngine, lake: MicroVMSandbox, counted: list[int]
    ) -> None:
        expected = await lake.call("env.state_hash")
        machine = lake
        for depth in range(1, 9):
            checkpoint = await machine.checkpoint()
            await engine.rebase(checkpoint)
            await prototype_of(source_for(engine, depth))
            [machine] = await engine.fork(checkpoint)
            assert machine.pid in counted
            assert await machine.call("env.state_hash") == expected

    async def test_many_at_once_are_all_there_or_none(
        self, engine: MicroVMEngine, lake: MicroVMSandbox
    ) -> None:
        await prototype_of(source_for(engine))
        checkpoint = await lake.checkpoint()
        clones = await engine.fork(checkpoint, 64)
        answers = await asyncio.gather(*(clone.call("env.step", action=2) for clone in clones))
        assert len({str(answer["observation"]) for answer in answers}) == 1

    @pytest.mark.parametrize(
        ("owner", "name"),
        [(Prototype, "fork"), (HalfStarted, "fork"), (source, "start_vmm")],
        ids=["fork", "half started", "program"],
    )
    async def test_who_stops_waiting_for_a_machine_leaves_none_behind(
        self, engine: MicroVMEngine, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
    ) -> None:
        monkeypatch.setattr(VmmSource, "_translates", owner is not HalfStarted)
        await engine.boot("default")
        vmms = source_for(engine)
        assert await vmms.origin() is not None
        await engine.drain()
        start, started, goes_on = getattr(owner, name), list[Vmm](), threading.Event()

        def slowly(*args: Any, **options: Any) -> Vmm:
            started.append(start(*args, **options))
            goes_on.wait(DEADLINE_S)
            return started[-1]

        monkeypatch.setattr(owner, name, slowly)
        waiting = asyncio.create_task(vmms.start_dormant() if owner is source else vmms.start())
        while not started:
            await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.sleep(0)
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert [vmm.is_closed for vmm in started] == [True]

    async def test_where_descriptors_run_out_nothing_stays_open(self, engine: MicroVMEngine) -> None:
        await engine.boot("default")
        vmms = source_for(engine)
        prototype = await prototype_of(vmms)
        await engine.drain()
        ram_fd = vmms._ground.base.ram_fd
        check_without_descriptors(lambda: prototype.fork(ram_fd), 11)

    async def test_no_base_is_derived_while_the_engine_is_being_closed(
        self, lake: MicroVMSandbox, engine: MicroVMEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint = await lake.checkpoint()
        begun, goes_on, close = asyncio.Event(), asyncio.Event(), VmmSource.close

        async def slowly(vmms: VmmSource) -> None:
            begun.set()
            await goes_on.wait()
            await close(vmms)

        monkeypatch.setattr(VmmSource, "close", slowly)
        closing = asyncio.create_task(engine.stocks.close())
        await begun.wait()
        with pytest.raises(BootError, match="the engine has been closed"):
            await engine.rebase(checkpoint)
        goes_on.set()
        await closing

    async def test_the_end_of_the_engine_is_the_end_of_a_family(self) -> None:
        async with MicroVMEngine(EngineConfig(kind="microvm"), ImageConfig()) as engine:
            await engine.boot("default")
            prototype = psutil.Process(pid_of(await prototype_of(source_for(engine))))
            first = prototype.parent()
            assert first is not None
            processes = [first, *first.children(recursive=True)]
            assert prototype in processes
        give_up_at_s = time.monotonic() + DEADLINE_S
        while any(process.is_running() for process in processes):
            assert time.monotonic() < give_up_at_s
            await asyncio.sleep(0.01)
