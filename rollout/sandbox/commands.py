"""Commands that go on while the host does other things.

A command that was spawned belongs to its sandbox, not to who started it: nobody need listen. As long as
somebody does (`Command.output`, `Command.wait`), the sandbox cannot be saved, because a clone would go on
with half an answer; saving it before anyone listens keeps the command, in engines that can, and its clones
find it by `commands`.

Output that nobody listens to is kept by the guest up to `max_output_bytes`. The host keeps at most 16 MiB
that its listener has not taken yet; what comes beyond is dropped, and the result says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Final, Literal, cast

from rollout.errors import GuestError, RolloutError
from rollout.sandbox.client import GuestClient, exec_result
from rollout.types import ExecResult, Value

__all__ = ["Chunk", "Command", "GuestCommands", "has_running_commands"]

DEFAULT_MAX_OUTPUT_BYTES: Final = 1 << 20
MAX_KEPT_BYTES: Final = 24 << 20
"""Most of each output that a guest keeps of a command."""
PART_BYTES: Final = 4 << 20
"""Most input in one request."""
MAX_UNHEARD_BYTES: Final = 16 << 20
"""Most output that the host holds for a listener that does not take it."""
_CHUNK_OVERHEAD_BYTES = 256
_REQUEST_TIMEOUT_S = 60.0
_GRACE_S = 5.0
_HEARTBEAT_S = 10.0
_NO_LIMIT_S = 1e9
_FULL_INPUT_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a command's output, as it came.

    Attributes:
        stream: Which output.
        data: Its bytes; a line may be cut anywhere.
    """

    stream: Literal["stdout", "stderr"]
    data: bytes


class Command:
    """A command in a sandbox; made by `spawn` and `commands`.

    Attributes:
        number: Its name in the sandbox.
        pid: Process id in the guest, and of its process group.
        argv: The program and its arguments.
    """

    def __init__(
        self,
        sandbox: GuestCommands,
        number: int,
        pid: int,
        argv: Sequence[str],
        timeout_s: float | None = None,
    ) -> None:
        self.number = number
        self.pid = pid
        self.argv = tuple(argv)
        self._sandbox = sandbox
        self._timeout_s = timeout_s
        self._unheard: deque[Chunk] = deque()
        self._unheard_bytes = 0
        self._lost: set[str] = set()
        self._news = asyncio.Event()
        self._listening: asyncio.Task[ExecResult] | None = None
        self._is_streamed = False

    async def output(self) -> AsyncGenerator[Chunk]:
        """Its output from the beginning, or from where an earlier `output` was left, until it ends.

        Leaving it does not end the command, nor the listening.

        Raises:
            GuestError: `wait` keeps the output for its result; or the sandbox has ended, or the command has
                been waited for by another.
        """
        if self._listening is not None and not self._is_streamed:
            raise GuestError(f"the output of command {self.number} is kept for the result of its wait")
        listening = self._listen(stream=True)
        while True:
            self._news.clear()
            while self._unheard:
                chunk = self._unheard.popleft()
                self._unheard_bytes -= len(chunk.data) + _CHUNK_OVERHEAD_BYTES
                yield chunk
            if listening.done():
                if not self._unheard:
                    listening.result()
                    return
            else:
                await self._news.wait()

    async def wait(self) -> ExecResult:
        """Its result, when it has ended; may be called again.

        The result holds the output unless `output` was called before. Who is cancelled here leaves the
        command running.

        Raises:
            GuestError: The sandbox has ended, or the command has been waited for by another.
        """
        return await asyncio.shield(self._listen(stream=False))

    async def signal(self, number: int) -> None:
        """Sends a signal to its whole process group; nothing happens if it has ended.

        Raises:
            GuestError: There is no such signal; the command has been waited for; or the sandbox has ended.
        """
        if self._has_result:
            return
        await self._sandbox.request("signal", command=self.number, signal=int(number))

    async def kill(self) -> None:
        """Kills its whole process group; see `signal`."""
        await self.signal(signal.SIGKILL)

    async def write(self, data: bytes, *, close: bool = False) -> None:
        """Gives it input; waits while it does not read what it was given before.

        Args:
            data: Any number of bytes.
            close: There will be no more.

        Raises:
            GuestError: It was spawned without open input, has closed it or ended; or the sandbox has ended.
        """
        for offset in range(0, max(1, len(data)), PART_BYTES):
            part = data[offset : offset + PART_BYTES]
            is_last = offset + PART_BYTES >= len(data)
            await self._write_part(part, close=close and is_last)

    async def _write_part(self, part: bytes, *, close: bool) -> None:
        while True:
            try:
                await self._sandbox.request("write_stdin", command=self.number, data=part, close=close)
                return
            except GuestError as error:
                if not error.retryable or self._sandbox.has_ended:
                    raise
            await asyncio.sleep(_FULL_INPUT_POLL_S)

    @property
    def _has_result(self) -> bool:
        listening = self._listening
        if listening is None or not listening.done() or listening.cancelled():
            return False
        return listening.exception() is None

    def _listen(self, *, stream: bool) -> asyncio.Task[ExecResult]:
        if self._listening is None:
            self._is_streamed = stream
            self._listening = asyncio.create_task(self.hear(self._keep if stream else None))
            self._listening.add_done_callback(self._on_end)
        return self._listening

    async def hear(self, listener: Callable[[Chunk], None] | None) -> ExecResult:
        """Waits for its end, once; who is cancelled meanwhile kills it.

        Args:
            listener: Gets the output; None leaves it to the result.

        Raises:
            GuestError: As `wait`.
        """
        on_event = None if listener is None else _on_event(listener)
        args: dict[str, Value] = {"command": self.number, "stream": listener is not None}
        timeout_s = _NO_LIMIT_S if self._timeout_s is None else self._timeout_s + _GRACE_S
        async with self._sandbox.listening() as client:
            heartbeat = asyncio.create_task(_keep_asking(client))
            try:
                reply = await client.call("wait", args, timeout_s=timeout_s, on_event=on_event)
            finally:
                heartbeat.cancel()
                await asyncio.wait([heartbeat])
            result = exec_result(reply, MAX_KEPT_BYTES)
            if result is None:
                raise client.fail(GuestError("the guest answered wait with garbage"))
        return replace(
            result,
            stdout_truncated=result.stdout_truncated or "stdout" in self._lost,
            stderr_truncated=result.stderr_truncated or "stderr" in self._lost,
        )

    def _keep(self, chunk: Chunk) -> None:
        size = len(chunk.data) + _CHUNK_OVERHEAD_BYTES
        if not chunk.data:
            return
        if self._unheard_bytes + size > MAX_UNHEARD_BYTES:
            self._lost.add(chunk.stream)
            return
        self._unheard.append(chunk)
        self._unheard_bytes += size
        self._news.set()

    def _on_end(self, listening: asyncio.Task[ExecResult]) -> None:
        if not listening.cancelled():
            listening.exception()  # who waits is told; if nobody does, nobody minds
        self._news.set()


