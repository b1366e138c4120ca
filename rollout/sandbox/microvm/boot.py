"""Boots a machine into a memory file and warms it up: the content of a base."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from rollout.errors import BootError, GuestError, RolloutError
from rollout.sandbox.client import GuestClient
from rollout.sandbox.microvm.machine import BootFiles, MachineShape
from rollout.sandbox.microvm.memory import has_pagemap_scan
from rollout.sandbox.microvm.spawner import Spawner
from rollout.sandbox.microvm.starting import start_vmm
from rollout.types import Randomness

__all__ = ["InThread", "boot_into"]

T = TypeVar("T")
_SETTLE_S = 0.2
"""A guest that has just answered has work queued (page cache, timers): let it be in the base."""


class InThread(Protocol):
    """Runs blocking work in a worker thread."""

    def __call__(self, function: Callable[[], T], /) -> Awaitable[T]:
        """What the function returns."""
        ...


async def boot_into(
    fd: int,
    shape: MachineShape,
    files: BootFiles,
    spawner: Spawner,
    warm_up: Sequence[str],
    in_thread: InThread,
    *,
    timeout_s: float,
) -> bytes:
    """Boots a machine into a memory file, warms it up and stops it for ever; returns its device state.

    Args:
        fd: The memory file, as large as the machine's memory.
        shape: The machine.
        files: What it boots from.
        spawner: Starts its VMM.
        warm_up: Commands of its shell, run one after the other.
        in_thread: Runs blocking work.
        timeout_s: Deadline of each step.

    Raises:
        BootError: The guest did not come up, or a command failed.
    """
    vmm = await in_thread(
        lambda: start_vmm(
            spawner, shape, files, fd, make_base=True, use_scan=has_pagemap_scan(), timeout_s=timeout_s
        )
    )
    client = await GuestClient.connect(vmm.channel.dup())
    try:
        await client.hello(0, Randomness(), hostname="base", timeout_s=timeout_s)
        for command in warm_up:
            done = await client.exec(["/bin/sh", "-c", command], timeout_s=timeout_s)
            if done.exit_code != 0:
                words = done.stderr.decode(errors="replace").strip().splitlines()
                raise BootError(f"warm-up {command!r} exits {done.exit_code}: {words[-1:]}")
        await asyncio.sleep(_SETTLE_S)
        return await in_thread(lambda: vmm.save_base(timeout_s))
    except GuestError as error:
        raise BootError(f"the guest did not come up: {error.message}; {vmm.child.log()}") from error
    except RolloutError as error:
        raise BootError(f"no base could be made: {error.message}") from error
    finally:
        vmm.kill()
        await client.close()
