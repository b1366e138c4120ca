"""Public helpers for tests of engines, environments and runs: injected faults, and rows made comparable.

Nothing here pretends to be a sandbox. `FaultyEngine` wraps a real engine and makes chosen phases of it fail,
hang or take long, so that whoever uses engines can be shown to survive that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from rollout.errors import RolloutError
from rollout.sandbox.base import Capabilities, Checkpoint, Engine, PhaseTimings, Sandbox
from rollout.sandbox.commands import Command
from rollout.trajectory.rows import Trajectory
from rollout.types import ExecResult, Randomness, Value

__all__ = ["Fault", "FaultyEngine", "FaultySandbox", "comparable"]

T = TypeVar("T")

_NOT_COMPARABLE = {
    *("duration_s", "started_at", "checkpoint_id", "private_bytes", "episode_id"),
    *("engine", "fingerprint", "image_digest"),
}
"""What may differ between two plays of the same seed: times, ids, and what an engine says of itself."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens instead of a phase, or before it.

    Attributes:
        error: Raised instead of the phase; None lets it go on.
        delay_s: Seconds of waiting first.
    """

    error: RolloutError | None = None
    delay_s: float = 0.0


FaultPlan = Callable[[str, int], Fault | None]
"""Says what happens to the n-th call (from 0) of a phase; None for nothing.

Phases are "boot", "fork", "checkpoint", "take_over", "discard", and the agent's operations by name, such as
"env.step".
"""


def comparable(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as plain values without times and ids: equal for equal seeds on every engine."""
    return {
        "episode": _plain(asdict(trajectory.episode)),
        "steps": [_plain(asdict(step)) for step in trajectory.steps],
        "nodes": [_plain(asdict(node)) for node in trajectory.nodes],
    }


class FaultyEngine:
    """An engine with faults.

    Args:
        engine: The real one, which this one closes.
        plan: What goes wrong.
        synchronous: What its capabilities say; by default what the real engine says.
    """

    def __init__(self, engine: Engine, plan: FaultPlan, *, synchronous: bool | None = None) -> None:
        self._engine = engine
        self._plan = plan
        self._synchronous = engine.capabilities.synchronous if synchronous is None else synchronous
        self.counts: dict[str, int] = {}
        self.most_sandboxes = 0

    @property
    def capabilities(self) -> Capabilities:
        """Those of the real engine, but for `synchronous`."""
        return replace(self._engine.capabilities, synchronous=self._synchronous)

    @property
    def timings(self) -> PhaseTimings:
        """Those of the real engine."""
        return self._engine.timings

    @property
    def num_sandboxes(self) -> int:
        """Live sandboxes of the real engine."""
        return self._engine.num_sandboxes

    async def boot(self, image: str) -> Sandbox:
        """See `Engine.boot`."""
        return FaultySandbox(self, await self.phase("boot", lambda: self._engine.boot(image)))

    async def fork(
        self, checkpoint: Checkpoint, n: int = 1, *, randomness: Sequence[Randomness] | None = None
    ) -> list[Sandbox]:
        """See `Engine.fork`."""
        clones = await self.phase("fork", lambda: self._engine.fork(checkpoint, n, randomness=randomness))
        self.most_sandboxes = max(self.most_sandboxes, self._engine.num_sandboxes)
        return [FaultySandbox(self, clone) for clone in clones]

    async def rebase(self, checkpoint: Checkpoint) -> None:
        """See `Engine.rebase`."""
        await self.phase("rebase", lambda: self._engine.rebase(checkpoint))

    async def discard(self, checkpoint: Checkpoint) -> None:
        """See `Engine.discard`."""
        await self.phase("discard", lambda: self._engine.discard(checkpoint))

    async def close(self) -> None:
        """Closes the real engine."""
        await self._engine.close()

    async def phase(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        """Makes a call unless the plan has something else in mind."""
        count = self.counts.get(name, 0)
        self.counts[name] = count + 1
        fault = self._plan(name, count)
        if fault is not None:
            if fault.delay_s:
                await asyncio.sleep(fault.delay_s)
            if fault.error is not None:
                raise fault.error
        return await call()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class FaultySandbox:
    """A sandbox of a `FaultyEngine`."""

    def __init__(self, engine: FaultyEngine, sandbox: Sandbox) -> None:
        self._engine = engine
        self._sandbox = sandbox

    @property
    def id(self) -> str:
        """That of the real sandbox."""
        return self._sandbox.id

    @property
    def parent_id(self) -> str | None:
        """That of the real sandbox."""
        return self._sandbox.parent_id

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float = 60.0,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        max_output_bytes: int = 1 << 20,
    ) -> ExecResult:
        """See `Sandbox.exec`."""
        return await self._sandbox.exec(
            argv, stdin=stdin, timeout_s=timeout_s, cwd=cwd, env=env, max_output_bytes=max_output_bytes
        )

    async def read_file(self, path: str) -> bytes:
        """See `Sandbox.read_file`."""
        return await self._sandbox.read_file(path)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """See `Sandbox.write_file`."""
        await self._sandbox.write_file(path, data, mode=mode)

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        keep_stdin_open: bool = False,
        timeout_s: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        max_output_bytes: int = 1 << 20,
    ) -> Command:
        """See `Sandbox.spawn`."""
        return await self._sandbox.spawn(
            argv,
            stdin=stdin,
            keep_stdin_open=keep_stdin_open,
            timeout_s=timeout_s,
            cwd=cwd,
            env=env,
            max_output_bytes=max_output_bytes,
        )

    async def commands(self) -> Sequence[Command]:
        """See `Sandbox.commands`."""
        return await self._sandbox.commands()

    async def upload(
        self, source: Path, path: str, *, timeout_s: float = 600.0, max_bytes: int = 1 << 30
    ) -> None:
        """See `Sandbox.upload`."""
        await self._sandbox.upload(source, path, timeout_s=timeout_s, max_bytes=max_bytes)

    async def download(
        self,
        path: str,
        target: Path,
        *,
        timeout_s: float = 600.0,
        max_bytes: int = 1 << 30,
        max_entries: int = 100_000,
    ) -> None:
        """See `Sandbox.download`."""
        await self._sandbox.download(
            path, target, timeout_s=timeout_s, max_bytes=max_bytes, max_entries=max_entries
        )

    async def call(self, op: str, /, *, timeout_s: float = 60.0, **args: Value) -> Value:
        """See `Sandbox.call`; the operation is the phase."""
        return await self._engine.phase(op, lambda: self._sandbox.call(op, timeout_s=timeout_s, **args))

    async def checkpoint(self) -> Checkpoint:
        """See `Sandbox.checkpoint`."""
        return await self._engine.phase("checkpoint", self._sandbox.checkpoint)

    async def take_over(self, randomness: Randomness) -> None:
        """See `Sandbox.take_over`; the phase is "take_over"."""
        await self._engine.phase("take_over", lambda: self._sandbox.take_over(randomness))

    async def hibernate(self) -> None:
        """See `Sandbox.hibernate`."""
        await self._sandbox.hibernate()

    async def wake(self) -> None:
        """See `Sandbox.wake`."""
        await self._sandbox.wake()

    async def kill(self) -> None:
        """See `Sandbox.kill`: never fails."""
        await self._sandbox.kill()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _value(value) for name, value in row.items() if name not in _NOT_COMPARABLE}


def _value(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return value.tolist()
    if isinstance(value, dict):
        return {key: _value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_value(inner) for inner in value]
    return value
