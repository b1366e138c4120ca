"""What the processes of a family of VMMs do before they are what they are. Pure, standard library only.

A family is a VMM that has run, or started, for a moment and then stands still for ever, and its forks (see
`rollout.sandbox.microvm.prototype` and `half_started`). It is called their prototype here. They are children
of the family's *first process*, which does nothing but start the prototype, and ends when its socket is
closed: it is the first of a process id namespace, so the kernel ends all others with it.

Each is confined as every VMM is (`rollout.sandbox.microvm.confinement`), but for this:

- The root folder is changed by `pivot_root`: the kernel gives no user namespace to who was confined by
  `chroot`, and forks need one of their own.
- A prototype may fork, and has no limit on threads of its own, because those of its forks count as its own.
  Its filter answers a request to keep memory from forks (`MADV_DONTFORK`, which QEMU makes for the guest's
  memory) with success, and nothing happens. It and its forks can send no signals, but for the last point
  below: all have one user.
- A prototype that is a fork of another's has a user namespace of its own, so that what its base holds can
  reach the memory of no other process of the family; the kernel allows 32 of them in each other.
- A fork has the prototype's user, but namespaces of its own, user namespace included; its root folder is
  empty, for all that it needs is open; and it can neither fork nor execute anything.
- Forks of a program that has only begun to start have files to open yet, and keep the root folder. Its
  `/proc` shows a fork itself alone, unless the owner is not root and the kernel refuses him a new one: then
  it shows that there are others. They may send a signal to a thread by its number, as every VMM under KVM
  must to its own, and no other has a number in their process id namespaces; but to no process group, which
  all of a family share. That program itself runs no guest.
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Mapping, Sequence

from rollout.sandbox.microvm.confinement import (
    CLONE_THREAD,
    DENIED,
    NAMESPACES,
    NEW_USERS,
    VIEW_FOLDER,
    SystemCall,
    descriptors,
    filter_of,
    filtered,
    limited,
    no_huge_pages,
    no_privileges,
    own_proc,
    own_user,
)

__all__ = [
    "EMPTY_FOLDER",
    "FORK_NAMESPACES",
    "STOP_SIGNAL",
    "SUCCESSOR_NAMESPACES",
    "closed",
    "first_process",
    "fork",
    "mapped",
    "new_eventfd",
    "not_blocking",
    "prototype",
    "replaced",
    "successor",
    "thread",
]

EMPTY_FOLDER = "/empty"
"""Where VMMs see a folder with nothing in it."""
STOP_SIGNAL = signal.SIGFPE
"""Stops a thread for ever. Of the few that QEMU blocks in no thread."""
FORK_NAMESPACES = NAMESPACES | NEW_USERS | signal.SIGCHLD
"""Flags of `clone` for a fork."""
SUCCESSOR_NAMESPACES = NEW_USERS | signal.SIGCHLD
"""Flags of `clone` for a fork that may become a prototype."""

_CLOSE, _MMAP, _RT_SIGACTION, _DUP2, _CLONE, _CHDIR, _SETSID = 3, 9, 13, 33, 56, 80, 112
_PIVOT_ROOT, _CHROOT, _MOUNT, _UMOUNT2, _EVENTFD2, _DUP3, _CLOSE_RANGE = 155, 161, 165, 166, 290, 292, 436
_EXECVE, _EXECVEAT = 59, 322
_FCNTL, _F_SETFL = 72, 4
_SIGNALLING = (62, 129, 200, 297, 424)
"""kill, rt_sigqueueinfo, tkill, rt_tgsigqueueinfo, pidfd_send_signal."""
_TGKILL = 234
_ALL = 0xFFFFFFFF
_MS_BIND, _MS_REC, _MNT_DETACH = 4096, 16384, 2
_CLONE_PARENT = 0x8000
_MADV_DONTFORK = 10
_PROT_READ_WRITE, _MAP_PRIVATE, _MAP_FIXED, _MAP_NORESERVE = 3, 0x2, 0x10, 0x4000
_DEFAULT, _IGNORED = 0, 1
_SA_RESTORER, _SA_RESTART = 0x04000000, 0x10000000
_CLONE_VM, _CLONE_FS, _CLONE_FILES, _CLONE_SIGHAND = 0x100, 0x200, 0x400, 0x800
_CLONE_SYSVSEM, _CLONE_SETTLS, _CLONE_CHILD_CLEARTID, _CLONE_CHILD_SETTID = (
    0x40000,
    0x80000,
    0x200000,
    0x1000000,
)
_THREAD_FLAGS = (
    *(_CLONE_VM, _CLONE_FS, _CLONE_FILES, _CLONE_SIGHAND, CLONE_THREAD, _CLONE_SYSVSEM),
    *(_CLONE_SETTLS, _CLONE_CHILD_CLEARTID, _CLONE_CHILD_SETTID),
)


def first_process(
    control_fd: int, log_fd: int, owner: tuple[str, str], *, own_users: bool
) -> list[SystemCall]:
    """What the first process of a family does.

    Args:
        control_fd: Its socket, as it gets it; moved to where a template has it.
        log_fd: Its log.
        owner: User and group of the owner, outside of all namespaces.
        own_users: It is in a user namespace of its own.
    """
    view, here, lowest_free_fd = VIEW_FOLDER.encode() + b"\0", b".\0", 4
    return [
        SystemCall("dup2", _DUP2, (control_fd, lowest_free_fd - 1)),
        SystemCall("dup2", _DUP2, (log_fd, 1)),
        SystemCall("dup2", _DUP2, (log_fd, 2)),
        SystemCall("close_range", _CLOSE_RANGE, (lowest_free_fd, _ALL, 0)),
        SystemCall("setsid", _SETSID, ()),
        *(own_user(*owner, free_fd=lowest_free_fd) if own_users else ()),
        # Who is not root is refused this where part of /proc is hidden; then the launcher's is seen.
        own_proc(may_fail=own_users, hides_others=True),
        _handler(signal.SIGCHLD, _IGNORED),  # so that the kernel reaps
        SystemCall("bind the view", _MOUNT, (view, view, 0, _MS_BIND | _MS_REC, 0)),
        SystemCall("chdir", _CHDIR, (view,)),
        SystemCall("pivot_root", _PIVOT_ROOT, (here, here)),
        SystemCall("umount2", _UMOUNT2, (here, _MNT_DETACH)),
        SystemCall("chdir", _CHDIR, (b"/\0",)),
    ]


def prototype(
    fds: Sequence[int],
    limits: Mapping[str, int],
    uid: int | None,
    stop: tuple[int, int],
    *,
    signals_threads: bool = False,
) -> list[SystemCall]:
    """What a prototype does before it goes on to its program.

    Args:
        fds: As those of `confinement`; the last but one is its socket.
        limits: Resource limits.
        uid: Its user; None to stay the owner's.
        stop: Addresses of the handler of `STOP_SIGNAL`, and of how that returns.
        signals_threads: It and its forks can send signals to their own threads.
    """
    denied = [*(number for number in DENIED if number != _CHROOT), *_SIGNALLING]
    if not signals_threads:
        denied.append(_TGKILL)
    program = filter_of(
        denied,
        clone_flags=CLONE_THREAD | _CLONE_PARENT,
        ignored_advice=_MADV_DONTFORK,
    )
    return [
        *descriptors(fds),
        *limited(limits),
        *no_privileges(uid),
        no_huge_pages(),
        _handler(STOP_SIGNAL, *stop),
        filtered(program),
    ]


def successor(owner: tuple[str, str], free_fd: int) -> list[SystemCall]:
    """What a fork that may become a prototype itself does when its descriptors are its own.

    Args:
        owner: User and group of the prototype.
        free_fd: The lowest number that none of its descriptors has.
    """
    return [*own_user(*owner, free_fd=free_fd), *no_privileges(None)]


def fork(
    owner: tuple[str, str], limits: Mapping[str, int], free_fd: int, *, keeps_root: bool = False
) -> list[SystemCall]:
    """What a fork does when its descriptors are its own, and before it has its threads.

    Args:
        owner: User and group of the prototype.
        limits: Resource limits.
        free_fd: The lowest number that none of its descriptors has.
        keeps_root: Its root folder stays the prototype's: it has files to open yet.
    """
    empty = [
        SystemCall("chroot", _CHROOT, (EMPTY_FOLDER.encode() + b"\0",)),
        SystemCall("chdir", _CHDIR, (b"/\0",)),
    ]
    return [
        *own_user(*owner, free_fd=free_fd),
        *([] if keeps_root else empty),
        *limited(limits),
        *no_privileges(None),
        _handler(STOP_SIGNAL, _DEFAULT),
        filtered(filter_of([*DENIED, _EXECVE, _EXECVEAT])),
    ]


def thread(stack: int, storage: int, id_address: int) -> SystemCall:
    """Makes a thread that goes on where another one stopped.

    Args:
        stack: The other's stack pointer in the handler of `STOP_SIGNAL`, at the handler's return address.
        storage: Its thread-local storage.
        id_address: Where the C library keeps its id.
    """
    arguments = (sum(_THREAD_FLAGS), stack, 0, id_address, storage)
    return SystemCall("thread", _CLONE, arguments, makes_thread=True)


def replaced(number: int, by: int, *, closes_on_exec: int) -> SystemCall:
    """Makes a descriptor number mean what another one does."""
    return SystemCall("dup3", _DUP3, (by, number, closes_on_exec))


def not_blocking(number: int) -> SystemCall:
    """Makes an open file one that nobody waits for: what is open, not its number, has this."""
    return SystemCall("fcntl", _FCNTL, (number, _F_SETFL, os.O_NONBLOCK))


def closed(number: int) -> SystemCall:
    """Closes a descriptor."""
    return SystemCall("close", _CLOSE, (number,))


def new_eventfd(number: int, count: int, flags: int, closes_on_exec: int, free_fd: int) -> list[SystemCall]:
    """Makes a number mean an event counter that nobody else has.

    Args:
        number: The number.
        count: What it has counted.
        flags: Of `eventfd2`.
        closes_on_exec: `O_CLOEXEC`, or 0.
        free_fd: The lowest number that is no descriptor.
    """
    return [
        SystemCall("eventfd2", _EVENTFD2, (count, flags)),
        replaced(number, free_fd, closes_on_exec=closes_on_exec),
        closed(free_fd),
    ]


def mapped(start: int, end: int, file: int) -> SystemCall:
    """Maps a file over a part of memory, privately."""
    flags = _MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
    return SystemCall("mmap", _MMAP, (start, end - start, _PROT_READ_WRITE, flags, file, 0))


def _handler(number: int, handler: int, restorer: int = 0) -> SystemCall:
    """Says what a signal does: `struct sigaction` of the kernel, with all signals blocked meanwhile."""
    flags = _SA_RESTORER | _SA_RESTART if restorer else 0
    action = struct.pack("QQQQ", handler, flags, restorer, 0xFFFFFFFFFFFFFFFF)
    return SystemCall("rt_sigaction", _RT_SIGACTION, (number, action, 0, 8))
