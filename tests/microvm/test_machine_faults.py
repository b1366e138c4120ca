"""VMMs that are killed in the middle of a phase, and a host whose clock steps."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from rollout.config import ImageConfig
from rollout.errors import BootError, CheckpointError, ForkError, GuestError
from rollout.sandbox import client as client_module
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.microvm import source
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.memory import GuestMemory
from rollout.sandbox.microvm.prototype import Family
from rollout.sandbox.microvm.sandbox import MicroVMSandbox
from rollout.sandbox.microvm.spawner import Child, Spawner
from rollout.sandbox.microvm.vmm import Vmm

_missing = what_is_missing("microvm", ImageConfig())
pytestmark = [
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
]
DEADLINE_S = 30.0
DAY_S = 86400.0


class Killer:
    """Kills VMMs in a phase, as long as it is armed.

    Attributes:
        victims: Process ids of those that it killed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.victims: list[int] = []
        self.num_left = 0
        self._monkeypatch = monkeypatch
        self._pid = 0

    def arm(self, num_kills: int) -> None:
        self.num_left = num_kills

    def strike(self, pid: int) -> None:
        if self.num_left > 0:
            self.num_left -= 1
            self.victims.append(pid)
            os.kill(pid, signal.SIGKILL)

    def when_started(self) -> None:
        for owner, name in ((Spawner, "spawn"), (Family, "member")):
            self._monkeypatch.setattr(owner, name, self._striking(getattr(owner, name)))

    def _striking(self, start: Callable[..., Child]) -> Callable[..., Child]:
        def started(*args: Any, **options: Any) -> Child:
            child = start(*args, **options)
            self.strike(child.pid)
            return child

        return started

    def before(self, phase: str) -> None:
        real: Callable[..., Any] = getattr(Vmm, phase)

        def killed_first(vmm: Vmm, *args: Any, **options: Any) -> Any:
            self.strike(vmm.pid)
            return real(vmm, *args, **options)

        self._monkeypatch.setattr(Vmm, phase, killed_first)

    def in_the_middle_of(self, phase: str) -> None:
        """Once the memory has been written, before the device state is taken."""
        real: Callable[..., Any] = getattr(Vmm, phase)
        real_write = GuestMemory.write
        pids: dict[int, int] = {}

        def begun(vmm: Vmm, *args: Any, **options: Any) -> Any:
            pids[id(vmm.memory)] = vmm.pid
            return real(vmm, *args, **options)

        def write(memory: GuestMemory, *args: Any) -> None:
            real_write(memory, *args)
            pid = pids.pop(id(memory), None)
            if pid is not None:
                self.strike(pid)

        self._monkeypatch.setattr(Vmm, phase, begun)
        self._monkeypatch.setattr(GuestMemory, "write", write)

    async def require_all_reaped(self) -> None:
        assert self.victims
        async with asyncio.timeout(DEADLINE_S):
            while any(psutil.pid_exists(pid) for pid in self.victims):
                await asyncio.sleep(0.01)


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Killer:
    return Killer(monkeypatch)


async def test_vmms_killed_while_they_start(
    engine: MicroVMEngine, machine: MicroVMSandbox, killer: Killer
) -> None:
    checkpoint = await machine.checkpoint()
    await engine.drain()
    killer.when_started()
    killer.arm(3)
    async with asyncio.timeout(DEADLINE_S):
        done = await asyncio.gather(*(engine.fork(checkpoint) for _ in range(4)), return_exceptions=True)
    failures = [each for each in done if isinstance(each, BaseException)]
    assert all(isinstance(each, BootError | ForkError) for each in failures)
    killer.arm(0)
    [clone] = await engine.fork(checkpoint)
    assert await clone.call("ping") is None
    assert engine.num_sandboxes == 1 + 4 - len(failures) + 1
    await killer.require_all_reaped()


