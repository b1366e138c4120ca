"""What makes the clone of a machine another machine: entropy, clock, host name.

Needs root in a machine of its own.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time

from rollout.errors import GuestError

__all__ = ["take_identity"]

_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207


def take_identity(entropy: bytes, wall_time_s: float, hostname: str) -> None:
    """Mixes entropy into the kernel's pool and reseeds from it, steps the clock, sets the host name.

    Args:
        entropy: Random bytes of the host, counted as fully random.
        wall_time_s: Seconds since 1970.
        hostname: New name of the machine.

    Raises:
        GuestError: The kernel refused one of them.
    """
    try:
        # A bare descriptor: a file object would run much more code, all of it cold in a new clone.
        pool_fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
        size = len(entropy)
        fcntl.ioctl(pool_fd, _RNDADDENTROPY, struct.pack(f"ii{size}s", size * 8, size, entropy))
        fcntl.ioctl(pool_fd, _RNDRESEEDCRNG)
        os.close(pool_fd)
        time.clock_settime(time.CLOCK_REALTIME, wall_time_s)
        socket.sethostname(hostname)
    except (OSError, ValueError, OverflowError) as error:
        raise GuestError(f"the machine could not take its new identity: {error}") from error
