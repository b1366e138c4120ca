"""Memory files: guest RAM as a file without a name, written once and then sealed for good."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator

import numpy as np

from rollout.errors import BootError, CheckpointError
from rollout.sandbox.microvm.machine import GUEST_PAGE_BYTES
from rollout.sandbox.microvm.memory import PageNumbers

__all__ = ["CHUNK_PAGES", "extents", "new_memory_file", "seal", "write_at", "write_runs"]

CHUNK_PAGES = 4096
"""Pages that are moved at once."""
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_LET_GO_S = 10.0


def new_memory_file(size_bytes: int) -> int:
    """A memory file for a VM to boot into.

    Raises:
        BootError: There is no memory for it.
    """
    fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
    except OSError as error:
        os.close(fd)
        raise BootError.wrap(error, "cannot make guest memory") from error
    return fd


def seal(fd: int) -> None:
    """Makes a memory file immutable: from here on nobody, the VMM included, can write to it.

    A VMM that was killed lets go of its memory when the last of its threads is gone, which is waited for.

    Raises:
        BootError: A process still maps it for writing.
    """
    give_up_at_s = time.monotonic() + _LET_GO_S
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > give_up_at_s:
                raise BootError.wrap(error, "cannot seal a base: its VM still runs") from error
            time.sleep(0.005)
        else:
            return


def extents(fd: int) -> Iterator[tuple[int, bytes]]:
    """The parts of a sparse file that are not holes, in pieces of at most 16 MiB."""
    size_bytes = os.fstat(fd).st_size
    end = 0
    while end < size_bytes:
        try:
            begin = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        end = os.lseek(fd, begin, os.SEEK_HOLE)
        for offset in range(begin, end, CHUNK_PAGES * GUEST_PAGE_BYTES):
            yield offset, os.pread(fd, min(CHUNK_PAGES * GUEST_PAGE_BYTES, end - offset), offset)


def write_runs(fd: int, numbers: PageNumbers, data: bytes) -> None:
    """Writes pages in runs of neighbours."""
    if len(data) != len(numbers) * GUEST_PAGE_BYTES:
        raise CheckpointError("the base's pages are incomplete")
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] + 2) != 1).tolist()
    for begin, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
        piece = data[begin * GUEST_PAGE_BYTES : end * GUEST_PAGE_BYTES]
        write_at(fd, piece, int(numbers[begin]) * GUEST_PAGE_BYTES)


def write_at(fd: int, data: bytes, offset: int) -> None:
    """Writes all of it.

    Raises:
        OSError: There is no memory for it.
    """
    if os.pwrite(fd, data, offset) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
