"""The host's end of the guest channel: many calls in flight over one connected socket.

Invariants:

- The guest is not trusted. Anything that it sends, or does not send, ends in a typed error: a frame that is
  malformed or answers nothing that was asked ends the client, as do a time-out and the end of the stream.
- Memory is bounded: one incomplete frame, and what the transport takes in at once.
- Once the client has ended (`failure` says why) every pending and later call raises `GuestError`. An error
  that the guest reports about a call is only that call's.
- A call that its caller cancels goes on in the guest, unless it is a command, which is killed; its reply is
  dropped when it comes.

It does not retry: whether a call may be made twice is for who makes it to know.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Self, cast

from rollout.errors import EnvError, GuestError
from rollout.sandbox.wire import MAX_FRAME_BYTES, FrameDecoder, frame, shown
from rollout.types import ExecResult, Randomness, Value

__all__ = ["GuestClient", "exec_result"]

PROTOCOL: Final = 1
MAX_FILE_BYTES: Final = 1 << 30
"""Largest file that `read_file` returns."""
_CHUNK_BYTES = 8 << 20
_MAX_ABANDONED = 4096
_MAX_MESSAGE_CHARS = 2000
_CANCELLABLE = frozenset({"exec", "wait"})
_EXEC_GRACE_S = 5.0  # what the guest gets beyond a command's own time limit to kill it and answer

EventHandler = Callable[[Value], None]


class GuestClient(asyncio.Protocol):
    """Calls operations of one guest agent; made by `connect`, ended by `close`.

    It is the transport's protocol too: `data_received` and its like are for the event loop alone.
    """

    def __init__(self, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._decoder = FrameDecoder(max_frame_bytes)
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._pending: dict[int, asyncio.Future[Value]] = {}
        self._handlers: dict[int, EventHandler] = {}
        self._abandoned: set[int] = set()
        self._last_id = 0
        self._failure: GuestError | None = None
        self._closed = self._loop.create_future()
        self._writable = asyncio.Event()
        self._writable.set()

    @classmethod
    async def connect(cls, channel: socket.socket, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> Self:
        """A client over a connected stream socket, which it owns from now on."""
        client = cls(max_frame_bytes=max_frame_bytes)
        channel.setblocking(False)
        await client._loop.create_connection(lambda: client, sock=channel)
        return client

    @property
    def failure(self) -> GuestError | None:
        """Why the client has ended; None while it lives."""
        return self._failure

    @property
    def num_pending(self) -> int:
        """Calls that wait for their reply."""
        return len(self._pending)

    async def call(
        self,
        op: str,
        args: Mapping[str, Value] | None = None,
        *,
        timeout_s: float,
        on_event: EventHandler | None = None,
    ) -> Value:
        """Calls an operation of the guest.

        Args:
            op: Its name.
            args: Its arguments.
            timeout_s: Seconds until the guest counts as lost.
            on_event: Gets what the operation sends before its reply; dropped when None.

        Raises:
            EnvError: The environment raised or refused.
            GuestError: The guest refused the call; or it is gone, late, or answers garbage, and the client
                has ended (`failure` is set).
        """
        if self._failure is not None:
            raise _again(self._failure)
        self._last_id += 1
        call_id = self._last_id
        data = frame({"id": call_id, "op": op, "args": dict(args or {})}, self._max_frame_bytes)
        reply: asyncio.Future[Value] = self._loop.create_future()
        self._pending[call_id] = reply
        if on_event is not None:
            self._handlers[call_id] = on_event
        deadline = self._loop.call_later(timeout_s, self._on_timeout, op, timeout_s)
        try:
            assert self._transport is not None
            self._transport.write(data)
            if not self._writable.is_set():
                await self._wait_writable(reply)
            return await reply
        except asyncio.CancelledError:
            self._abandon(call_id)
            if op in _CANCELLABLE:
                self._cancel(call_id)
            raise
        finally:
            deadline.cancel()
            self._pending.pop(call_id, None)
            self._handlers.pop(call_id, None)

    async def hello(
        self, generation: int, randomness: Randomness, *, hostname: str, timeout_s: float
    ) -> Mapping[str, Value]:
        """Shakes hands with a new clone: it gets its own identity, entropy, time and randomness.

        Raises:
            GuestError: It did not confirm; the client has ended.
        """
        args: dict[str, Value] = {
            "generation": generation,
            "entropy": secrets.token_bytes(32),
            "wall_time_s": time.time(),
            "hostname": hostname,
            "policy": str(randomness.policy),
            "seed": randomness.seed,
        }
        try:
            reply = await self.call("hello", args, timeout_s=timeout_s)
        except (EnvError, GuestError) as error:
            raise self.fail(GuestError(f"the guest refused its handshake: {error.message}")) from error
        match reply:
            case {"generation": int(confirmed), "protocol": int(protocol)}:
                if confirmed == generation and protocol == PROTOCOL:
                    return cast("Mapping[str, Value]", reply)
            case _:
                pass
        raise self.fail(GuestError(f"the guest did not confirm generation {generation}: {shown(reply)}"))

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
        """Runs a command to its end; see `Sandbox.exec`.

        Raises:
            GuestError: It cannot be started, or as `call`.
        """
        args: dict[str, Value] = {
            "argv": list(argv),
            "stdin": stdin,
            "timeout_s": timeout_s,
            "cwd": cwd,
            "env": dict(env or {}),
            "max_output_bytes": max_output_bytes,
        }
        reply = await self.call("exec", args, timeout_s=timeout_s + _EXEC_GRACE_S)
        result = exec_result(reply, max_output_bytes)
        if result is None:
            raise self.fail(GuestError(f"the guest answered exec with garbage: {shown(reply)}"))
        return result

    async def read_file(
        self, path: str, *, timeout_s: float = 60.0, max_bytes: int = MAX_FILE_BYTES
    ) -> bytes:
        """Reads a whole file; the time limit is for each part of 8 MiB.

        Raises:
            GuestError: It is missing, unreadable, or longer than `max_bytes`; or as `call`.
        """
        content = bytearray()
        while True:
            args: dict[str, Value] = {"path": path, "offset": len(content), "max_bytes": _CHUNK_BYTES}
            reply = await self.call("read_file", args, timeout_s=timeout_s)
            match reply:
                case {"data": bytes(data), "eof": bool(eof)} if eof or data:
                    content += data
                case _:
                    raise self.fail(GuestError(f"the guest answered read_file with garbage: {shown(reply)}"))
            if len(content) > max_bytes:
                raise GuestError(f"cannot read {path!r}: it is longer than {max_bytes} bytes")
            if eof:
                return bytes(content)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644, timeout_s: float = 60.0) -> None:
        """Writes a whole file, with its parent folders; the time limit is for each part of 8 MiB.

        Raises:
            GuestError: It cannot be written (a part may have been); or as `call`.
        """
        for offset in range(0, max(1, len(data)), _CHUNK_BYTES):
            part = data[offset : offset + _CHUNK_BYTES]
            args: dict[str, Value] = {"path": path, "data": part, "mode": mode, "append": offset > 0}
            await self.call("write_file", args, timeout_s=timeout_s)

    def fail(self, error: GuestError) -> GuestError:
        """Ends the client for a reason, unless it has ended; returns `error`, to be raised."""
        if self._failure is None:
            self._failure = error
            for reply in self._pending.values():
                if not reply.done():
                    reply.set_exception(_again(error))
            self._writable.set()
            if self._transport is not None:
                self._transport.abort()
        return error

    async def close(self) -> None:
        """Closes the socket; pending calls raise `GuestError`. Idempotent."""
        self.fail(GuestError("the channel to the guest has been closed"))
        if self._transport is not None:
            await asyncio.shield(self._closed)

    async def _wait_writable(self, reply: asyncio.Future[Value]) -> None:
        """Slows callers down to what the guest reads; a failed client lets them all go on to their error."""
        while not self._writable.is_set() and not reply.done():
            await self._writable.wait()

    def _abandon(self, call_id: int) -> None:
        if self._failure is not None:
            return
        self._abandoned.add(call_id)
        if len(self._abandoned) > _MAX_ABANDONED:
            self.fail(GuestError(f"the guest has not answered {_MAX_ABANDONED} cancelled calls"))

    def _cancel(self, call_id: int) -> None:
        """Asks the guest to end what a call waits for; nobody waits for the answer."""
        if self._failure is None and self._transport is not None:
            self._last_id += 1
            self._transport.write(frame({"id": self._last_id, "op": "cancel", "args": {"call": call_id}}))
            self._abandon(self._last_id)

    def _on_timeout(self, op: str, timeout_s: float) -> None:
        self.fail(GuestError(f"the guest did not answer {op} within {timeout_s:g} s", retryable=True))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The event loop has taken the socket."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket has been closed, by either end."""
        reason = "" if exc is None else f": {exc}"
        self.fail(GuestError(f"the guest closed the channel{reason}", retryable=True))
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        """The guest reads too slowly."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The guest has caught up."""
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """The guest has sent something."""
        if self._failure is not None:
            return
        try:
            for message in self._decoder.feed(data):
                self._on_message(message)
        except GuestError as error:
            self.fail(GuestError(f"the guest answers garbage: {error.message}"))

    def _on_message(self, message: Value) -> None:
        """Hands a message to the call that it answers.

        Raises:
            GuestError: It answers none.
        """
        match message:
            case {"id": int(call_id), "ok": value, **rest} if not rest:
                self._settle(call_id, value)
            case {"id": int(call_id), "event": value, **rest} if not rest:
                self._expect(call_id)
                handler = self._handlers.get(call_id)
                if handler is not None:
                    handler(value)
            case {
                "id": int(call_id),
                "error": {"type": str(kind), "message": str(text), "retryable": bool(retryable)},
                **rest,
            } if not rest:
                boundary = EnvError if kind == "EnvError" else GuestError
                self._settle(call_id, boundary(_one_line(text), retryable=retryable))
            case {"id": None, "error": {"message": str(text)}}:
                raise GuestError(f"it could not read a request: {_one_line(text)}")
            case _:
                raise GuestError(f"a message that is none: {shown(message)}")

    def _settle(self, call_id: int, result: Value | EnvError | GuestError) -> None:
        self._expect(call_id)
        self._abandoned.discard(call_id)
        reply = self._pending.pop(call_id, None)
        if reply is None or reply.done():
            return
        if isinstance(result, EnvError | GuestError):
            reply.set_exception(result)
        else:
            reply.set_result(result)

    def _expect(self, call_id: int) -> None:
        if call_id not in self._pending and call_id not in self._abandoned:
            raise GuestError(f"an answer to call {call_id}, which nobody made")


def exec_result(reply: Value, max_output_bytes: int) -> ExecResult | None:
    """What a guest says of an ended command; None if that is garbage."""
    match reply:
        case {
            "exit_code": int(exit_code),
            "stdout": bytes(stdout),
            "stderr": bytes(stderr),
            "stdout_truncated": bool(stdout_truncated),
            "stderr_truncated": bool(stderr_truncated),
            "timed_out": bool(timed_out),
            "duration_s": float(duration_s),
        } if max(len(stdout), len(stderr)) <= max_output_bytes:
            flags = (stdout_truncated, stderr_truncated, timed_out)
            return ExecResult(exit_code, stdout, stderr, *flags, duration_s)
        case _:
            return None


def _again(error: GuestError) -> GuestError:
    """A fresh instance: each raise must have a traceback of its own."""
    return GuestError(error.message, retryable=error.retryable)


def _one_line(text: str) -> str:
    line = " ".join(text[:_MAX_MESSAGE_CHARS].split())
    return "".join(char if char.isprintable() else "?" for char in line)
