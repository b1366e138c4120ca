"""The engine's connection to its fork server: starts it, asks it, notices its end.

Invariant: once the server has ended (`failure` says why), every pending and later request raises that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Self

import psutil

from rollout.errors import BootError, CheckpointError, ForkError, GuestError, RolloutError
from rollout.sandbox.process import packets
from rollout.sandbox.process.launch import launch
from rollout.sandbox.process.walls import Limits

__all__ = ["ServerConnection"]

_ERRORS: dict[str, type[RolloutError]] = {
    "CheckpointError": CheckpointError,
    "ForkError": ForkError,
    "GuestError": GuestError,
}
_END_GRACE_S = 2.0
_MAX_COMPLAINT_BYTES = 2000
_HINT = (
    "user namespaces must be allowed: run as root, or run: sysctl -w kernel.unprivileged_userns_clone=1 "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container, allow the unshare and mount system calls"
)


class ServerConnection:
    """A running fork server; made by `start`, ended by `close`.

    It must be started on the thread that runs the event loop: the server dies with the thread that started
    it.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        control: socket.socket,
        complaints: IO[bytes],
        on_ended: Callable[[str, str], None],
    ) -> None:
        self._process = process
        self._control = control
        self._complaints = complaints
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._last_number = 0
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._is_closed = False
        self.failure: str | None = None
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._pidfd = os.pidfd_open(process.pid)
        self._loop.add_reader(self._pidfd, self._on_end)
        control.setblocking(False)
        self._loop.add_reader(control.fileno(), self._on_readable)

    @classmethod
    async def start(
        cls,
        limits: Limits,
        python_path: Sequence[Path],
        *,
        timeout_s: float,
        on_ended: Callable[[str, str], None],
    ) -> Self:
        """Starts a fork server.

        Args:
            limits: Of every sandbox.
            python_path: Folders with further modules for sandboxes.
            timeout_s: Seconds until it must be ready.
            on_ended: Told the name of a sandbox that ended by itself, and why.

        Raises:
            BootError: This machine lacks what it needs, or it did not come up in time.
        """
        launched = launch(limits, python_path)
        server = cls(launched.process, launched.control, launched.complaints, on_ended)
        try:
            async with asyncio.timeout(timeout_s):
                await server._ready
        except TimeoutError:
            await server.close()
            raise BootError(f"the fork server was not ready within {timeout_s:g} s", retryable=True) from None
        except BaseException:
            await server.close()
            raise
        return server

    @property
    def pid(self) -> int:
        """Process id of bubblewrap, the server's outermost parent."""
        return self._process.pid

    def send(self, op: str, fds: Sequence[int] = (), **arguments: object) -> asyncio.Future[Any]:
        """Sends a request; the result is its reply, or the error of its refusal.

        Raises:
            GuestError: The server has ended, or does not read.
        """
        if self.failure is not None:
            raise GuestError(self.failure)
        self._last_number += 1
        number = self._last_number
        try:
            packets.send(self._control, {"id": number, "op": op, **arguments}, fds)
        except OSError as error:
            raise GuestError(f"the fork server does not take a request: {error}", retryable=True) from error
        reply: asyncio.Future[Any] = self._loop.create_future()
        reply.add_done_callback(_take_note)  # whoever asked may have been cancelled meanwhile
        self._pending[number] = reply
        return reply

    async def close(self) -> None:
        """Ends the server and everything below it. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._fail("the engine is closed")
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_GRACE_S):
                    await asyncio.shield(self._ended)
        finally:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._kill()
            self._process.wait()
            self._complaints.close()

    def _kill(self) -> None:
        """Kills both bubblewraps, if they are still there; the server dies with the inner one."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children():
                child.kill()  # of another user, if this is root: the outer one may not signal it when it dies
        self._process.kill()

    def _on_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._ended.set_result(None)
        self._fail(f"the fork server has ended{self._complaint()}")

    def _on_readable(self) -> None:
        try:
            received = packets.receive(self._control, 0)
        except BlockingIOError:
            return
        except ConnectionError:
            received = None
        except ValueError as error:
            self._fail(f"the fork server answers garbage: {error}")
            return
        if received is None:
            self._fail(f"the fork server has ended{self._complaint()}")
            return
        match received[0]:
            case {"id": int(number), "ok": value}:
                reply = self._pending.pop(number, None)
                if reply is not None and not reply.done():
                    reply.set_result(value)
            case {"id": int(number), "error": [str(kind), str(text)]}:
                reply = self._pending.pop(number, None)
                if reply is not None and not reply.done():
                    reply.set_exception(_ERRORS.get(kind, GuestError)(text, retryable=kind == "ForkError"))
            case {"event": "ready"}:
                self._ready.set_result(None)
            case {"event": "failed", "reason": str(reason)}:
                self._fail(f"the fork server failed: {reason}")
            case {"event": "ended", "sandbox": str(name), "reason": str(reason)}:
                self._on_ended(name, reason)
            case message:
                self._fail(f"the fork server answers garbage: {message}")

    def _fail(self, reason: str) -> None:
        if self.failure is not None:
            return
        self.failure = reason
        self._loop.remove_reader(self._control.fileno())
        self._control.close()  # the server ends when it sees this, and everything below with it
        for reply in self._pending.values():
            if not reply.done():
                reply.set_exception(GuestError(reason))
        self._pending.clear()
        if not self._ready.done():
            self._ready.set_exception(BootError(f"{reason}; {_HINT}"))

    def _complaint(self) -> str:
        """What it wrote to standard error, in one line."""
        self._complaints.seek(0, os.SEEK_END)
        self._complaints.seek(max(0, self._complaints.tell() - _MAX_COMPLAINT_BYTES))
        text = " ".join(self._complaints.read().decode(errors="replace").split())
        return f": {text}" if text else ""


def _take_note(reply: asyncio.Future[Any]) -> None:
    if not reply.cancelled():
        reply.exception()
