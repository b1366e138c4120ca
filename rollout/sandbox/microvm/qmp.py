"""A blocking client of QEMU's monitor, for worker threads.

The `qemu.qmp` library is asynchronous: each command costs two passes through an event loop, and a branch
needs five commands. Saving and assigning a VMM are short sequences of dependent commands with system calls
in between, so they run as plain functions in a worker thread, over this client. One thread at a time may use
it.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from typing import Any, cast

__all__ = ["QmpClient", "QmpError"]

_MAX_LINE_BYTES = 1 << 20


class QmpError(Exception):
    """The monitor refused a command, closed, was late, or spoke something else. Never leaves this package."""


class QmpClient:
    """Commands and events over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._events: list[str] = []
        self._deadline_s = 0.0

    def negotiate(self, timeout_s: float) -> None:
        """Reads the greeting and leaves negotiation mode.

        Raises:
            QmpError: No greeting came in time.
        """
        self._deadline_s = time.monotonic() + timeout_s
        if "QMP" not in self._read_message():
            raise QmpError("the monitor did not greet")
        self.execute("qmp_capabilities", timeout_s=timeout_s)

    def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float,
    ) -> Any:
        """Runs a command; `fds` travel with it.

        Raises:
            QmpError: It was refused, or no answer came in time.
        """
        self.send(command, arguments, fds=fds, timeout_s=timeout_s)
        return self.receive(command, timeout_s)

    def send(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float,
    ) -> None:
        """Sends a command; `receive` has its answer, in the order of sending.

        Raises:
            QmpError: The VMM is gone.
        """
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        line = json.dumps(request).encode()
        try:
            self._socket.settimeout(timeout_s)
            if fds:
                socket.send_fds(self._socket, [line], fds)
            else:
                self._socket.sendall(line)
        except OSError as error:
            raise QmpError(f"{command}: the VMM is gone ({error})") from error

    def receive(self, command: str, timeout_s: float) -> Any:
        """The answer to the command that was sent first of those without one.

        Raises:
            QmpError: It was refused, or no answer came in time.
        """
        self._deadline_s = time.monotonic() + timeout_s
        while True:
            message = self._read_message()
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QmpError(f"{command}: {message['error'].get('desc')}")

    def wait_event(self, name: str, timeout_s: float) -> None:
        """Returns once an event of that name has come since it was last waited for.

        Raises:
            QmpError: It did not come in time.
        """
        self._deadline_s = time.monotonic() + timeout_s
        while name not in self._events:
            self._read_message()
        self._events.remove(name)

    def forget_events(self) -> None:
        """Drops events that nobody waits for."""
        self._events.clear()

    def close(self) -> None:
        """Closes the socket. Idempotent."""
        self._socket.close()

    def _read_message(self) -> dict[str, Any]:
        while (end := self._buffer.find(b"\n")) < 0:
            remaining_s = self._deadline_s - time.monotonic()
            if remaining_s <= 0:
                raise QmpError("the monitor did not answer in time")
            try:
                self._socket.settimeout(remaining_s)
                data = self._socket.recv(1 << 16)
            except TimeoutError as error:
                raise QmpError("the monitor did not answer in time") from error
            except OSError as error:
                raise QmpError(f"the VMM is gone ({error})") from error
            if not data:
                raise QmpError("the VMM is gone")
            self._buffer += data
            if len(self._buffer) > _MAX_LINE_BYTES:
                raise QmpError("the monitor sent an endless line")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError as error:
            raise QmpError("the monitor did not send JSON") from error
        if not isinstance(message, dict):
            raise QmpError("the monitor did not send JSON objects")
        message = cast("dict[str, Any]", message)
        if "event" in message:
            self._events.append(message["event"])
        return message
