"""What a VMM is confined by, as a list of system calls. Pure, standard library only.

For x86-64 Linux, 5.9 or later. A new process, which is in namespaces of its own already, carries them out in
this order, and goes on as the VMM:

- Its descriptors are the ones that it is given, from `FIRST_FD` on, and its log.
- Users: one of its own where the owner is root; else the owner's, alone in a user namespace.
- `VIEW_FOLDER` is its root: read-only, and all that there is.
- Limits on its address space, threads, file size and descriptors; no core dumps.
- No group, no capability, no way to gain privileges.
- A system call filter: no new process, socket, tracing, mount, namespace, key, or io_uring, and no limits or
  priority of another process. QEMU's own `-sandbox`, which also ends its ability to execute programs, comes
  on top.

Who carries them out: the launcher's own child, which then executes the VMM's program, or a template that has
executed it already (`rollout.sandbox.microvm.template`).
"""

from __future__ import annotations

import resource
import signal
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = [
    "CLONE_THREAD",
    "DENIED",
    "FIRST_FD",
    "NAMESPACES",
    "NEW_USERS",
    "VIEW_FOLDER",
    "Filter",
    "SystemCall",
    "confinement",
    "descriptors",
    "filter_header",
    "filter_of",
    "filtered",
    "limited",
    "namespaces",
    "no_huge_pages",
    "no_privileges",
    "own_proc",
    "own_user",
]

FIRST_FD = 100
"""Number of a request's first descriptor in the new process; its standard error is the request's last one."""
VIEW_FOLDER = "/vmm"
"""Where the launcher sees what is to be the root folder of VMMs."""

_WRITE, _OPEN, _CLOSE, _DUP2 = 1, 2, 3, 33
_MADVISE, _CLONE, _CHDIR, _SETSID, _SETGROUPS, _SETRESUID, _SETRESGID = 28, 56, 80, 112, 116, 117, 119
_CAPSET, _PRCTL, _CHROOT, _MOUNT, _PRLIMIT, _CLOSE_RANGE = 126, 157, 161, 165, 302, 436
_LOWEST_FREE_FD = 3
_O_WRONLY, _O_RDWR = 1, 2
_ALL = 0xFFFFFFFF
_PROC_FLAGS = 0x2 | 0x4 | 0x8  # no set-user-id, no devices, no programs
NEW_USERS = 0x10000000
NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000
"""mount, cgroup, UTS, IPC and process id."""
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 4, 22, 24
_PR_SET_NO_NEW_PRIVS, _PR_SET_THP_DISABLE = 38, 41
_SECCOMP_MODE_FILTER = 2
_LAST_CAPABILITY = 63

# linux/filter.h: instructions are (code, jump if true, jump if false, operand).
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_AUDIT_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
CLONE_THREAD = 0x00010000
_EPERM, _ENOSYS = 1, 38
_CLONE3 = 435
"""Its flags are in memory, where a filter cannot see them; glibc falls back to clone."""
DENIED = (
    *(41, 42, 43, 49, 50, 53, 288),  # socket, connect, accept, bind, listen, socketpair, accept4
    *(57, 58, 101, 310, 311, 312),  # fork, vfork, ptrace, process_vm_readv, process_vm_writev, kcmp
    *(155, 161, 165, 166, 272, 308),  # pivot_root, chroot, mount, umount2, unshare, setns
    *(428, 429, 430, 431, 432, 433, 442),  # open_tree, move_mount, fsopen and its like, mount_setattr
    *(175, 176, 246, 313, 320),  # kernel modules, kexec
    *(141, 251),  # setpriority, ioprio_set: of a process group, which VMMs may share
    *(248, 249, 250, 298, 321, 323),  # keys, perf_event_open, bpf, userfaultfd
    *(303, 304, 434, 438, 440),  # file handles, pidfd_open, pidfd_getfd, process_madvise
    *(425, 426, 427),  # io_uring, whose requests no filter sees
)
"""Numbers of the system calls on x86-64 that no VMM may make."""


class Filter(bytes):
    """An argument: a program of linux/filter.h, which a system call takes as a header that points to it."""