@pytest.fixture
def without_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every VMM starts as a program, and becomes its first checkpoint by `assign`."""
    monkeypatch.setattr(source, "_MAX_FAILURES", 0)


@pytest.mark.parametrize("moment", ["before", "in_the_middle_of"])
@pytest.mark.usefixtures("without_prototypes")
async def test_a_vmm_killed_while_it_becomes_a_checkpoint(
    engine: MicroVMEngine, machine: MicroVMSandbox, killer: Killer, moment: str
) -> None:
    checkpoint = await machine.checkpoint()
    getattr(killer, moment)("assign")
    killer.arm(1)
    async with asyncio.timeout(DEADLINE_S):
        try:
            clones = await engine.fork(checkpoint, 3)
        except ForkError:
            clones = []
        else:  # it was one that the pool was warming up
            assert len(clones) == 3
    assert engine.num_sandboxes == 1 + len(clones)
    for clone in [*clones, *await engine.fork(checkpoint, 3)]:
        assert await clone.call("ping") is None
    await killer.require_all_reaped()


@pytest.mark.parametrize("moment", ["before", "in_the_middle_of"])
async def test_a_vmm_killed_while_it_is_put_back_costs_nothing(
    engine: MicroVMEngine, machine: MicroVMSandbox, killer: Killer, moment: str
) -> None:
    await machine.write_file("/tmp/note", b"kept")
    checkpoint = await machine.checkpoint()
    getattr(killer, moment)("rewind")
    killer.arm(1)
    async with asyncio.timeout(DEADLINE_S):
        while not killer.victims:
            [clone] = await engine.fork(checkpoint)
            assert await clone.read_file("/tmp/note") == b"kept"
            await clone.kill()
            await asyncio.sleep(0.05)
    assert engine.num_sandboxes == 1
    await killer.require_all_reaped()


@pytest.mark.parametrize("phase", ["_send_save", "_receive_save"])
async def test_a_vmm_killed_while_it_is_saved(
    engine: MicroVMEngine, machine: MicroVMSandbox, killer: Killer, phase: str
) -> None:
    earlier = await machine.checkpoint()
    await machine.write_file("/tmp/note", b"late")
    killer.before(phase)
    killer.arm(1)
    async with asyncio.timeout(DEADLINE_S):
        try:
            whole = await machine.checkpoint()
        except CheckpointError:
            whole = None
        with pytest.raises(GuestError):
            await machine.call("ping")
    assert engine.num_sandboxes == 0
    [clone] = await engine.fork(earlier)
    with pytest.raises(GuestError, match="No such file"):
        await clone.read_file("/tmp/note")
    if whole is not None:  # it had given all of its state before it was killed
        [clone] = await engine.fork(whole)
        assert await clone.read_file("/tmp/note") == b"late"
    await killer.require_all_reaped()


@pytest.mark.parametrize("step_s", [DAY_S, -DAY_S])
async def test_a_step_of_the_hosts_clock(
    engine: MicroVMEngine, machine: MicroVMSandbox, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    async def clocks_s(sandbox: Any) -> tuple[float, float]:
        told = await sandbox.exec(["sh", "-c", "date +%s; cat /proc/uptime"])
        wall, uptime, _ = told.stdout.split()
        return float(wall), float(uptime)

    real_time = client_module.time.time
    wall_before_s, uptime_before_s = await clocks_s(machine)
    await machine.spawn(["sleep", "3"], timeout_s=DEADLINE_S)
    checkpoint = await machine.checkpoint()
    monkeypatch.setattr(client_module, "time", SimpleNamespace(time=lambda: real_time() + step_s))
    wall_s, _ = await clocks_s(machine)
    assert abs(wall_s - wall_before_s) < DAY_S / 2, "nothing happens between handshakes"
    [clone] = await engine.fork(checkpoint)
    wall_s, uptime_s = await clocks_s(clone)
    assert abs(wall_s - (real_time() + step_s)) < DAY_S / 2, "the wall clock follows at a handshake"
    assert uptime_before_s <= uptime_s < uptime_before_s + DAY_S / 2, "the monotonic clock does not"
    for sandbox in (machine, clone):
        [command] = await sandbox.commands()
        async with asyncio.timeout(DEADLINE_S):
            result = await command.wait()
        assert (result.exit_code, result.timed_out) == (0, False), "time limits are of the monotonic clock"
        late = await sandbox.exec(["sleep", "100"], timeout_s=1.0)
        assert late.timed_out
    await machine.hibernate()
    wall_s, _ = await clocks_s(machine)
    assert abs(wall_s - (real_time() + step_s)) < DAY_S / 2, "waking is a handshake, too"
