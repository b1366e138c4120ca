"""What sandboxes with a guest agent do by asking it, whatever engine they are of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rollout.sandbox.base import DEFAULT_MAX_OUTPUT_BYTES
from rollout.sandbox.folders import GuestFolders
from rollout.types import ExecResult, Value

__all__ = ["GuestCalls"]


class GuestCalls(GuestFolders):
    """Commands, files and operations of `Sandbox`, over the channel that `using` brings."""

    @property
    @abstractmethod
    def call_timeout_s(self) -> float:
        """Deadline of a request that has none of its own, in seconds."""

    @abstractmethod
    async def kill(self) -> None:
        """See `Sandbox.kill`."""

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float = 60.0,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        max_output_bytes: int = DEFAULT_MAX_OUTPUT_BYTES,
    ) -> ExecResult:
        """Runs a command to its end; see `Sandbox.exec`."""
        async with self.using("exec") as client:
            return await client.exec(
                argv,
                stdin=stdin,
                timeout_s=timeout_s,
                cwd=cwd,
                env=env,
                max_output_bytes=max_output_bytes,
            )

    async def read_file(self, path: str) -> bytes:
        """Reads a whole file; see `Sandbox.read_file`."""
        async with self.using("files") as client:
            return await client.read_file(path, timeout_s=self.call_timeout_s)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Writes a whole file; see `Sandbox.write_file`."""
        async with self.using("files") as client:
            await client.write_file(path, data, mode=mode, timeout_s=self.call_timeout_s)

    async def call(self, op: str, /, *, timeout_s: float = 60.0, **args: Value) -> Value:
        """Calls an operation of the guest agent; see `Sandbox.call`."""
        async with self.using(op.removeprefix("env.")) as client:
            return await client.call(op, args, timeout_s=timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()
