"""Ends of sandboxes that come at a bad moment: while one wakes, and while who ends it is cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import psutil
import pytest

from rollout.config import ImageConfig
from rollout.errors import GuestError
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.reviver import Reviver
from rollout.sandbox.microvm.sandbox import MicroVMSandbox

_missing = what_is_missing("microvm", ImageConfig())
pytestmark = [
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
]
DEADLINE_S = 10.0


async def test_one_that_is_killed_while_it_wakes_has_no_machine_afterwards(
    engine: MicroVMEngine, machine: MicroVMSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    await machine.hibernate()
    for stock in engine.stocks._stocks.values():
        await stock.source.origin()
    await engine.drain()
    num_standing = num_vmms()  # the template of VMMs, and a family without forks
    has_begun, goes_on, greet = asyncio.Event(), asyncio.Event(), Reviver.greet

    async def slowly(*args: Any) -> None:
        """Shakes hands with a machine that runs already."""
        has_begun.set()
        await goes_on.wait()
        await greet(*args)

    monkeypatch.setattr(Reviver, "greet", slowly)
    waking = asyncio.create_task(machine.wake())
    await asyncio.wait_for(has_begun.wait(), DEADLINE_S)
    killing = asyncio.create_task(machine.kill())
    await asyncio.sleep(0)
    goes_on.set()
    await killing
    with pytest.raises(GuestError, match="has been killed"):
        await waking
    assert machine.pid is None
    await engine.drain()
    give_up_at_s = time.monotonic() + DEADLINE_S
    while num_vmms() > num_standing:
        assert time.monotonic() < give_up_at_s, "a VMM is left that nobody has"
        await asyncio.sleep(0.01)


def num_vmms() -> int:
    """Processes of QEMU below this one that have not ended."""
    num_found = 0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            num_found += "qemu" in child.name() and child.status() != psutil.STATUS_ZOMBIE
    return num_found


async def test_a_kill_that_is_cancelled_goes_on(engine: MicroVMEngine, machine: MicroVMSandbox) -> None:
    await machine.call("ping")
    killing = asyncio.create_task(machine.kill())
    await asyncio.sleep(0)
    killing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await killing
    await machine.kill()
    assert engine.num_sandboxes == 0
