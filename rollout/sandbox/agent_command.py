"""One command in the guest: its process group, its pipes, its end. A loop drives it; nothing blocks.

Invariants: a command is reaped exactly once; its descriptors are closed when it has ended, been killed, or
been let go of in a forked child; its buffers are bounded.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Final, Protocol

from rollout.errors import GuestError
from rollout.sandbox.guest_loop import Loop, Timer
from rollout.types import Value

__all__ = ["MAX_STDIN_BYTES", "Command", "CommandSpec", "Listener"]

MAX_STDIN_BYTES: Final = 32 << 20
"""Most input that waits for a command to read it."""
_READ_BYTES = 64 << 10
_CONGESTION_POLL_S = 0.005


class Listener(Protocol):
    """Who waits for a command, and may want to hear it meanwhile."""

    @property
    def id(self) -> int:
        """Tells it from others."""
        ...

    @property
    def is_current(self) -> bool:
        """Still listens."""
        ...

    @property
    def is_congested(self) -> bool:
        """Cannot keep up: events should wait."""
        ...

    def event(self, value: Value) -> None:
        """Takes a piece of output."""
        ...

    def reply(self, value: Value) -> None:
        """Takes the result."""
        ...


@dataclass(frozen=True, slots=True)
class CommandSpec:
    """What to run.

    Attributes:
        argv: The program and its arguments.
        stdin: Input to begin with.
        timeout_s: When the group is killed; None is never.
        cwd: Where it starts; None is this process's folder.
        env: Added to this process's environment.
        max_output_bytes: What is kept of each output.
        keep_stdin_open: More input may follow.
        kills_group: When the leader ends, what it left behind in its group is killed.
    """

    argv: list[str]
    stdin: bytes
    timeout_s: float | None
    cwd: str | None
    env: dict[str, str]
    max_output_bytes: int
    keep_stdin_open: bool = False
    kills_group: bool = False


class Command:
    """A started command, until it has been waited for.

    Raises:
        GuestError: It cannot be started.
    """

    def __init__(self, loop: Loop, number: int, spec: CommandSpec) -> None:
        self.number = number
        self._loop = loop
        self._spec = spec
        self._waiter: Listener | None = None
        self._on_waited: Callable[[Command], None] | None = None
        self._timed_out = False
        self._duration_s: float | None = None
        self._unread_stdin = bytearray(spec.stdin)
        self._closes_stdin = not spec.keep_stdin_open
        self._started_s = time.monotonic()
        self._process = _start(spec)
        self._pid_fd = os.pidfd_open(self._process.pid)
        loop.watch(self._pid_fd, selectors.EVENT_READ, self._on_exit)
        self._stdin = _pipe(self._process.stdin)
        self._outputs = [
            _Output(loop, "stdout", _pipe(self._process.stdout), spec.max_output_bytes),
            _Output(loop, "stderr", _pipe(self._process.stderr), spec.max_output_bytes),
        ]
        self._timer: Timer | None = None
        if spec.timeout_s is not None:
            self._timer = loop.call_at(self._started_s + spec.timeout_s, self._on_timeout)
        self._feed_stdin()

    @property
    def pid(self) -> int:
        """Of the leader, and of its process group."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """The leader has not ended."""
        return self._duration_s is None

    def describe(self) -> Value:
        """Its line in the list of commands."""
        argv: list[Value] = [*self._spec.argv]
        return {"command": self.number, "argv": argv, "pid": self.pid, "running": self.is_running}

    def attach(self, call: Listener, *, stream: bool, on_waited: Callable[[Command], None]) -> None:
        """Answers `call` with the result when the command ends, or at once if it has.

        Args:
            call: Who waits.
            stream: Send output as events of `call` instead of keeping it.
            on_waited: Listenered after the answer.

        Raises:
            GuestError: Another call waits for it.
        """
        if self._waiter is not None and self._waiter.is_current:
            raise GuestError(f"command {self.number} is being waited for already")
        self._waiter, self._on_waited = call, on_waited
        for output in self._outputs:
            output.stream(call if stream else None)
        if not self.is_running:
            self._answer()

    def is_awaited_by(self, listener_id: int) -> bool:
        """That listener waits for it."""
        return self._waiter is not None and self._waiter.is_current and self._waiter.id == listener_id

    def send_signal(self, number: int) -> None:
        """Sends a signal to the whole group; nothing happens if the command has ended."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def write_stdin(self, data: bytes, *, close: bool) -> None:
        """Queues input.

        Raises:
            GuestError: Its input is closed, or too much is queued (retryable).
        """
        if self._stdin.closed or self._closes_stdin:
            raise GuestError(f"the input of command {self.number} is closed")
        if len(self._unread_stdin) + len(data) > MAX_STDIN_BYTES:
            raise GuestError(f"command {self.number} does not read its input", retryable=True)
        self._unread_stdin += data
        self._closes_stdin = close
        self._feed_stdin()

    def kill(self) -> None:
        """Kills the group, reaps the leader, closes everything; nobody is answered."""
        if self.is_running:
            self.send_signal(signal.SIGKILL)
            self._process.wait()
        self._release()

    def let_go(self) -> None:
        """Closes this process's copies of the descriptors; the command is a parent's."""
        if self.is_running:
            self._process.returncode = 0  # not this process's child: there is nothing to reap
        self._release()

    def _release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._pid_fd >= 0:
            self._loop.unwatch(self._pid_fd)
            os.close(self._pid_fd)
            self._pid_fd = -1
        self._close_stdin()
        for output in self._outputs:
            output.close()

    def _on_exit(self, events: int) -> None:
        if self._spec.kills_group:  # before the leader is reaped, so that the group's number is still its own
            self.send_signal(signal.SIGKILL)
        self._process.wait()
        self._duration_s = time.monotonic() - self._started_s
        for output in self._outputs:
            output.drain()
        self._release()
        if self._waiter is not None and self._waiter.is_current:
            self._answer()

    def _on_timeout(self) -> None:
        self._timed_out = True
        self.send_signal(signal.SIGKILL)

    def _answer(self) -> None:
        assert self._waiter is not None
        assert self._on_waited is not None
        stdout, stderr = self._outputs
        self._waiter.reply(
            {
                "exit_code": self._process.returncode,
                "stdout": bytes(stdout.data),
                "stderr": bytes(stderr.data),
                "stdout_truncated": stdout.truncated,
                "stderr_truncated": stderr.truncated,
                "timed_out": self._timed_out,
                "duration_s": self._duration_s,
            }
        )
        self._on_waited(self)

    def _feed_stdin(self, events: int = 0) -> None:
        if self._stdin.closed:
            return
        fd = self._stdin.fileno()
        try:
            while self._unread_stdin:
                written = os.write(fd, memoryview(self._unread_stdin)[:_READ_BYTES])
                del self._unread_stdin[:written]
        except BlockingIOError:
            self._loop.watch(fd, selectors.EVENT_WRITE, self._feed_stdin)
            return
        except BrokenPipeError:  # it reads no more: its own affair, as in a shell's pipeline
            self._unread_stdin.clear()
            self._closes_stdin = True
        self._loop.unwatch(fd)
        if self._closes_stdin:
            self._close_stdin()

    def _close_stdin(self) -> None:
        if not self._stdin.closed:
            self._loop.unwatch(self._stdin.fileno())
            self._stdin.close()


