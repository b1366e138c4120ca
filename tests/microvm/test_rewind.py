"""A VMM that is put back: its memory is the checkpoint's to the byte, and no code of its last life runs."""

from __future__ import annotations

import asyncio
import shutil
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import ForkError
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.microvm.device_state import without_code_flush
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.memory import RawState
from rollout.sandbox.microvm.rewind import Rewinder
from rollout.sandbox.microvm.sandbox import MicroVMSandbox
from rollout.sandbox.microvm.state_disk import empty_state_disk
from rollout.sandbox.microvm.vmm import Vmm
from rollout.types import Randomness, RngPolicy

_missing = what_is_missing("microvm", ImageConfig())
on_microvms = [
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
]
INHERIT = Randomness(RngPolicy.INHERIT)
DEADLINE_S = 20.0

# A process of the guest that runs machine code in a page of its own, and changes that code when it is told:
# "set N" writes `mov eax, N; ret`, "run" calls it. Its answer carries the request's number.
JIT = """
import ctypes, mmap, pathlib, struct, time
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
done = ""
while True:
    try:
        number, what, value = pathlib.Path("/run/ask").read_text().split()
    except (OSError, ValueError):
        number = done
    if number != done:
        if what == "set":
            code[0:6] = b"\\xb8" + struct.pack("<i", int(value)) + b"\\xc3"
        answer = [call() for _ in range(50)][-1]
        pathlib.Path("/run/new").write_text(f"{number} {answer}")
        pathlib.Path("/run/new").rename("/run/answer")
        done = number
    time.sleep(0.005)
"""


async def ask(machine: MicroVMSandbox, number: int, request: str) -> int:
    await machine.write_file("/run/new-ask", f"{number} {request}".encode())
    await machine.exec(["mv", "/run/new-ask", "/run/ask"])
    give_up_at_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < give_up_at_s:
        reply = await machine.exec(["cat", "/run/answer"])
        words = reply.stdout.split()
        if words and int(words[0]) == number:
            return int(words[1])
        await asyncio.sleep(0.01)
    raise AssertionError("the guest's process does not answer")


@pytest.fixture
async def jit(machine: MicroVMSandbox) -> MicroVMSandbox:
    machine.keep_running(True)
    await machine.write_file("/run/jit.py", JIT.encode())
    await machine.exec(["sh", "-c", "setsid python3 /run/jit.py >/run/log 2>&1 </dev/null &"])
    return machine


async def fork_into(engine: MicroVMEngine, checkpoint, pid: int | None) -> MicroVMSandbox:
    """A clone in the VMM with that process id, which has just been retired."""
    (stock,) = engine._stocks._stocks.values()
    give_up_at_s = time.monotonic() + DEADLINE_S
    while not any(ready.vmm.pid == pid for ready in stock.pool._retired):
        assert time.monotonic() < give_up_at_s, "the VMM was not retired"
        await asyncio.sleep(0.005)
    [clone] = await engine.fork(checkpoint, 1, randomness=[INHERIT])
    assert isinstance(clone, MicroVMSandbox)
    assert clone.pid == pid
    return clone


