"""A checkpoint as a base: what it saves, and when it is left alone."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import pytest

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import CheckpointError
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.room import available_bytes
from rollout.sandbox.microvm.sandbox import MicroVMSandbox

_missing = what_is_missing("microvm", ImageConfig())
pytestmark = [
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
]


async def num_pages_of_a_clone(engine: MicroVMEngine, checkpoint) -> int:
    """Pages that a clone has of its own after a step."""
    [clone] = await engine.fork(checkpoint)
    await clone.call("env.step", action=0)
    saved = await clone.checkpoint()
    return len(engine.content_of(saved)[0].page_numbers)


async def test_clones_of_a_base_have_few_pages_of_their_own(
    engine: MicroVMEngine, lake: MicroVMSandbox
) -> None:
    checkpoint = await lake.checkpoint()
    before = await num_pages_of_a_clone(engine, checkpoint)
    await engine.rebase(checkpoint)
    assert await num_pages_of_a_clone(engine, checkpoint) < before / 2
    again = await lake.checkpoint()
    assert len(engine.content_of(again)[0].page_numbers) >= before / 2, "it goes on where it was"


async def test_where_memory_is_short_a_checkpoint_stays_as_it_is(machine: MicroVMSandbox) -> None:
    reserve_mib = available_bytes() // (2 << 20)
    async with MicroVMEngine(
        EngineConfig(kind="microvm", memory_reserve_mib=reserve_mib), ImageConfig()
    ) as engine:
        sandbox = await engine.boot("default")
        checkpoint = await sandbox.checkpoint()
        content = engine.content_of(checkpoint)[0]
        await engine.rebase(checkpoint)
        assert engine.content_of(checkpoint)[0] is content


async def test_bases_are_given_back_with_the_engine(engine: MicroVMEngine, lake: MicroVMSandbox) -> None:
    checkpoint = await lake.checkpoint()
    before = num_guest_memories()
    for _ in range(2):
        await engine.rebase(checkpoint)
    assert num_guest_memories() > before
    await engine.close()
    gc.collect()  # views of their pages
    assert num_guest_memories() == 0


async def test_what_is_gone_is_no_base(engine: MicroVMEngine, machine: MicroVMSandbox) -> None:
    checkpoint = await machine.checkpoint()
    await engine.discard(checkpoint)
    with pytest.raises(CheckpointError, match="unknown here"):
        await engine.rebase(checkpoint)


def num_guest_memories() -> int:
    """Memory files of guests that this process holds."""
    links: list[str] = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            links.append(str(descriptor.readlink()))
    return sum("guest-ram" in link for link in links)
