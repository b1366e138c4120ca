"""What is the microvm engine's own, beside the shared contract: real machines, killed in every phase."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import BootError, CapacityError, CheckpointError, ForkError, GuestError
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.sandbox import MicroVMSandbox
from rollout.types import Randomness, RngPolicy

_missing = what_is_missing("microvm", ImageConfig())
pytestmark = [
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
]
INHERIT = Randomness(RngPolicy.INHERIT)
DEADLINE_S = 20.0


async def until(condition) -> None:
    """Waits for a state that must come; a state that never comes fails the test."""
    give_up_at_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < give_up_at_s, "it never came"
        await asyncio.sleep(0.01)


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


async def test_an_idle_machine_is_parked_and_uses_no_cpu(machine: MicroVMSandbox) -> None:
    await machine.call("ping")
    await until(lambda: machine.state == "parked")
    assert machine.pid is not None
    before_s = cpu_s(machine.pid)
    await asyncio.sleep(1.0)
    assert cpu_s(machine.pid) - before_s < 0.015, "more than a tick of the kernel's accounting"
    assert (await machine.exec(["echo", "back"])).stdout == b"back\n"


async def test_programs_of_a_guest_can_talk_to_each_other(machine: MicroVMSandbox) -> None:
    talk = (
        "import socket, threading\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "threading.Thread(target=lambda: server.accept()[0].sendall(b'hello')).start()\n"
        "print(socket.create_connection(server.getsockname()).recv(5).decode())\n"
    )
    assert (await machine.exec(["python3", "-c", talk])).stdout == b"hello\n"


async def test_guest_time_stands_still_while_parked(machine: MicroVMSandbox) -> None:
    async def uptime_s() -> float:
        return float((await machine.exec(["cat", "/proc/uptime"])).stdout.split()[0])

    before_s = await uptime_s()
    await until(lambda: machine.state == "parked")
    await asyncio.sleep(3.0)
    assert await uptime_s() - before_s < 2.5


async def test_background_work_goes_on_when_asked_to(machine: MicroVMSandbox) -> None:
    counter = "i=0; while true; do i=$((i+1)); echo $i > /tmp/counter; sleep 0.05; done"
    await machine.call("spawn", argv=["sh", "-c", counter])
    machine.keep_running(True)
    await asyncio.sleep(1.5)
    first = int(await machine.read_file("/tmp/counter"))
    await asyncio.sleep(1.0)
    assert int(await machine.read_file("/tmp/counter")) > first
    machine.keep_running(False)
    await until(lambda: machine.state == "parked")


async def test_restore_at_depth_names_few_blocks(engine: MicroVMEngine, lake: MicroVMSandbox) -> None:
    checkpoint = await lake.checkpoint()
    for depth in range(12):
        [clone] = await engine.fork(checkpoint, randomness=[INHERIT])
        await clone.write_file("/tmp/depth", str(depth).encode())
        checkpoint = await clone.checkpoint()
        await clone.kill()
    [deepest] = await engine.fork(checkpoint)
    assert await deepest.read_file("/tmp/depth") == b"11"


async def test_a_child_stores_less_than_its_parent(engine: MicroVMEngine, lake: MicroVMSandbox) -> None:
    parent = await lake.checkpoint()
    [clone] = await engine.fork(parent)
    await clone.call("env.step", action=1)
    child = await clone.checkpoint()
    assert child.private_bytes < parent.private_bytes / 2


async def test_hibernation_keeps_state_files_and_name(engine: MicroVMEngine, lake: MicroVMSandbox) -> None:
    await lake.write_file("/tmp/note", b"kept")
    name = (await lake.exec(["hostname"])).stdout
    before = await lake.call("env.step", action=1)
    await lake.hibernate()
    await lake.hibernate()
    assert (lake.state, lake.pid) == ("hibernated", None)
    assert engine.num_sandboxes == 1
    checkpoint = await lake.checkpoint()
    assert await lake.read_file("/tmp/note") == b"kept"
    assert (await lake.exec(["hostname"])).stdout == name
    after = await lake.call("env.step", action=1)
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert (before["observation"], after["observation"]) == (4, 8)
    [clone] = await engine.fork(checkpoint)
    step = await clone.call("env.step", action=1)
    assert isinstance(step, dict)
    assert step["observation"] == 8


async def test_requests_during_a_checkpoint_wait_for_it(
    engine: MicroVMEngine, machine: MicroVMSandbox
) -> None:
    slow = asyncio.create_task(machine.exec(["sh", "-c", "sleep 0.3; echo slow"]))
    await asyncio.sleep(0.1)
    saving = asyncio.create_task(machine.checkpoint())
    await asyncio.sleep(0)
    quick = asyncio.create_task(machine.exec(["echo", "quick"]))
    assert (await slow).stdout == b"slow\n"
    checkpoint = await saving
    assert (await quick).stdout == b"quick\n"
    [clone] = await engine.fork(checkpoint)
    assert (await clone.exec(["echo", "clone"])).stdout == b"clone\n"


async def test_a_killed_vmm_is_noticed_at_once(machine: MicroVMSandbox) -> None:
    assert machine.pid is not None
    call = asyncio.create_task(machine.exec(["sleep", "100"], timeout_s=120))
    await asyncio.sleep(0.2)
    os.kill(machine.pid, signal.SIGKILL)
    with pytest.raises(GuestError):
        await asyncio.wait_for(call, DEADLINE_S)
    with pytest.raises(GuestError, match="killed"):
        await machine.call("ping")
    with pytest.raises(GuestError):
        await machine.checkpoint()


@pytest.mark.parametrize("state", ["parked", "running"])
async def test_a_vmm_killed_before_a_checkpoint(machine: MicroVMSandbox, state: str) -> None:
    if state == "parked":
        await until(lambda: machine.state == "parked")
    assert machine.pid is not None
    os.kill(machine.pid, signal.SIGKILL)
    with pytest.raises((CheckpointError, GuestError)):
        await machine.checkpoint()
    assert machine.state == "dead"


async def test_an_agent_that_dies_ends_its_machine(machine: MicroVMSandbox) -> None:
    with pytest.raises(GuestError):
        await asyncio.wait_for(machine.exec(["sh", "-c", "kill -9 $PPID; sleep 60"]), DEADLINE_S)
    assert machine.state == "dead"


async def test_a_guest_that_stops_answering(engine: MicroVMEngine, machine: MicroVMSandbox) -> None:
    [clone] = await engine.fork(await machine.checkpoint())
    assert isinstance(clone, MicroVMSandbox)
    assert clone.pid is not None
    os.kill(clone.pid, signal.SIGSTOP)
    with pytest.raises(GuestError, match="did not answer"):
        await clone.call("ping", timeout_s=0.5)
    assert clone.state == "dead"


async def test_dormant_vmms_that_were_killed_do_not_lose_a_fork(
    engine: MicroVMEngine, machine: MicroVMSandbox
) -> None:
    checkpoint = await machine.checkpoint()
    parent = psutil.Process(machine.pid).parent()
    assert parent is not None
    dormant = [child for child in parent.children() if child.pid != machine.pid]
    assert dormant
    for child in dormant:
        child.kill()
    psutil.wait_procs(dormant, timeout=DEADLINE_S)
    for clone in await engine.fork(checkpoint, len(dormant) + 1):
        await clone.call("ping")


async def test_a_killed_launcher_takes_every_vmm_with_it(
    engine: MicroVMEngine, machine: MicroVMSandbox
) -> None:
    checkpoint = await machine.checkpoint()
    vmms = [child for child in psutil.Process().children(recursive=True) if "qemu" in child.name()]
    assert vmms
    launcher = psutil.Process(machine.pid).parent()
    assert launcher is not None
    launcher.kill()
    await until(lambda: not any(vmm.is_running() and vmm.status() != "zombie" for vmm in vmms))
    with pytest.raises(GuestError):
        await machine.call("ping")
    failures = await asyncio.gather(*(engine.fork(checkpoint) for _ in range(5)), return_exceptions=True)
    assert all(isinstance(failure, BootError | ForkError) for failure in failures)


OWNER = """
import asyncio, sys
from rollout.config import EngineConfig, ImageConfig
from rollout.sandbox.microvm.engine import MicroVMEngine