def filter_header(program: Filter, address: int) -> bytes:
    """What a system call gets for a filter that lies at an address: `struct sock_fprog`."""
    return struct.pack("HxxxxxxQ", len(program) // 8, address)


class SystemCall(NamedTuple):
    """One system call.

    Attributes:
        name: What it is for, for the message when it fails.
        number: Its number.
        arguments: Numbers, or what a pointer is to point to.
        may_fail: Its failure does not matter.
        makes_thread: It is a `clone` whose thread goes on elsewhere.
    """

    name: str
    number: int
    arguments: tuple[int | bytes | Filter, ...]
    may_fail: bool = False
    makes_thread: bool = False

    @property
    def outcome(self) -> int:
        """As the stub of a template reads it (`rollout.sandbox.microvm.template`)."""
        return 2 if self.makes_thread else int(self.may_fail)


def namespaces(*, own_users: bool) -> int:
    """Flags of `clone` for a VMM: its own namespaces.

    The network namespace, which has no network, is shared: one costs 200 KB, and the filter denies every new
    socket.
    """
    return NAMESPACES | (NEW_USERS if own_users else 0) | signal.SIGCHLD


def confinement(
    fds: Sequence[int], limits: Mapping[str, int], uid: int | None, owner: tuple[str, str]
) -> list[SystemCall]:
    """What the new process does.

    Args:
        fds: Its descriptors as it has them at first, all below `FIRST_FD`; the last one is its log.
        limits: Resource limits by their name in the `resource` module.
        uid: Its user; None where the owner is not root, for the owner's user.
        owner: User and group of the owner, outside of all namespaces.
    """
    return [
        *descriptors(fds),
        SystemCall("setsid", _SETSID, ()),
        *(own_user(*owner) if uid is None else [own_proc()]),
        SystemCall("chroot", _CHROOT, (VIEW_FOLDER.encode() + b"\0",)),
        SystemCall("chdir", _CHDIR, (b"/\0",)),
        *limited(limits),
        *no_privileges(uid),
        no_huge_pages(),
        filtered(filter_of(DENIED)),
    ]


def limited(limits: Mapping[str, int]) -> list[SystemCall]:
    """Sets resource limits, by their name in the `resource` module."""
    return [
        SystemCall(name, _PRLIMIT, (0, getattr(resource, name), struct.pack("QQ", value, value), 0))
        for name, value in limits.items()
    ]


def no_huge_pages() -> SystemCall:
    """Every page of it is small: a huge one would be copied whole."""
    return SystemCall("no huge pages", _PRCTL, (_PR_SET_THP_DISABLE, 1, 0, 0, 0))


def descriptors(fds: Sequence[int]) -> list[SystemCall]:
    """Moves those that are given to their numbers, the last one to be its log, and closes all others."""
    *given, log_fd = fds
    free = _LOWEST_FREE_FD
    return [
        *[SystemCall("dup2", _DUP2, (fd, FIRST_FD + offset)) for offset, fd in enumerate(given)],
        SystemCall("dup2", _DUP2, (log_fd, 1)),
        SystemCall("dup2", _DUP2, (log_fd, 2)),
        SystemCall("close_range", _CLOSE_RANGE, (free, FIRST_FD - 1, 0)),
        SystemCall("close_range", _CLOSE_RANGE, (FIRST_FD + len(given), _ALL, 0)),
        SystemCall("open /dev/null", _OPEN, (b"/dev/null\0", _O_RDWR, 0)),
        SystemCall("dup2", _DUP2, (free, 0)),
        SystemCall("close", _CLOSE, (free,)),
    ]


def own_proc(*, may_fail: bool = False, hides_others: bool = False) -> SystemCall:
    """The processes of its own namespace instead of the launcher's.

    Args:
        may_fail: Go on where the kernel refuses it.
        hides_others: Each process sees only those there that it could trace.
    """
    where = f"{VIEW_FOLDER}/proc".encode() + b"\0"
    options = b"hidepid=ptraceable\0" if hides_others else 0
    return SystemCall("mount /proc", _MOUNT, (b"proc\0", where, b"proc\0", _PROC_FLAGS, options), may_fail)


def own_user(uid: str, gid: str, free_fd: int = _LOWEST_FREE_FD) -> list[SystemCall]:
    """Makes the user of a new user namespace the one that it was: nobody else exists there."""
    calls: list[SystemCall] = []
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        data, free = text.encode(), free_fd
        calls += [
            SystemCall(f"open {name}", _OPEN, (f"/proc/self/{name}".encode() + b"\0", _O_WRONLY, 0)),
            SystemCall(f"write {name}", _WRITE, (free, data, len(data))),
            SystemCall("close", _CLOSE, (free,)),
        ]
    return calls


def no_privileges(uid: int | None) -> list[SystemCall]:
    """Takes every capability, and the user id given; none can be gained later."""
    calls = [
        # The kernel has fewer.
        SystemCall("drop", _PRCTL, (_PR_CAPBSET_DROP, capability, 0, 0, 0), may_fail=True)
        for capability in range(_LAST_CAPABILITY + 1)
    ]
    if uid is not None:
        calls += [
            SystemCall("setgroups", _SETGROUPS, (0, 0)),
            SystemCall("setresgid", _SETRESGID, (uid, uid, uid)),
            SystemCall("setresuid", _SETRESUID, (uid, uid, uid)),
        ]
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    return [
        *calls,
        SystemCall("capset", _CAPSET, (header, bytes(24))),
        SystemCall("no new privileges", _PRCTL, (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)),
        # A process that changed its user could not open its own descriptors by their path in /proc.
        SystemCall("dumpable", _PRCTL, (_PR_SET_DUMPABLE, 1, 0, 0, 0)),
    ]


def filtered(program: Filter) -> SystemCall:
    """Puts this thread, and all that come from it, under a filter."""
    return SystemCall("filter", _PRCTL, (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0))


def filter_of(denied: Sequence[int], clone_flags: int = CLONE_THREAD, ignored_advice: int = 0) -> Filter:
    """A filter of system calls.

    Args:
        denied: Numbers of those that fail.
        clone_flags: `clone` fails with none of them.
        ignored_advice: What `madvise` is told it has done, and does not do; 0 for none.
    """
    load = (_LOAD, 0, 0, 4)  # the architecture; the number is at 0, arguments at 16, 24, 32, ...
    program = [load, (_EQUAL, 1, 0, _AUDIT_ARCH_X86_64), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += [(_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, _KILL)]
    program += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    for number in denied:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    if ignored_advice:
        program += [(_EQUAL, 0, 4, _MADVISE), (_LOAD, 0, 0, 32), (_EQUAL, 0, 1, ignored_advice)]
        program += [(_RETURN, 0, 0, _ERRNO), (_RETURN, 0, 0, _ALLOW)]
    program += [(_EQUAL, 0, 4, _PRLIMIT), (_LOAD, 0, 0, 16), (_EQUAL, 1, 0, 0)]  # of itself only
    program += [(_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)]
    program += [(_EQUAL, 0, 3, _CLONE), (_LOAD, 0, 0, 16)]
    program += [(_ANY_BIT, 1, 0, clone_flags), (_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)]
    return Filter(b"".join(struct.pack("HBBI", *each) for each in program))