class _Output:
    """One output pipe of a command: a bounded buffer, or a stream of events."""

    def __init__(self, loop: Loop, name: str, pipe: IO[bytes], max_bytes: int) -> None:
        self.data = bytearray()
        self.truncated = False
        self._loop = loop
        self._name = name
        self._max_bytes = max_bytes
        self._stream_to: Listener | None = None
        self._pipe = pipe
        loop.watch(pipe.fileno(), selectors.EVENT_READ, self._on_ready)

    def stream(self, call: Listener | None) -> None:
        """Sends what there is, and whatever follows, as events of a call; None keeps it from now on."""
        self._stream_to = call
        if call is not None and self.data:
            call.event({self._name: bytes(self.data)})
            self.data.clear()

    def drain(self) -> None:
        """Takes what an ended command left in the pipe.

        No more than the pipe can hold: a process left in the background may go on writing.
        """
        if self._pipe.closed:
            return
        left = fcntl.fcntl(self._pipe.fileno(), fcntl.F_GETPIPE_SZ)
        while left > 0 and (size := self._read()):
            left -= size

    def close(self) -> None:
        """Closes the pipe. Idempotent."""
        if not self._pipe.closed:
            self._loop.unwatch(self._pipe.fileno())
            self._pipe.close()

    def _on_ready(self, events: int) -> None:
        if self._stream_to is not None and self._stream_to.is_congested:
            self._loop.unwatch(self._pipe.fileno())
            self._loop.call_at(time.monotonic() + _CONGESTION_POLL_S, self._resume)
        elif self._read() == 0:
            self.close()

    def _resume(self) -> None:
        if not self._pipe.closed:
            self._loop.watch(self._pipe.fileno(), selectors.EVENT_READ, self._on_ready)

    def _read(self) -> int | None:
        """Reads once: the number of bytes, 0 at the end, None if there is nothing now."""
        try:
            data = os.read(self._pipe.fileno(), _READ_BYTES)
        except BlockingIOError:
            return None
        if self._stream_to is not None and self._stream_to.is_current:
            if data:
                self._stream_to.event({self._name: data})
            return len(data)
        room = self._max_bytes - len(self.data)
        self.data += data[:room]
        self.truncated = self.truncated or len(data) > room
        return len(data)


command_user: tuple[int, int] | None = None
"""User and group of commands; None for the agent's own. Images that name one set it before the agent runs."""


def _start(spec: CommandSpec) -> subprocess.Popen[bytes]:
    user, group = command_user or (None, None)
    try:
        return subprocess.Popen(
            spec.argv,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=spec.cwd,
            env={**os.environ, **spec.env},
            start_new_session=True,
            user=user,
            group=group,
            extra_groups=None if user is None else [],
        )
    except (OSError, ValueError) as error:  # ValueError: a NUL in a name
        raise GuestError(f"cannot start {spec.argv[0]!r}: {error}") from error


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    os.set_blocking(pipe.fileno(), False)
    return pipe