class TestMachines:
    pytestmark = on_microvms

    async def test_code_of_a_former_life_does_not_run(
        self, engine: MicroVMEngine, jit: MicroVMSandbox
    ) -> None:
        assert await ask(jit, 1, "set 11") == 11
        checkpoint = await jit.checkpoint()
        assert await ask(jit, 2, "set 22") == 22
        pid = jit.pid
        await jit.kill()
        clone = await fork_into(engine, checkpoint, pid)
        clone.keep_running(True)
        assert await ask(clone, 3, "run 0") == 11

    async def test_without_forgetting_that_code_would_run(
        self, engine: MicroVMEngine, jit: MicroVMSandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The control of the test above: the hazard is real, wherever no pending interrupt forbids it."""
        monkeypatch.setattr(Rewinder, "_forget_code", lambda *args: None)
        answers: list[int] = []
        for attempt in range(6):
            assert await ask(jit, 3 * attempt, "set 11") == 11
            checkpoint = await jit.checkpoint()
            assert await ask(jit, 3 * attempt + 1, "set 22") == 22
            pid = jit.pid
            await jit.kill()
            jit = await fork_into(engine, checkpoint, pid)
            jit.keep_running(True)
            answers.append(await ask(jit, 3 * attempt + 2, "run 0"))
            if answers[-1] == 22:
                return
        pytest.fail(f"no stale code ran: {answers}")

    @pytest.mark.parametrize("is_known", [True, False], ids=["saved", "run on"])
    async def test_memory_is_the_checkpoints_to_the_byte(
        self,
        engine: MicroVMEngine,
        lake: MicroVMSandbox,
        monkeypatch: pytest.MonkeyPatch,
        is_known: bool,
    ) -> None:
        checkpoint = await lake.checkpoint()
        snapshot, stock = engine._snapshots[checkpoint.id]
        await lake.call("env.step", action=1)
        await lake.write_file("/root/much", b"x" * (4 << 20))
        if is_known:
            await lake.checkpoint()
        pid = lake.pid
        found: list[RawState] = []
        execute = Rewinder.rewind

        def rewind_and_read(self: Rewinder, qmp, memory, *args) -> None:
            execute(self, qmp, memory, *args)
            if memory.pid == pid:
                numbers = memory.private_pages()
                found.append(RawState(b"", numbers, memory.read(numbers), 0.0))

        monkeypatch.setattr(Rewinder, "rewind", rewind_and_read)
        await lake.kill()
        await fork_into(engine, checkpoint, pid)
        [state] = found
        expected = stock.pages[state.page_numbers].copy()
        places = np.searchsorted(state.page_numbers, snapshot.page_numbers)
        assert np.array_equal(state.page_numbers[places], snapshot.page_numbers)
        expected[places] = snapshot.unpack_pages(engine._cache, stock.pages)
        assert np.array_equal(state.pages, expected)

    async def test_translated_code_survives(self, engine: MicroVMEngine, lake: MicroVMSandbox) -> None:
        """What makes it worth it, counted by QEMU: blocks translated in a first life and in a second."""

        def blocks_and_flushes(machine: MicroVMSandbox) -> tuple[int, int]:
            assert machine._waking is not None
            words = machine._waking.vmm._qmp.execute(
                "human-monitor-command", {"command-line": "info jit"}, timeout_s=10.0
            )
            lines = [line.rsplit(maxsplit=1) for line in words.splitlines() if "count" in line]
            [blocks] = [
                int(line[-1].split("/")[0]) for line in lines if line and line[0].startswith("TB count")
            ]
            [flushes] = [int(line[-1]) for line in lines if line and line[0].startswith("TB flush count")]
            return blocks, flushes

        checkpoint = await lake.checkpoint()
        await lake.call("env.step", action=1)
        pid = lake.pid
        before = blocks_and_flushes(lake)
        await lake.kill()
        clone = await fork_into(engine, checkpoint, pid)
        await clone.call("env.step", action=1)
        after = blocks_and_flushes(clone)
        assert after[1] == before[1], "the code was thrown away"
        assert after[0] - before[0] < before[0] / 2, "most of the code was translated again"

    async def test_nothing_unread_reaches_the_next_life(
        self, engine: MicroVMEngine, machine: MicroVMSandbox
    ) -> None:
        checkpoint = await machine.checkpoint()
        await machine.call("ping")
        assert machine._waking is not None
        vmm = machine._waking.vmm
        vmm.stop(DEADLINE_S)
        vmm.channel.sendall(b"left over")
        assert not vmm.retire(DEADLINE_S), "a VMM that has not taken all is of no more use"
        await machine.kill()
        [clone] = await engine.fork(checkpoint, 1)
        assert await clone.call("ping") is None

    async def test_a_vmm_that_cannot_go_back_is_replaced(
        self, engine: MicroVMEngine, lake: MicroVMSandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint = await lake.checkpoint()

        def fail(*args: object, **options: object) -> None:
            raise ForkError("it does not")

        monkeypatch.setattr(Vmm, "rewind", fail)
        pid = lake.pid
        await lake.kill()
        await asyncio.sleep(0.1)
        [clone] = await engine.fork(checkpoint, 1)
        assert isinstance(clone, MicroVMSandbox)
        assert clone.pid != pid
        assert await clone.call("ping") is None

    async def test_reuse_can_be_switched_off(self) -> None:
        config = EngineConfig(kind="microvm", reuse_vmms=False)
        async with MicroVMEngine(config, ImageConfig()) as engine:
            machine = await engine.boot("default")
            assert isinstance(machine, MicroVMSandbox)
            checkpoint = await machine.checkpoint()
            pid = machine.pid
            await machine.kill()
            await asyncio.sleep(0.1)
            [clone] = await engine.fork(checkpoint, 1)
            assert isinstance(clone, MicroVMSandbox)
            assert clone.pid != pid


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img (qemu-utils) is not installed")
def test_the_state_disk_is_a_sound_image(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(empty_state_disk())
    subprocess.run(["qemu-img", "check", "-f", "qcow2", tmp_path / "disk"], check=True, capture_output=True)
    listed = subprocess.run(
        ["qemu-img", "snapshot", "-l", tmp_path / "disk"], check=True, capture_output=True, text=True
    )
    assert "state" in listed.stdout


def stream(requests: int, *, before: bytes = b"", after: bytes = b"rest", kind: int = 4) -> bytes:
    common = struct.pack(">BIB10sII", kind, 6, 10, b"cpu_common", 0, 1)
    common += struct.pack(">II", 1, requests) + struct.pack(">BI", 0x7E, 6)
    return b"QEVM\x00\x00\x00\x03" + before + common + after


def test_the_section_goes_only_when_no_interrupt_is_pending() -> None:
    assert without_code_flush(stream(0)) == b"QEVM\x00\x00\x00\x03rest"
    assert without_code_flush(stream(2)) is None
    assert without_code_flush(stream(0, kind=1)) is None
    assert without_code_flush(stream(0, before=b"\x0acpu_common")) is None
    assert without_code_flush(b"QEVM\x00\x00\x00\x03") is None


@given(data=st.binary(max_size=200))
def test_garbage_stays_as_it_is(data: bytes) -> None:
    assert without_code_flush(data) is None
