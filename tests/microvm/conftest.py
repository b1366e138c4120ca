from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from rollout.config import EngineConfig, ImageConfig
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.sandbox import MicroVMSandbox

FROZEN_LAKE = {"env_id": "FrozenLake-v1", "kwargs": {"is_slippery": False}}


@pytest.fixture
async def engine() -> AsyncIterator[MicroVMEngine]:
    async with MicroVMEngine(EngineConfig(kind="microvm"), ImageConfig()) as engine:
        yield engine


@pytest.fixture
async def machine(engine: MicroVMEngine) -> MicroVMSandbox:
    """The first rung: a booted machine."""
    sandbox = await engine.boot("default")
    assert isinstance(sandbox, MicroVMSandbox)
    return sandbox


@pytest.fixture
async def lake(machine: MicroVMSandbox) -> MicroVMSandbox:
    """The next rung: an episode of FrozenLake has begun in it."""
    await machine.call("env.make", **FROZEN_LAKE)
    await machine.call("env.reset", seed=1)
    return machine
