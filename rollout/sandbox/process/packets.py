"""Messages between the engine and its fork server, with descriptors: JSON over SOCK_SEQPACKET.

One packet is one message, so nothing has to be framed.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, cast

__all__ = ["MAX_DESCRIPTORS", "Message", "decode", "encode", "receive", "send"]

MAX_DESCRIPTORS = 250
"""In one packet; the kernel's own limit is 253."""
MAX_PACKET_BYTES = 128 << 10

Message = dict[str, Any]


def encode(message: Mapping[str, Any]) -> bytes:
    """One message as bytes."""
    return json.dumps(message, separators=(",", ":")).encode()


def decode(data: bytes) -> Message | None:
    """The message, or None for anything that is not one."""
    try:
        value: object = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return cast("Message", value) if isinstance(value, dict) else None


def send(channel: socket.socket, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
    """Sends one message.

    Raises:
        OSError: The other end is gone, or does not take it (of a non-blocking socket).
    """
    if fds:
        socket.send_fds(channel, [encode(message)], list(fds))
    else:
        channel.send(encode(message))


def receive(channel: socket.socket, max_fds: int) -> tuple[Message, list[int]] | None:
    """Waits for one message; None at the end of the stream.

    Raises:
        OSError: The connection broke.
        ValueError: What came is no message; its descriptors are closed.
    """
    data, fds, _, _ = socket.recv_fds(channel, MAX_PACKET_BYTES, max_fds)
    if not data:
        return None
    message = decode(data)
    if message is None:
        for fd in fds:
            os.close(fd)
        raise ValueError("not a message")
    return message, fds
