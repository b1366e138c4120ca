"""Background commands of microVMs: they keep their machine running, and clones go on with them."""

from __future__ import annotations

import asyncio

import pytest

from rollout.config import ImageConfig
from rollout.errors import CheckpointError, GuestError
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.sandbox import MicroVMSandbox

_missing = what_is_missing("microvm", ImageConfig())
pytestmark = [
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
]
DEADLINE_S = 30.0
COUNT = "i=0; while [ ! -e /tmp/stop ]; do i=$((i+1)); echo $i > /tmp/count; sleep 0.05; done; echo counted"


async def until_parked(machine: MicroVMSandbox) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while machine.state != "parked":
            await asyncio.sleep(0.02)


async def until_it_counts(machine: MicroVMSandbox, beyond: int) -> int:
    """Asks seldom: between requests the machine must go on by itself."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            await asyncio.sleep(2.0)
            assert machine.state == "running"
            told = (await machine.read_file("/tmp/count")).strip()
            if told and int(told) > beyond:
                return int(told)


async def test_a_machine_runs_until_its_commands_have_ended(machine: MicroVMSandbox) -> None:
    command = await machine.spawn(["sh", "-c", COUNT])
    count = await until_it_counts(machine, 15)  # asking alone would not give it the time for that many
    await machine.checkpoint()
    await until_it_counts(machine, count + 15)
    await machine.write_file("/tmp/stop", b"")
    await until_parked(machine)
    assert (await command.wait()).stdout == b"counted\n"


async def test_a_clone_that_is_asked_for_its_commands_goes_on_with_them(
    engine: MicroVMEngine, machine: MicroVMSandbox
) -> None:
    await machine.spawn(["sh", "-c", COUNT])
    [clone] = await engine.fork(await machine.checkpoint())
    assert isinstance(clone, MicroVMSandbox)
    await until_parked(clone)
    [inherited] = await clone.commands()
    await until_it_counts(clone, 15)
    await inherited.kill()
    await until_parked(clone)
    assert (await inherited.wait()).exit_code == -9
    assert len(await machine.commands()) == 1


async def test_it_is_not_saved_while_its_commands_are_listened_to(machine: MicroVMSandbox) -> None:
    command = await machine.spawn(["sh", "-c", COUNT])
    waiting = asyncio.create_task(command.wait())
    await machine.call("ping")
    for attempt in (machine.checkpoint(), machine.hibernate()):
        with pytest.raises(CheckpointError, match="listened to"):
            await attempt
    assert await machine.call("ping") is None
    waiting.cancel()
    await asyncio.wait([waiting])
    assert [each.number for each in await machine.commands()] == [command.number]
    await machine.kill()
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(GuestError):
            await command.wait()
        with pytest.raises(GuestError):
            await command.kill()
        with pytest.raises(GuestError):
            await machine.spawn(["true"])
