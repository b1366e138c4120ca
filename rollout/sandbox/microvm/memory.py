"""Guest memory from outside: which pages a VMM wrote since it mapped its base, and moving them.

Guest RAM is a private mapping of the base file, so a page that the guest (or its VMM) wrote is an anonymous
page and one that it only read still belongs to the file. The kernel knows which is which: no arming, no help
from the VMM, and writes by KVM guests count too. `PAGEMAP_SCAN` (Linux 6.7) answers for a whole range in one
call; `/proc/PID/pagemap`, 8 bytes a page, is the fallback.

The VMM must be stopped while its pages are read: nothing here checks that.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rollout.errors import CheckpointError
from rollout.sandbox.microvm.machine import GUEST_PAGE_BYTES

__all__ = [
    "GuestMemory",
    "PageNumbers",
    "Pages",
    "RawState",
    "has_pagemap_scan",
    "map_pages",
    "room_for",
    "runs",
]

Pages = NDArray[np.uint8]
"""Page contents, shape [num_pages, 4096]."""
PageNumbers = NDArray[np.uint32]
"""Guest page numbers, ascending, shape [num_pages]."""

# linux/fs.h: _IOWR('f', 16, struct pm_scan_arg), 12 u64 fields; struct page_region is three u64.
_PAGEMAP_SCAN = 0xC0606610
_SCAN_FORMAT = "12Q"
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_MAX_REGIONS = 4096
# Documentation/admin-guide/mm/pagemap.rst: bit 63 present, 62 swapped, 61 file page or shared anonymous.
_PRESENT_BIT, _SWAPPED_BIT, _FILE_BIT = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)
_MAX_VECTORS = 1024
"""IOV_MAX of Linux."""

_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("process_vm_readv", "process_vm_writev"):
    _function = getattr(_libc, _name)
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
    ]


@dataclass(frozen=True, slots=True)
class RawState:
    """A stopped machine as it was read: device state, and the pages that differ from its base.

    Attributes:
        device_state: What QEMU saved.
        page_numbers: Shape [n], ascending.
        pages: Shape [n, 4096].
        pause_s: Seconds that the guest stood still for it.
    """

    device_state: bytes
    page_numbers: PageNumbers
    pages: Pages
    pause_s: float


def has_pagemap_scan() -> bool:
    """Whether this kernel has the `PAGEMAP_SCAN` ioctl, found out by calling it on an empty range."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _scan(fd, 0, 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


