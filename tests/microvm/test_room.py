"""Who hibernates, and when: by policy, and on real machines."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import CapacityError, GuestError
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.microvm import room as room_module
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.room import MACHINE_BYTES, Room, available_bytes, choose
from rollout.sandbox.microvm.sandbox import MicroVMSandbox

_missing = what_is_missing("microvm", ImageConfig())
DEADLINE_S = 20.0
STATES = ["running", "parked", "hibernated", "dead"]


@dataclass
class Fake:
    """A sandbox that holds one machine's memory while it is parked."""

    last_used_s: float
    state: str = "parked"
    breaks: bool = False
    is_used: bool = False

    async def hibernate_if_parked(self) -> bool:
        await asyncio.sleep(0)
        if self.breaks:
            self.state = "dead"
            raise GuestError("gone")
        if not self.is_used:
            self.state = "hibernated"
        return not self.is_used


@given(
    idlers=st.lists(
        st.tuples(st.floats(0, 100), st.sampled_from(["running", "parked", "hibernated", "dead"])),
        max_size=20,
    ),
    after_s=st.none() | st.floats(1, 200),
    num_wanted=st.integers(0, 25),
)
def test_the_longest_idle_go_first(idlers, after_s, num_wanted) -> None:
    everyone = [Fake(used_s, state) for used_s, state in idlers]
    chosen = choose(everyone, 100.0, after_s, num_wanted)
    parked = [one for one in everyone if one.state == "parked"]
    overdue = [one for one in parked if after_s is not None and 100.0 - one.last_used_s >= after_s]
    assert len(chosen) == min(len(parked), max(num_wanted, len(overdue)))
    stay = [one.last_used_s for one in parked if not any(one is other for other in chosen)]
    assert all(one.last_used_s <= used_s for one in chosen for used_s in stay)


def room_of(everyone: list[Fake], total: int) -> Room:
    """Room on a host with memory for so many machines."""

    def available() -> int:
        return (total - sum(one.state in ("parked", "running") for one in everyone)) * MACHINE_BYTES

    return Room(lambda: everyone, MACHINE_BYTES, None, available=available)


async def test_room_is_made_by_who_was_idle_longest() -> None:
    everyone = [Fake(5.0), Fake(1.0), Fake(3.0, "running"), Fake(2.0, breaks=True)]
    room = room_of(everyone, total=5)
    async with room.for_one():
        assert [one.state for one in everyone] == ["parked", "hibernated", "running", "parked"]
        async with room.for_one():
            assert [one.state for one in everyone] == ["parked", "hibernated", "running", "dead"]
    await room.close()


async def test_where_nobody_is_idle_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room_module, "_PATIENCE_S", 0.1)
    everyone = [Fake(1.0, "running") for _ in range(3)]
    room = room_of(everyone, total=3)
    with pytest.raises(CapacityError, match="no sandbox is idle"):
        async with room.for_one():
            pass
    await room.close()


async def test_who_needs_memory_waits_until_somebody_is_idle() -> None:
    everyone = [Fake(1.0, "running") for _ in range(3)]
    room = room_of(everyone, total=3)
    waiting = asyncio.create_task(room.to_grow())
    await asyncio.sleep(0.2)
    assert not waiting.done()
    everyone[1].state = "parked"
    await waiting
    assert everyone[1].state == "hibernated"
    await room.close()


async def test_who_is_used_again_is_not_waited_for() -> None:
    everyone = [Fake(1.0, is_used=True), Fake(2.0, is_used=True)]
    room = room_of(everyone, total=3)
    async with room.for_one():
        assert [one.state for one in everyone] == ["parked", "parked"]
    await room.close()


def test_memory_is_counted() -> None:
    assert 0 < available_bytes() < 1 << 50


@pytest.mark.microvm
@pytest.mark.xdist_group("microvm")
@pytest.mark.skipif(_missing is not None, reason=_missing or "")
class TestMachines:
    async def test_an_idle_machine_hibernates_and_comes_back(self) -> None:
        config = EngineConfig(kind="microvm", hibernate_after_s=0.2)
        async with MicroVMEngine(config, ImageConfig()) as engine:
            machine = await engine.boot("default")
            assert isinstance(machine, MicroVMSandbox)
            await machine.write_file("note", b"kept")
            name = (await machine.exec(["hostname"])).stdout
            give_up_at_s = time.monotonic() + DEADLINE_S
            while machine.state != "hibernated":
                assert time.monotonic() < give_up_at_s
                await asyncio.sleep(0.05)
            assert machine.pid is None
            assert await machine.read_file("note") == b"kept"
            assert (await machine.exec(["hostname"])).stdout == name

    async def test_under_pressure_all_live_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Memory for three machines, and eight that live."""
        async with MicroVMEngine(EngineConfig(kind="microvm"), ImageConfig()) as engine:
            root = await engine.boot("default")
            await root.call("env.make", env_id="FrozenLake-v1", kwargs={"is_slippery": False})
            await root.call("env.reset", seed=1)
            checkpoint = await root.checkpoint()
            await root.kill()

            def available() -> int:
                awake = sum(one.pid is not None for one in engine._sandboxes.values())
                return (1024 << 20) + (3 - awake) * MACHINE_BYTES

            monkeypatch.setattr(engine._reviver.room, "_available", available)
            clones = []
            for number in range(8):
                clones += await engine.fork(checkpoint, 1)
                await clones[-1].write_file("number", str(number).encode())
                while clones[-1].state != "parked":
                    await asyncio.sleep(0.01)
            states = [clone.state for clone in clones]
            assert states.count("hibernated") >= 5
            assert states[-1] == "parked", "the last used stays"
            steps = await asyncio.gather(*(clone.call("env.step", action=1) for clone in clones))
            assert len(steps) == 8
            for number, clone in enumerate(clones):
                assert await clone.read_file("number") == str(number).encode()


@pytest.mark.parametrize("has_own_group", [True, False])
def test_cache_of_a_control_group_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_own_group: bool
) -> None:
    """The files of both versions of control groups, the process's own group first where it is to be seen."""
    monkeypatch.setattr(room_module, "_CGROUP", tmp_path)
    monkeypatch.setattr(room_module, "_own_group", lambda mount: "a/group")
    for mount, limit, usage, cache in (
        (tmp_path, "memory.max", "memory.current", "inactive_file"),
        (tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        group = mount / "a/group" if has_own_group else mount
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{64 << 20}\n")
        (group / usage).write_text(f"{60 << 20}\n")
        (group / "memory.stat").write_text(f"anon 1\n{cache} {20 << 20}\nactive_file 7\n")
    assert available_bytes() == 24 << 20
