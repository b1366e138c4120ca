"""The fork server's part of the guard: who may act on a process by its number.

A process of a sandbox may: the numbers are of the sandbox's own pid namespace, and siblings have none there.
A keeper may not: it lives among all others, and an environment that takes its keeper over must not be able
to signal them. The kernel stops the caller until the server has answered.

Which pid namespace a process lives in never changes, so the answer cannot become wrong between the look and
the call.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

__all__ = ["Guard"]

_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CALL = struct.Struct("=QII64x")
_ANSWER = struct.Struct("=QqiI")
_CONTINUE = 1


class Guard:
    """Answers the calls that the template's filter asks about.

    Args:
        listener: What loading the filter gave.
    """

    def __init__(self, listener: int) -> None:
        self.listener = listener
        self._own_namespace = _pid_namespace("self")

    def answer(self) -> None:
        """Answers one call; the listener is readable when there is one."""
        call = bytearray(_CALL.size)
        try:
            fcntl.ioctl(self.listener, _RECEIVE, call)
            number, process, _ = _CALL.unpack(call)
            is_inside = _pid_namespace(process) != self._own_namespace
            verdict = (0, _CONTINUE) if is_inside else (-errno.EPERM, 0)
            fcntl.ioctl(self.listener, _SEND, _ANSWER.pack(number, 0, *verdict))
        except (FileNotFoundError, ProcessLookupError):
            return  # the caller has been killed meanwhile


def _pid_namespace(process: int | str) -> int:
    return os.stat(f"/proc/{process}/ns/pid").st_ino  # noqa: PTH116
