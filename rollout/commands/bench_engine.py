"""An engine with an episode begun in it: what every section of the sandbox benchmark measures on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rollout.commands.bench_gvisor import GvisorRival
from rollout.commands.bench_rival import BareFigures
from rollout.commands.bench_row import BenchRow
from rollout.env import Env
from rollout.sandbox.base import Checkpoint, Engine, Sandbox

__all__ = ["ENGINE_KINDS", "STAY", "Bench", "EngineKind", "Rivals", "Section"]

EngineKind = Literal["inline", "process", "microvm"]
ENGINE_KINDS: tuple[EngineKind, ...] = ("inline", "process", "microvm")

STAY = 0
"""The action that bumps into the wall: the episode goes on for as long as its limit of 100 steps allows."""


@dataclass(frozen=True, slots=True)
class Rivals:
    """What the engines' figures stand beside, measured once a run."""

    bare: BareFigures
    start_ms: Sequence[float]
    gvisor: GvisorRival


@dataclass(frozen=True, slots=True)
class Bench:
    """An engine with an episode of FrozenLake begun in it.

    Attributes:
        kind: Which engine.
        engine: The engine.
        env: FrozenLake 4x4, not slippery.
        root: The checkpoint after the reset.
        samples: Measurements of each figure.
        cycles: Create-and-destroy cycles of the leak count.
        live: Sandboxes that are alive at once in the crowd; 0 leaves it out.
        rivals: What to stand beside.
        boot_ms: How long the cold boot took, environment made, reset and saved.
        image: What is booted.
        scratch: The engine's folder for files.
    """

    kind: EngineKind
    engine: Engine
    env: Env
    root: Checkpoint
    samples: int
    cycles: int
    live: int
    rivals: Rivals
    boot_ms: float
    image: str
    scratch: Path

    async def clone(self, checkpoint: Checkpoint | None = None) -> Sandbox:
        """One clone, of the root unless told otherwise."""
        (sandbox,) = await self.engine.fork(checkpoint or self.root)
        return sandbox

    async def stepped(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint one step further, its sandbox ended."""
        async with await self.clone(checkpoint) as sandbox:
            await self.env.step(sandbox, STAY)
            return await sandbox.checkpoint()


Section = Callable[[Bench], AsyncIterator[BenchRow]]
"""Measures something on a `Bench` and yields a row for each figure, as soon as it is there."""
