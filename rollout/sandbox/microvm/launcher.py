"""The launcher: a small process that starts VMMs, and whose end is theirs. Standard library only.

It runs as PID 1 of its own PID namespace, inside bubblewrap: without network, with a read-only view. So VMMs
are never forked from a process with much memory, and when the launcher ends, for whatever reason, the kernel
ends every VMM with it. It ends when its owner closes the control socket, which the kernel does too when the
owner is killed.

What a VMM is confined by, all of it before its program begins:

- Namespaces of its own: processes, mounts, IPC, host name, cgroups; users too where the owner is not
  root. The network namespace, which has no network, is shared: one costs 200 KB, and the filter denies every
  new socket.
- A user id of its own where the owner is root, no group, no capability, no way to gain privileges.
- `VIEW_FOLDER` as its root: read-only, and all that there is.
- Limits on its address space, threads, file size and descriptors; no core dumps.
- A system call filter: no new process, socket, tracing, mount, namespace, key, or io_uring. QEMU's own
  `-sandbox`, which also ends its ability to execute programs, comes on top.

Each request is one packet on a SOCK_SEQPACKET socket: JSON with an argument vector and limits, and
descriptors, which the VMM finds at `FIRST_FD` and after. The answer carries a pidfd of the new process, so
that no process id is ever used after its process is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from typing import Any, NoReturn

__all__ = ["FIRST_FD", "MAX_PACKET_BYTES", "VIEW_FOLDER"]

FIRST_FD = 100
"""Number of a request's first descriptor in the new process; its standard error is the request's last one."""
MAX_PACKET_BYTES = 1 << 16
_MAX_FDS = 8
VIEW_FOLDER = "/vmm"
"""Where the launcher sees what is to be the root folder of VMMs."""
_EXEC_FAILED = 127
_SYS_CLONE = 56
_SYS_CAPSET = 126
_ENVIRONMENT = {
    **{"PATH": "/usr/bin:/bin", "LANG": "C", "MALLOC_ARENA_MAX": "1"},
    **{"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "16384"},
}
"""One arena, and freed memory goes back: with no huge pages, this saves an idle VMM a fifth of its memory."""
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_SET_THP_DISABLE = 24, 38, 22, 41
_SECCOMP_MODE_FILTER = 2
_CLONE_NEWUSER = 0x10000000
_CLONE_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000
"""mount, cgroup, UTS, IPC and process id."""
_PROC_FLAGS = 0x2 | 0x4 | 0x8  # no set-user-id, no devices, no programs
_LAST_CAPABILITY = 63

# linux/filter.h: instructions are (code, jump if true, jump if false, operand).
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_AUDIT_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
_CLONE_THREAD = 0x00010000
_EPERM, _ENOSYS = 1, 38
_CLONE3 = 435
"""Its flags are in memory, where a filter cannot see them; glibc falls back to clone."""
_DENIED = (
    *(41, 42, 43, 49, 50, 53, 288),  # socket, connect, accept, bind, listen, socketpair, accept4
    *(57, 58, 101, 310, 311, 312),  # fork, vfork, ptrace, process_vm_readv, process_vm_writev, kcmp
    *(155, 161, 165, 166, 272, 308),  # pivot_root, chroot, mount, umount2, unshare, setns
    *(428, 429, 430, 431, 432, 433, 442),  # open_tree, move_mount, fsopen and its like, mount_setattr
    *(175, 176, 246, 313, 320),  # kernel modules, kexec
    *(248, 249, 250, 298, 321, 323),  # keys, perf_event_open, bpf, userfaultfd
    *(303, 304, 434, 438, 440),  # file handles, pidfd_open, pidfd_getfd, process_madvise
    *(425, 426, 427),  # io_uring, whose requests no filter sees
)
"""Numbers of the system calls on x86-64 that no VMM may make."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def main() -> None:
    """Serves spawn requests on descriptor 0 until it is closed."""
    control = socket.socket(fileno=os.dup(0))
    os.set_inheritable(control.fileno(), False)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    os.set_blocking(wake_read, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the owner to handle
    gc.collect()
    gc.freeze()  # forked children then copy fewer pages
    while True:
        ready, _, _ = select.select([control, wake_read], [], [])
        if wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake_read, 4096)
            _reap()
        if control in ready and not _serve_one(control):
            return


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _serve_one(control: socket.socket) -> bool:
    """Answers one request; False when the owner is gone."""
    packet, fds, _, _ = socket.recv_fds(control, MAX_PACKET_BYTES, _MAX_FDS)
    if not packet:
        return False
    try:
        request = json.loads(packet)
        pid = _fork_into_namespaces(own_users=request["uid"] is None)
        if pid == 0:
            _become(request, fds)
        pidfd = os.pidfd_open(pid)
        try:
            socket.send_fds(control, [b"{}"], [pidfd])
        finally:
            os.close(pidfd)
    except OSError as error:
        control.send(json.dumps({"error": str(error)}).encode())
    finally:
        for fd in fds:
            os.close(fd)
    return True