class GuestCommands(ABC):
    """What sandboxes with a guest agent share."""

    @abstractmethod
    def using(self, phase: str = "commands") -> AbstractAsyncContextManager[GuestClient]:
        """The channel of the sandbox, brought back if it was parked or hibernated, for one request.

        `phase` is what its time is counted as; a command that is run to its end is "exec".
        """

    @abstractmethod
    def listening(self) -> AbstractAsyncContextManager[GuestClient]:
        """As `using`, for a request that lasts: the sandbox cannot be saved meanwhile."""

    @abstractmethod
    def expect_background(self) -> None:
        """A command may run when no request does."""

    @property
    @abstractmethod
    def has_ended(self) -> bool:
        """It has been killed, or has ended."""

    async def request(self, op: str, /, **args: Value) -> Value:
        """One short request."""
        async with self.using() as client:
            return await client.call(op, args, timeout_s=_REQUEST_TIMEOUT_S)

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        keep_stdin_open: bool = False,
        timeout_s: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        max_output_bytes: int = DEFAULT_MAX_OUTPUT_BYTES,
    ) -> Command:
        """Starts a command and leaves it running; see `Sandbox.spawn`."""
        args: dict[str, Value] = {
            "argv": list(argv),
            "stdin": stdin,
            "timeout_s": None if timeout_s is None else float(timeout_s),
            "cwd": cwd,
            "env": dict(env or {}),
            "max_output_bytes": max_output_bytes,
            "keep_stdin_open": keep_stdin_open,
        }
        async with self.using() as client:
            reply = await client.call("spawn", args, timeout_s=_REQUEST_TIMEOUT_S)
            match reply:
                case {"command": int(number), "pid": int(pid)}:
                    self.expect_background()
                    return Command(self, number, pid, argv, timeout_s)
                case _:
                    raise client.fail(GuestError("the guest answered spawn with garbage"))

    async def commands(self) -> list[Command]:
        """The commands that nobody has waited for; see `Sandbox.commands`."""
        async with self.using() as client:
            found = await _list_commands(client, _REQUEST_TIMEOUT_S)
        if any(is_running for *_, is_running in found):
            self.expect_background()
        return [Command(self, number, pid, argv) for number, pid, argv, _ in found]


async def has_running_commands(client: GuestClient, timeout_s: float) -> bool:
    """Whether a command of the guest runs.

    Raises:
        GuestError: As `GuestClient.call`.
    """
    return any(is_running for *_, is_running in await _list_commands(client, timeout_s))


async def _list_commands(client: GuestClient, timeout_s: float) -> list[tuple[int, int, list[str], bool]]:
    reply = await client.call("commands", timeout_s=timeout_s)
    found: list[tuple[int, int, list[str], bool]] = []
    for line in reply if isinstance(reply, list) else [reply]:
        match line:
            case {"command": int(number), "argv": list(argv), "pid": int(pid), "running": bool(running)} if (
                all(isinstance(part, str) for part in argv)
            ):
                found.append((number, pid, cast("list[str]", argv), running))
            case _:
                raise client.fail(GuestError("the guest answered commands with garbage"))
    return found


async def _keep_asking(client: GuestClient) -> None:
    """Notices a guest that is gone while a command, which may take for ever, is waited for."""
    with contextlib.suppress(RolloutError):  # the client has ended, and with it the wait
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            await client.call("ping", timeout_s=_REQUEST_TIMEOUT_S)


def _on_event(listener: Callable[[Chunk], None]) -> Callable[[Value], None]:
    return lambda value: listener(_chunk(value))


def _chunk(value: Value) -> Chunk:
    match value:
        case {"stdout": bytes(data), **rest} if not rest:
            return Chunk("stdout", data)
        case {"stderr": bytes(data), **rest} if not rest:
            return Chunk("stderr", data)
        case _:
            raise GuestError("an event that is no output")