async def main():
    async with MicroVMEngine(EngineConfig(kind="microvm"), ImageConfig()) as engine:
        machine = await engine.boot("default")
        await engine.fork(await machine.checkpoint(), 3)
        print("ready", flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


def test_a_killed_owner_leaves_nothing(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        below = psutil.Process(owner.pid).children(recursive=True)
        assert sum("qemu" in child.name() for child in below) >= 4
    finally:
        owner.kill()
        owner.communicate()
    psutil.wait_procs(below, timeout=DEADLINE_S)
    assert [child for child in below if child.is_running() and child.status() != "zombie"] == []


async def test_no_more_than_max_sandboxes() -> None:
    config = EngineConfig(kind="microvm", max_sandboxes=2)
    async with MicroVMEngine(config, ImageConfig()) as engine:
        machine = await engine.boot("default")
        checkpoint = await machine.checkpoint()
        with pytest.raises(CapacityError, match="max_sandboxes=2"):
            await engine.fork(checkpoint, 2)
        assert engine.num_sandboxes == 1
        [clone] = await engine.fork(checkpoint, 1)
        await clone.kill()
        await engine.fork(checkpoint, 1)


async def test_an_image_that_is_not_there(engine: MicroVMEngine) -> None:
    with pytest.raises(BootError, match="rollout image build"):
        await engine.boot("no-such-image")


PROBE = """
import os, random, time, uuid
import gymnasium
import numpy as np

class Probe(gymnasium.Env):
    observation_space = gymnasium.spaces.Discrete(1)
    action_space = gymnasium.spaces.Discrete(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        return 0, 0.0, False, False, {
            "kernel": os.urandom(8).hex(),
            "uuid": str(uuid.uuid4()),
            "python": random.random(),
            "numpy": float(np.random.random()),
            "env": float(self.np_random.random()),
            "host": os.uname().nodename,
            "clock_s": time.time(),
        }

gymnasium.register("Probe-v0", Probe)
"""


async def drawn_by_clones(
    engine: MicroVMEngine, machine: MicroVMSandbox, how: list[Randomness]
) -> list[dict]:
    """What one step of the probe draws in each of as many clones, ten at a time."""
    await machine.write_file("/opt/rollout/probe.py", PROBE.encode())
    await machine.call("env.make", env_id="probe:Probe-v0")
    await machine.call("env.reset", seed=1)
    checkpoint = await machine.checkpoint()
    await machine.kill()
    drawn: list[dict] = []
    for begin in range(0, len(how), 10):
        policies = how[begin : begin + 10]
        clones = await engine.fork(checkpoint, len(policies), randomness=policies)
        try:
            steps = await asyncio.gather(*(clone.call("env.step", action=0) for clone in clones))
        finally:
            await asyncio.gather(*(clone.kill() for clone in clones))
        drawn += [dict(step["info"]) for step in steps if isinstance(step, dict)]
    return drawn


async def test_a_hundred_clones_are_a_hundred_machines(
    engine: MicroVMEngine, machine: MicroVMSandbox
) -> None:
    begun_s = time.time()
    drawn = await drawn_by_clones(engine, machine, [Randomness()] * 100)
    for name in ("kernel", "uuid", "python", "numpy", "env", "host"):
        assert len({each[name] for each in drawn}) == 100, f"{name} repeats"
    assert all(begun_s - 1 <= each["clock_s"] <= time.time() + 1 for each in drawn), "a clock is wrong"


async def test_seeded_clones_repeat_and_inheriting_ones_go_on(
    engine: MicroVMEngine, machine: MicroVMSandbox
) -> None:
    seeded, inherit = [Randomness.seeded(seed) for seed in (1, 1, 2)], [INHERIT, INHERIT]
    drawn = await drawn_by_clones(engine, machine, [*seeded, *inherit])
    streams = [tuple(each[name] for name in ("python", "numpy", "env")) for each in drawn]
    assert streams[0] == streams[1]
    assert streams[3] == streams[4]
    assert len(set(streams)) == 3
    for name in ("kernel", "uuid", "host"):
        assert len({each[name] for each in drawn}) == 5, f"{name} repeats, whatever the policy"
