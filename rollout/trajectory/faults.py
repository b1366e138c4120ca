"""Fault points: places where a test can have this process killed.

A point does nothing unless the environment variable `ROLLOUT_FAULT` names it, as `NAME` or `NAME:COUNT`: on
its COUNT-th passage (the first by default) the process kills itself with SIGKILL, as a crash would, so that
no handler, no `finally` and no buffer of this process has a say. Writes have one more point, `NAME.torn`,
which lets half of the bytes through first.

The variable is read at each passage, so a test can arm a forked child.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

__all__ = ["VARIABLE", "point", "write_all"]

VARIABLE = "ROLLOUT_FAULT"

_passages: Counter[str] = Counter()


def point(name: str) -> None:
    """A place where the process may be killed."""
    armed = os.environ.get(VARIABLE)
    if armed is not None and _is_hit(name, armed):
        os.kill(os.getpid(), signal.SIGKILL)


def write_all(descriptor: int, data: bytes | memoryview, name: str) -> None:
    """Writes all bytes, with the points `NAME.before`, `NAME.torn` and `NAME.after`.

    Raises:
        OSError: As `os.write`; part of the bytes may have been written.
    """
    point(f"{name}.before")
    view = memoryview(data)
    armed = os.environ.get(VARIABLE)
    if armed is not None and _is_hit(f"{name}.torn", armed):
        os.write(descriptor, view[: len(view) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    while view:
        view = view[os.write(descriptor, view) :]
    point(f"{name}.after")


def _is_hit(name: str, armed: str) -> bool:
    target, _, count = armed.partition(":")
    if target != name:
        return False
    _passages[name] += 1
    return _passages[name] == int(count or 1)