def _become(request: dict[str, Any], fds: list[int]) -> NoReturn:
    """Turns this child into the VMM; whatever goes wrong is told on its standard error."""
    try:
        for offset, fd in enumerate(fds[:-1]):
            os.dup2(fd, FIRST_FD + offset, inheritable=True)
        log_fd = fds[-1]
        null_fd = os.open("/dev/null", os.O_RDWR)
        os.dup2(null_fd, 0)
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        os.set_blocking(2, True)
        os.closerange(3, FIRST_FD)
        os.closerange(FIRST_FD + len(fds) - 1, FIRST_FD + 64)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.setsid()
        if request["uid"] is None:
            _map_own_user()
        else:
            _check(_libc.mount(b"proc", f"{VIEW_FOLDER}/proc".encode(), b"proc", _PROC_FLAGS, None), "mount")
        os.chroot(VIEW_FOLDER)
        os.chdir("/")
        for name, value in request["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        _drop_privileges(request["uid"])
        _prctl(_PR_SET_THP_DISABLE, 1)
        _filter_system_calls()
        os.execve(request["argv"][0], request["argv"], _ENVIRONMENT)
    except BaseException as error:
        os.write(2, f"cannot start {request['argv'][0]}: {error}\n".encode())
    os._exit(_EXEC_FAILED)


def _fork_into_namespaces(*, own_users: bool) -> int:
    """As fork, into new namespaces. A raw system call: this process has no other thread to care for."""
    flags = _CLONE_NAMESPACES | (_CLONE_NEWUSER if own_users else 0) | signal.SIGCHLD
    pid = _libc.syscall(ctypes.c_long(_SYS_CLONE), ctypes.c_long(flags), None, None, None, None)
    return _check(pid, "clone")


def _map_own_user() -> None:
    """Makes the user of a new user namespace the one that it was: nobody else exists there."""
    uid, gid = os.environ["OWNER_UID"], os.environ["OWNER_GID"]
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
        os.write(fd, text.encode())
        os.close(fd)


def _drop_privileges(uid: int | None) -> None:
    """Takes every capability, and the user id given; none can be gained later."""
    for capability in range(_LAST_CAPABILITY + 1):
        with contextlib.suppress(OSError):  # the kernel has fewer
            _prctl(_PR_CAPBSET_DROP, capability)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _check(_libc.syscall(ctypes.c_long(_SYS_CAPSET), header, bytes(24)), "capset")


def _filter_system_calls() -> None:
    """Denies `_DENIED` from here on, to this process and all that it becomes."""
    load = (_LOAD, 0, 0, 4)  # the architecture; the number is at 0, the first argument at 16
    program = [load, (_EQUAL, 1, 0, _AUDIT_ARCH_X86_64), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += [(_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, _KILL)]
    program += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    for number in _DENIED:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    program += [(_EQUAL, 0, 3, _SYS_CLONE), (_LOAD, 0, 0, 16)]
    program += [(_ANY_BIT, 1, 0, _CLONE_THREAD), (_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header))


def _prctl(option: int, *arguments: int) -> None:
    padded = (*arguments, 0, 0, 0, 0)[:4]
    _check(_libc.prctl(ctypes.c_int(option), *(ctypes.c_ulong(value) for value in padded)), "prctl")


def _check(result: int, doing: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{doing}: {os.strerror(ctypes.get_errno())}")
    return result


if __name__ == "__main__":
    sys.exit(main())
