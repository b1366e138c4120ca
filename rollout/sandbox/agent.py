"""The guest agent: serves the host's requests over one channel, in a microVM or in a forked process.

A request is `{"id", "op", "args"}`; its reply `{"id", "ok"}` or `{"id", "error": {"type", "message",
"retryable"}}`, preceded by any number of `{"id", "event"}`. Requests may overlap: a command that runs for
long does not hold up the others, an environment's step does.

Invariants:

- One thread, one selector loop: the process can fork between two requests (`after_fork`).
- Whatever arrives, the agent answers and goes on: a malformed or oversized frame, an unknown operation or an
  exception in a handler costs one error reply. A frame that cannot be told to any request is answered with
  id null.
- What an environment prints never reaches the channel: `run` moves the channel's descriptors away from
  standard input and output first.
- After a `hello`, nothing that an earlier host asked for is answered any more: the clone of a machine
  inherits running commands, but not the conversation about them.

Only the standard library and msgpack are needed; an environment brings its own imports.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import select
import selectors
import signal
import sys
import time
from collections.abc import Callable
from typing import Final, cast

from rollout.errors import GuestError, RolloutError
from rollout.sandbox.guest_loop import Loop
from rollout.sandbox.wire import MAX_FRAME_BYTES, FrameDecoder, frame
from rollout.types import Value

__all__ = ["DEFERRED", "PROTOCOL", "Agent", "Args", "Call", "Deferred", "Handler", "run"]

PROTOCOL: Final = 1
"""Version of the requests; host and guest must agree on it."""
_READ_BYTES = 256 << 10
_HIGH_WATER_BYTES = 8 << 20  # with more than this unsent, no further request is read
_ABSENT_HOST_POLL_S = 0.01
_FAREWELL_S = 5.0

Args = dict[str, Value]


class Deferred:
    """The type of `DEFERRED`."""


DEFERRED: Final = Deferred()
"""What a handler returns that answers later, through its `Call`, or never."""


class Call:
    """One request that waits for its reply."""

    __slots__ = ("_agent", "_epoch", "id", "op")

    def __init__(self, agent: Agent, request_id: int, op: str) -> None:
        self._agent = agent
        self._epoch = agent.epoch
        self.id = request_id
        self.op = op

    @property
    def is_current(self) -> bool:
        """The host that asked is still the one that listens."""
        return self._epoch == self._agent.epoch

    @property
    def is_congested(self) -> bool:
        """So much is unsent that events should wait."""
        return self._agent.is_congested

    def take_over(self) -> None:
        """Leaves unanswered whatever was asked before this call: another host listens from now on."""
        self._agent.epoch += 1
        self._epoch = self._agent.epoch

    def reply(self, value: Value) -> None:
        """Answers; at most once a call."""
        self._send({"id": self.id, "ok": value})

    def fail(self, error: RolloutError) -> None:
        """Answers with an error."""
        self._send({"id": self.id, "error": _error_value(error)})

    def event(self, value: Value) -> None:
        """Sends something before the answer."""
        self._send({"id": self.id, "event": value})

    def _send(self, message: Args) -> None:
        if self.is_current:
            self._agent.send(message)


Handler = Callable[[Call, Args], "Value | Deferred"]
"""Serves one operation. It raises `EnvError` or `GuestError` to refuse."""


class Agent:
    """Reads requests, calls handlers, writes replies.

    Args:
        read_fd: Where requests come from; made non-blocking, not closed.
        write_fd: Where replies go; may be the same.
        keep_open: True for a port of the machine, whose other end may be taken by another host: the end of
            the stream is then a pause, otherwise the end of `serve`.
    """

    def __init__(
        self, read_fd: int, write_fd: int, *, keep_open: bool = False, max_frame_bytes: int = MAX_FRAME_BYTES
    ) -> None:
        self.epoch = 0
        self.loop = Loop()
        self._handlers: dict[str, Handler] = {}
        self._keep_open = keep_open
        self._max_frame_bytes = max_frame_bytes
        self._on_close: list[Callable[[], None]] = []
        self._on_fork: list[Callable[[], None]] = []
        self._attach(read_fd, write_fd)

    def _attach(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        for fd in (read_fd, write_fd):
            os.set_blocking(fd, False)
        self._decoder = FrameDecoder(self._max_frame_bytes)
        self._unsent = bytearray()
        self._host_is_gone = False
        self._watch_channel()

    def register(self, op: str, handler: Handler) -> None:
        """Serves `op` by `handler`, in place of an earlier one."""
        self._handlers[op] = handler

    def on_close(self, callback: Callable[[], None]) -> None:
        """Calls back when `serve` ends."""
        self._on_close.append(callback)

    def on_fork(self, callback: Callable[[], None]) -> None:
        """Calls back in a forked child, to let go of what belongs to the parent."""
        self._on_fork.append(callback)

    @property
    def is_congested(self) -> bool:
        """So much is unsent that producers of events should wait."""
        return len(self._unsent) > _HIGH_WATER_BYTES

    def serve(self) -> None:
        """Serves until `stop`, or until the host closes the channel."""
        try:
            self.loop.run()
            self._send_the_rest()
        finally:
            for callback in self._on_close:
                callback()
            self.loop.close()

    def stop(self) -> None:
        """Ends `serve` after the current event; what has been answered is still sent."""
        self.loop.stop()

    def after_fork(self, read_fd: int, write_fd: int) -> None:
        """Makes this process, a fork of the serving one, serve another channel with the same handlers.

        To be called in the child, inside a handler; that handler then returns `DEFERRED`. The parent's
        conversation, commands and timers stay the parent's.
        """
        self.epoch += 1
        self.loop.restart()  # first: the parent shares the old epoll, so nothing may be unwatched in it
        for callback in self._on_fork:
            callback()
        self._attach(read_fd, write_fd)

    def send(self, message: Args) -> None:
        """Queues one message and writes what the channel takes at once."""
        try:
            data = frame(message, self._max_frame_bytes)
        except GuestError as error:
            data = frame({"id": message["id"], "error": _error_value(error)})
        self._unsent += data
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                written = os.write(self._write_fd, self._unsent)
                del self._unsent[:written]
        except BlockingIOError:
            pass
        except OSError:
            self._lose_host()
            return
        self._watch_channel()

    def _send_the_rest(self) -> None:
        """Waits, for a bounded time, until the host has taken what is unsent."""
        give_up_at_s = time.monotonic() + _FAREWELL_S
        while self._unsent and not self._host_is_gone:
            if not select.select([], [self._write_fd], [], max(0.0, give_up_at_s - time.monotonic()))[1]:
                return
            self._flush()

    def _watch_channel(self) -> None:
        if self._host_is_gone:
            return
        reading = 0 if self.is_congested else selectors.EVENT_READ
        writing = selectors.EVENT_WRITE if self._unsent else 0
        if self._read_fd == self._write_fd:
            self._watch_as(self._read_fd, reading | writing)
        else:
            self._watch_as(self._read_fd, reading)
            self._watch_as(self._write_fd, writing)

    def _watch_as(self, fd: int, events: int) -> None:
        if events:
            self.loop.watch(fd, events, self._on_channel)
        else:
            self.loop.unwatch(fd)

    def _on_channel(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._flush()
        if events & selectors.EVENT_READ and self.loop.is_running:
            self._read()

    def _read(self) -> None:
        try:
            data = os.read(self._read_fd, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose_host()
            return
        decoder = self._decoder
        decoder.push(data)
        while decoder is self._decoder:  # a handler may have forked, and the child has another channel
            try:
                popped = decoder.pop()
            except GuestError as error:
                self.send({"id": None, "error": _error_value(error)})
                continue
            if popped is None:
                return
            self._dispatch(popped[0])

    def _dispatch(self, request: Value) -> None:
        match request:
            case {"id": int(request_id), "op": str(op), "args": dict(args)} if type(request_id) is int:
                pass
            case _:
                malformed = GuestError("a request is a map of id (integer), op (text) and args (map)")
                self.send({"id": None, "error": _error_value(malformed)})
                return
        call = Call(self, request_id, op)
        handler = self._handlers.get(op)
        if handler is None:
            call.fail(GuestError(f"the guest agent has no operation {op!r}"))
            return
        try:
            value = handler(call, cast("Args", args))
        except RolloutError as error:
            call.fail(error)
        except (Exception, SystemExit) as error:  # an environment may call sys.exit
            call.fail(GuestError(f"the operation {op} failed: {type(error).__name__}: {error}"))
        else:
            if not isinstance(value, Deferred):
                call.reply(value)

    def _lose_host(self) -> None:
        self._unsent.clear()
        self._host_is_gone = True
        if not self._keep_open:
            self.loop.stop()
            return
        self.epoch += 1
        self._decoder = FrameDecoder(self._max_frame_bytes)
        self.loop.unwatch(self._read_fd)
        self.loop.unwatch(self._write_fd)
        self.loop.call_at(time.monotonic() + _ABSENT_HOST_POLL_S, self._look_for_host)

    def _look_for_host(self) -> None:
        self._host_is_gone = False
        self._watch_channel()


def _error_value(error: RolloutError) -> Value:
    return {"type": type(error).__name__, "message": error.message, "retryable": error.retryable}


def run(read_fd: int, write_fd: int, *, machine: bool = False, keep_open: bool = False) -> None:
    """Serves every operation on a channel until the host closes it.

    Standard input and output are detached first (output goes to standard error), and the channel's
    descriptors are not inherited by commands.

    Args:
        read_fd: Where requests come from.
        write_fd: Where replies go.
        machine: The agent is root of a machine of its own: a `hello` then sets clock, host name and entropy.
        keep_open: As in `Agent`.
    """
    from rollout.sandbox.agent_ops import register_operations

    channel = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (read_fd, write_fd)]
    null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in {read_fd, write_fd} - {0, 1, 2}:
        os.close(fd)
    os.dup2(null_fd, 0)
    os.dup2(2, 1)
    os.close(null_fd)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    agent = Agent(channel[0], channel[1], keep_open=keep_open)
    register_operations(agent, machine=machine)
    try:
        agent.serve()
    finally:
        for fd in channel:
            os.close(fd)


def main() -> None:
    """`python -m rollout.sandbox.agent (--fd N | --port PATH) [--machine]`."""
    parser = argparse.ArgumentParser(description="Serve the operations of a guest to its host.")
    channel = parser.add_mutually_exclusive_group(required=True)
    channel.add_argument("--fd", type=int, help="an inherited, connected socket")
    channel.add_argument("--port", help="a character device, such as /dev/vport0p1")
    parser.add_argument("--machine", action="store_true", help="set clock, host name and entropy too")
    options = parser.parse_args()
    if options.fd is not None:
        run(options.fd, options.fd, machine=options.machine)
    else:
        fd = os.open(options.port, os.O_RDWR | os.O_CLOEXEC)
        run(fd, fd, machine=options.machine, keep_open=True)


if __name__ == "__main__":
    # under this name the module's classes would exist twice, and `DEFERRED` with them
    from rollout.sandbox import agent as _agent

    sys.exit(_agent.main())
