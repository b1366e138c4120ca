"""Starts VMMs: one that boots, one that waits to become a checkpoint, one that others are forked from."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from dataclasses import replace
from pathlib import Path

from rollout.errors import BootError
from rollout.sandbox.microvm.confinement import FIRST_FD
from rollout.sandbox.microvm.ends import VmmEnds
from rollout.sandbox.microvm.half_started import HalfStarted, pipe
from rollout.sandbox.microvm.machine import BootFiles, MachineShape, Start, qemu_argv
from rollout.sandbox.microvm.prototype import Candidate, Family, control_pair, files_of
from rollout.sandbox.microvm.spawner import MAX_THREADS, Spawner, limits_for
from rollout.sandbox.microvm.tsc import measure_tsc_khz
from rollout.sandbox.microvm.vmm import Vmm

__all__ = ["max_threads_of_fork", "start_candidate", "start_halfway", "start_vmm"]

_NUM_ENDS = 6
"""Descriptors of `VmmEnds.far_fds` of one that waits."""
_LIMITS = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 256}
_MAX_FAMILY_THREADS = 1 << 15
"""Of all forks of one VMM: the kernel counts them for its user, too."""
_COUNTS_BY_NAMESPACE = (5, 14)
"""From this Linux on, threads are also counted for each user namespace by itself."""


def start_vmm(
    spawner: Spawner,
    shape: MachineShape,
    files: BootFiles,
    ram_fd: int,
    *,
    make_base: bool = False,
    from_template: bool = False,
    use_scan: bool,
    timeout_s: float,
) -> Vmm:
    """Starts a VMM: dormant on the base `ram_fd`, or booting into it when `make_base`.

    The memory file stays the caller's and open as long as the VMM is used. `from_template` is that of
    `Spawner.spawn`.

    Raises:
        BootError: It did not come up in time; its own last words are in the message.
    """
    boots = make_base and files.kernel is not None
    ends = VmmEnds.open(forgets_code=None if make_base else shape.accel == "tcg")
    start = _waiting(files)
    if make_base:
        start = replace(
            start,
            share=True,
            kernel=files.kernel,
            initrd=files.initrd if boots else None,
            tsc_khz=measure_tsc_khz() if boots and shape.accel == "tcg" else None,
            firmware=files.firmware,
            rewind_fds=None,
        )
    fds = ends.far_fds(ram_fd)
    try:
        child = spawner.spawn(qemu_argv(shape, start), fds, _LIMITS, from_template=from_template)
    except BaseException:
        ends.close()
        raise
    ends.has_started()
    vmm = Vmm(child, ends, ram_fd, shape.memory_bytes, use_scan=use_scan, is_dormant=not make_base)
    vmm.negotiate(timeout_s)
    return vmm


def start_candidate(
    spawner: Spawner,
    shape: MachineShape,
    files: BootFiles,
    ram_fd: int,
    *,
    use_scan: bool,
    timeout_s: float,
) -> Candidate:
    """Starts a family, and in it a VMM that waits on the base `ram_fd` and may become a prototype.

    Raises:
        BootError: It did not come up in time, or families cannot be made here.
    """
    candidate = _begin(spawner, shape, files, ram_fd, use_scan=use_scan)
    try:
        candidate.vmm.negotiate(timeout_s)
    except BootError:
        candidate.kill()
        candidate.family.end()
        raise
    return candidate


def start_halfway(
    spawner: Spawner,
    shape: MachineShape,
    files: BootFiles,
    ram_fd: int,
    *,
    use_scan: bool,
    timeout_s: float,
) -> tuple[HalfStarted, Family]:
    """Starts a family, and in it a program that is held before it makes its machine.

    Raises:
        BootError: It does not come so far in time, or families cannot be made here.
    """
    theirs, hold = pipe()
    with hold:
        theirs.close()  # it opens one of its own, by which we know that it is there
        candidate = _begin(spawner, shape, files, ram_fd, use_scan=use_scan, hold_fd=hold.fileno())
        try:
            return HalfStarted(candidate, hold, timeout_s), candidate.family
        except BaseException:
            candidate.family.end()
            raise


def _begin(
    spawner: Spawner,
    shape: MachineShape,
    files: BootFiles,
    ram_fd: int,
    *,
    use_scan: bool,
    hold_fd: int | None = None,
) -> Candidate:
    """Starts a family, and in it a VMM that waits, held by a pipe if one is given."""
    more_fds = [] if hold_fd is None else [hold_fd]
    start = replace(_waiting(files), has_forks=True)
    if hold_fd is not None:
        start = replace(start, hold_fd=FIRST_FD + _NUM_ENDS)
    family = Family(spawner, qemu_argv(shape, start))
    with contextlib.ExitStack() as undo:
        undo.callback(family.end)
        control, theirs = control_pair()
        undo.callback(control.close)
        ends = VmmEnds.open(forgets_code=shape.accel == "tcg")
        undo.callback(ends.close)
        uid = spawner.new_uid(is_family=True)
        user, group = (os.geteuid(), os.getegid()) if uid is None else (uid, uid)
        with theirs:
            fds = [*ends.far_fds(ram_fd), *more_fds, theirs.fileno()]
            limits = {**limits_for(fds, max_threads_of_fork(platform.release())), **_LIMITS}
            own_limits = {**limits_for(fds, _MAX_FAMILY_THREADS), **_LIMITS}
            child = family.start(fds, uid, own_limits, signals_threads=hold_fd is not None)
            given = files_of([*fds, child.log_fd])
        undo.pop_all()
    ends.has_started()
    vmm = Vmm(child, ends, ram_fd, shape.memory_bytes, use_scan=use_scan, is_dormant=True)
    return Candidate(vmm, family, control, given, (str(user), str(group)), limits)


def _waiting(files: BootFiles) -> Start:
    """A VMM that waits to become a checkpoint; its descriptors are those of `VmmEnds.far_fds`."""
    return Start(
        binary=files.binary,
        ram=Path(f"/proc/self/fd/{FIRST_FD + 3}"),
        share=False,
        qmp_fd=FIRST_FD,
        guest_fd=FIRST_FD + 1,
        state_fd=FIRST_FD + 2,
        disk=files.disk,
        filters_itself=files.filters_itself,
        rewind_fds=(FIRST_FD + 4, FIRST_FD + 5),
    )


def max_threads_of_fork(release: str) -> int:
    """Most threads of a fork of a VMM, on a kernel of that name; before 5.14 those of all its forks."""
    found = re.match(r"(\d+)\.(\d+)", release)
    is_by_namespace = found is not None and (int(found[1]), int(found[2])) >= _COUNTS_BY_NAMESPACE
    return MAX_THREADS if is_by_namespace else _MAX_FAMILY_THREADS
