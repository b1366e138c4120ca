"""Probes of the kernel's memory management: what copy-on-write sandboxes and checkpoints rest on."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from pathlib import Path

from rollout.doctor.finding import Finding, Status

__all__ = [
    "kernel_same_page_merging",
    "pagemap",
    "pagemap_scan",
    "paging_findings",
    "swap",
    "transparent_huge_pages",
]

_PAGEMAP_SCAN = 0xC0606610
"""`_IOWR('f', 16, struct pm_scan_arg)`, from linux/fs.h."""
_SCAN_ARGUMENT = struct.Struct("<12Q")
"""size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, any-of mask, return mask."""
_REGION = struct.Struct("<3Q")
"""start, end, categories."""
_PAGE_IS_PRESENT = 1 << 3


def paging_findings() -> list[Finding]:
    """All probes of this module."""
    return [swap(), kernel_same_page_merging(), transparent_huge_pages(), pagemap_scan(), pagemap()]


def swap(proc: Path = Path("/proc")) -> Finding:
    """Swap makes the tail of every latency long, and hides that memory is used up."""
    try:
        areas = (proc / "swaps").read_text().splitlines()[1:]
    except OSError as error:
        return Finding("swap", Status.WARN, f"unknown: {error.strerror}")
    if areas:
        names = ", ".join(area.split()[0] for area in areas)
        return Finding("swap", Status.WARN, f"on ({names}): restores slow down when it is used", "swapoff -a")
    return Finding("swap", Status.OK, "off")


def kernel_same_page_merging(sysfs: Path = Path("/sys")) -> Finding:
    """KSM scans pages that clones share already, and lets one guest time another's memory."""
    try:
        running = (sysfs / "kernel/mm/ksm/run").read_text().strip()
    except OSError:
        return Finding("same-page merging (KSM)", Status.OK, "not in this kernel")
    if running == "1":
        return Finding(
            "same-page merging (KSM)",
            Status.WARN,
            "on: costs CPU, and a guest can find out what others hold by timing",
            "echo 2 > /sys/kernel/mm/ksm/run",
        )
    return Finding("same-page merging (KSM)", Status.OK, "off")


def transparent_huge_pages(sysfs: Path = Path("/sys")) -> Finding:
    """With `always`, one byte that a clone touches may copy 2 MiB."""
    name = "transparent huge pages"
    try:
        modes = (sysfs / "kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return Finding(name, Status.OK, "not in this kernel")
    mode = modes.partition("[")[2].partition("]")[0] or modes.strip()
    if mode == "always":
        return Finding(
            name,
            Status.WARN,
            "always: one touched byte of a clone can copy 2 MiB",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    return Finding(name, Status.OK, mode)


def pagemap_scan() -> Finding:
    """Maps four pages, writes the second, and asks the kernel which are there."""
    name = "PAGEMAP_SCAN"
    fallback = "checkpoints read /proc/PID/pagemap instead, a few ms slower; Linux 6.7 or later has it"
    page = mmap.PAGESIZE
    with mmap.mmap(-1, 4 * page, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[page] = 1
        anchor = ctypes.c_char.from_buffer(memory)
        start = ctypes.addressof(anchor)
        del anchor  # an exported buffer would keep the mapping from closing
        try:
            regions = _scan(start, start + 4 * page)
        except OSError as error:
            return Finding(name, Status.WARN, f"not in this kernel ({error.strerror})", fallback)
    if regions != [(start + page, start + 2 * page)]:
        return Finding(name, Status.WARN, "answers, but not with the page that was written", fallback)
    return Finding(name, Status.OK, "works: found exactly the page that was written")


def _scan(start: int, end: int) -> list[tuple[int, int]]:
    vector = ctypes.create_string_buffer(_REGION.size * 8)
    argument = bytearray(
        _SCAN_ARGUMENT.pack(
            _SCAN_ARGUMENT.size, 0, start, end, 0, ctypes.addressof(vector), 8, 0, 0, _PAGE_IS_PRESENT, 0,
            _PAGE_IS_PRESENT,
        )
    )  # fmt: skip
    descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        count = fcntl.ioctl(descriptor, _PAGEMAP_SCAN, argument)
    finally:
        os.close(descriptor)
    return [_REGION.unpack_from(vector, index * _REGION.size)[:2] for index in range(count)]


def pagemap() -> Finding:
    """Whether page states and the memory of own children can be read at all."""
    name = "memory of own processes"
    try:
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            readable = len(os.pread(descriptor, 8, 0)) == 8
        finally:
            os.close(descriptor)
    except OSError as error:
        return Finding(
            name, Status.MISSING, f"/proc/self/pagemap: {error.strerror}", "mount /proc", ("microvm",)
        )
    scope = _read_int(Path("/proc/sys/kernel/yama/ptrace_scope"))
    if not readable or (scope is not None and scope >= 3):
        return Finding(
            name,
            Status.MISSING,
            f"not readable (yama ptrace_scope {scope})",
            "boot without kernel.yama.ptrace_scope=3",
            ("microvm",),
        )
    return Finding(name, Status.OK, "readable")


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
