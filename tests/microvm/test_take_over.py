"""Children that go on in the machine of their parent: machines that are killed, hibernated or busy."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from envs.gym import GymEnv
from rollout.branch import BranchJob
from rollout.config import ImageConfig
from rollout.env import Task
from rollout.errors import CheckpointError, ForkError, GuestError
from rollout.sandbox.branching import LocalBrancher
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


async def test_it_is_the_same_machine_with_a_new_identity_of_its_own(lake: MicroVMSandbox) -> None:
    await lake.exec(["sh", "-c", "head -c 16 /dev/urandom > /tmp/mark"])
    checkpoint = await lake.checkpoint()
    pid, generation = lake.pid, lake.generation
    await lake.take_over(Randomness())
    assert (lake.pid, lake.generation, lake.parent_id) == (pid, generation + 1, checkpoint.id)
    assert (await lake.exec(["hostname"])).stdout.decode().strip() == lake.id
    draws = {(await lake.exec(["sh", "-c", "head -c 16 /dev/urandom | od -x"])).stdout}
    for _ in range(2):
        await lake.checkpoint()
        await lake.take_over(Randomness())
        draws.add((await lake.exec(["sh", "-c", "head -c 16 /dev/urandom | od -x"])).stdout)
    assert len(draws) == 3


async def test_a_machine_that_was_killed_cannot_be_taken_over(
    engine: MicroVMEngine, lake: MicroVMSandbox
) -> None:
    checkpoint = await lake.checkpoint()
    assert lake.pid is not None
    os.kill(lake.pid, signal.SIGKILL)
    with pytest.raises(ForkError):
        await lake.take_over(INHERIT)
    assert lake.state == "dead"
    with pytest.raises(GuestError):
        await lake.take_over(INHERIT)
    assert len(await engine.fork(checkpoint)) == 1


async def test_one_that_runs_between_requests_has_always_gone_on(lake: MicroVMSandbox) -> None:
    lake.keep_running(True)
    await lake.checkpoint()
    with pytest.raises(CheckpointError, match="gone on"):
        await lake.take_over(INHERIT)
    assert await lake.call("ping") is None


async def test_a_child_of_a_machine_that_was_killed_is_cloned(engine: MicroVMEngine) -> None:
    carrier = LocalBrancher(engine, GymEnv(env_id="FrozenLake-v1"), concurrency=2)
    opening = await carrier.open(Task("only"), 0)
    [heir] = engine._sandboxes.values()  # pyright: ignore[reportPrivateUsage]
    assert heir.pid is not None
    os.kill(heir.pid, signal.SIGKILL)
    [result] = await carrier.run([BranchJob(opening.checkpoint, (0,), INHERIT)])
    assert result.failure is None
    assert carrier.stats.ways.keys() == {"clone"}
    assert result.checkpoint is not None
    await carrier.release([opening.checkpoint, result.checkpoint])
    assert engine.num_sandboxes == 0


async def test_an_heir_that_hibernates_is_woken_for_its_child(engine: MicroVMEngine) -> None:
    carrier = LocalBrancher(engine, GymEnv(env_id="FrozenLake-v1"), concurrency=2)
    opening = await carrier.open(Task("only"), 0)
    [heir] = engine._sandboxes.values()  # pyright: ignore[reportPrivateUsage]
    await until(lambda: heir.state == "parked")
    assert await heir.hibernate_if_parked()
    assert heir.pid is None
    [result] = await carrier.run([BranchJob(opening.checkpoint, (0,), INHERIT)])
    assert result.failure is None
    assert carrier.stats.ways.keys() == {"continue"}