@dataclass(frozen=True, slots=True)
class GuestMemory:
    """The mapping of guest RAM in a VMM's address space.

    Attributes:
        pid: The VMM, as this process sees it.
        start: Address of the mapping.
        end: Address after it.
        use_scan: Use `PAGEMAP_SCAN` instead of reading pagemap.
    """

    pid: int
    start: int
    end: int
    use_scan: bool

    @classmethod
    def find(cls, pid: int, file: tuple[int, int], size_bytes: int, *, use_scan: bool) -> GuestMemory:
        """Finds the mapping by the file that it maps.

        Args:
            pid: The VMM.
            file: (device, inode) of the base.
            size_bytes: Guest memory; a guest with a hole below 4 GiB has it in several mappings, which is
                refused.
            use_scan: Use `PAGEMAP_SCAN`.

        Raises:
            CheckpointError: The mapping is not there, or not in one piece.
        """
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError as error:
            raise CheckpointError.wrap(error, f"cannot read the mappings of VMM {pid}") from error
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) < 6 or int(fields[4]) != file[1]:
                continue
            start, end = (int(part, 16) for part in fields[0].split("-"))
            if end - start == size_bytes:
                return cls(pid, start, end, use_scan)
        raise CheckpointError(f"VMM {pid} does not map its base file in one piece of {size_bytes} bytes")

    def private_pages(self) -> PageNumbers:
        """Numbers of the pages that differ from the base, ascending.

        Raises:
            CheckpointError: The VMM is gone or cannot be inspected.
        """
        try:
            fd = os.open(f"/proc/{self.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return self._scan_regions(fd) if self.use_scan else self._read_pagemap(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise CheckpointError.wrap(error, f"cannot read the page map of VMM {self.pid}") from error

    def read(self, numbers: PageNumbers, room: Pages | None = None) -> Pages:
        """Copies pages out.

        Args:
            numbers: Which, shape [n].
            room: Where they may go, if they fit; what is returned is then a part of it.

        Raises:
            CheckpointError: The VMM is gone.
        """
        if room is None or len(room) < len(numbers):
            room = np.empty((len(numbers), GUEST_PAGE_BYTES), np.uint8)
        pages = room[: len(numbers)]
        self._move("process_vm_readv", numbers, pages)
        return pages

    def write(self, numbers: PageNumbers, pages: Pages) -> None:
        """Copies pages in; they become private to the VMM.

        Raises:
            CheckpointError: The VMM is gone.
        """
        self._move("process_vm_writev", numbers, np.ascontiguousarray(pages))

    def _move(self, function: str, numbers: PageNumbers, pages: Pages) -> None:
        """One vector for each run of neighbouring pages, on the remote side; the local side is one piece."""
        if not len(numbers):
            return
        firsts, lengths = runs(numbers)
        remote = np.empty((len(firsts), 2), np.uint64)
        remote[:, 0] = firsts.astype(np.uint64) * GUEST_PAGE_BYTES + self.start
        remote[:, 1] = lengths.astype(np.uint64) * GUEST_PAGE_BYTES
        local_address = pages.ctypes.data
        for begin in range(0, len(remote), _MAX_VECTORS):
            part = np.ascontiguousarray(remote[begin : begin + _MAX_VECTORS])
            size_bytes = int(part[:, 1].sum())
            local = np.array([local_address, size_bytes], np.uint64)
            moved = getattr(_libc, function)(self.pid, local.ctypes.data, 1, part.ctypes.data, len(part), 0)
            if moved != size_bytes:
                reason = os.strerror(ctypes.get_errno()) if moved < 0 else f"{moved} of {size_bytes} bytes"
                raise CheckpointError(f"{function} on VMM {self.pid} failed: {reason}")
            local_address += size_bytes

    def _scan_regions(self, fd: int) -> PageNumbers:
        found: list[NDArray[np.uint64]] = []
        position = self.start
        while position < self.end:
            regions, position = _scan(fd, position, self.end)
            found.append(regions)
        regions = (np.concatenate(found) - np.uint64(self.start)) // np.uint64(GUEST_PAGE_BYTES)
        return _numbers(regions[:, 0], regions[:, 1])

    def _read_pagemap(self, fd: int) -> PageNumbers:
        num_pages = (self.end - self.start) // GUEST_PAGE_BYTES
        entries = np.frombuffer(os.pread(fd, num_pages * 8, self.start // GUEST_PAGE_BYTES * 8), np.uint64)
        present = (entries & (_PRESENT_BIT | _SWAPPED_BIT)) != 0
        return np.flatnonzero(present & ((entries & _FILE_BIT) == 0)).astype(np.uint32)


def _scan(fd: int, start: int, end: int) -> tuple[NDArray[np.uint64], int]:
    """One `PAGEMAP_SCAN`: regions that are present or swapped and not of a file, and where the walk ended."""
    out = np.empty((_MAX_REGIONS, 3), np.uint64)
    size = struct.calcsize(_SCAN_FORMAT)
    argument = bytearray(
        struct.pack(
            _SCAN_FORMAT,
            *(size, 0, start, end, 0),
            *(out.ctypes.data, _MAX_REGIONS, 0),
            # inverted, all of, any of, returned
            *(_IS_FILE, _IS_FILE, _IS_PRESENT | _IS_SWAPPED, 0),
        )
    )
    count = fcntl.ioctl(fd, _PAGEMAP_SCAN, argument, True)
    # A walk that reached the end can report where an inner round of it stopped, so only a full
    # vector means more.
    walk_end = struct.unpack(_SCAN_FORMAT, argument)[4] if count == _MAX_REGIONS else end
    return out[:count, :2], walk_end


def _numbers(firsts: NDArray[np.uint64], ends: NDArray[np.uint64]) -> PageNumbers:
    """The page numbers of ascending regions [first, end)."""
    if not len(firsts):
        return np.empty(0, np.uint32)
    lengths = ends - firsts
    begins = np.cumsum(lengths) - lengths  # where each region's pages begin in the result
    return (np.repeat(firsts - begins, lengths.astype(np.int64)) + np.arange(lengths.sum())).astype(np.uint32)


def room_for(num_pages: int) -> Pages:
    """Room for pages, shape [num_pages, 4096], that the kernel has given already.

    Half of the time of a copy into new memory goes into page faults.
    """
    room = np.empty((num_pages, GUEST_PAGE_BYTES), np.uint8)
    room[:, 0] = 0
    return room


def map_pages(ram_fd: int, size_bytes: int) -> Pages:
    """The pages of a base, read where they are, shape [num_pages, 4096].

    Raises:
        OSError: They cannot be mapped.
    """
    # Private: a sealed file admits no shared mapping on older kernels, and nobody writes to this one.
    mapping = mmap.mmap(ram_fd, size_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    return np.frombuffer(mapping, np.uint8).reshape(-1, GUEST_PAGE_BYTES)


def runs(numbers: PageNumbers) -> tuple[PageNumbers, NDArray[np.int64]]:
    """Splits ascending page numbers into runs of neighbours: first numbers and lengths."""
    if not len(numbers):
        return numbers, np.empty(0, np.int64)
    starts = np.flatnonzero(np.diff(numbers, prepend=np.uint32(numbers[0] + 2)) != 1)
    return numbers[starts], np.diff(starts, append=len(numbers))
