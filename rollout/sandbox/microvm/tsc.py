"""The rate of this machine's time-stamp counter, which a guest under TCG reads as its own.

A guest kernel measures the rate against the programmable interval timer at boot. On a busy host the VMM
is descheduled in the middle of that, the measurement fails, and the kernel waits for ever for a timer that
nothing drives. So the host, whose clock is good, measures and tells it.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable

__all__ = ["measure_tsc_khz"]

# rdtsc; shl rdx, 32; or rax, rdx; ret
_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_INTERVAL_S = 0.05
_ROUNDS = 30


def measure_tsc_khz() -> int:
    """The counter's rate in kHz, good to about 0.01%.

    The reading with the shortest time around it is the least disturbed one, so each end of the interval is
    read several times.

    Raises:
        OSError: This process may not make memory executable.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    try:
        page.write(_RDTSC)
        code = (ctypes.c_char * mmap.PAGESIZE).from_buffer(page)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(code))
        try:
            begin_ns, begin = _steady_reading(read)
            time.sleep(_INTERVAL_S)
            end_ns, end = _steady_reading(read)
        finally:
            del read, code
    finally:
        page.close()
    return round((end - begin) * 1e6 / (end_ns - begin_ns))


def _steady_reading(read: Callable[[], int]) -> tuple[float, int]:
    """(nanoseconds, ticks) of the round in which least time passed between the clock's two readings."""
    best: tuple[int, float, int] | None = None
    for _ in range(_ROUNDS):
        before_ns = time.monotonic_ns()
        ticks = read()
        after_ns = time.monotonic_ns()
        reading = (after_ns - before_ns, (before_ns + after_ns) / 2, ticks)
        best = reading if best is None or reading < best else best
    assert best is not None
    return best[1], best[2]
