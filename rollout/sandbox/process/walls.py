"""The walls of a sandbox, set up from inside by the process that will live behind them.

`cage` is for the template: a mount namespace that shows neither the fork server's files nor its processes,
locked by a user namespace of its own. `enter` is for a sandbox: it runs at the start of a process that was
just cloned into new user, pid, mount, network, ipc and uts namespaces, gives it its private folder, its own
view of processes and its limits, and then gives up every capability.

Not covered: limits of memory and of open files hold for each process, not for a sandbox as a whole.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import struct
from dataclasses import dataclass

from rollout.sandbox.process import syscalls

__all__ = ["NAMESPACES", "WORK", "Limits", "cage", "enter", "map_user"]

WORK = "/home/sandbox"
"""Where a sandbox finds its private folder, which is also its home and first working directory."""

NAMESPACES = (
    syscalls.CLONE_NEWUSER
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
)

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What one sandbox may use.

    Attributes:
        memory_bytes: Address space of one process, beyond what the template has.
        num_processes: Processes and threads.
        file_bytes: Size of one file.
        folder_bytes: What it writes into its folder, until it is saved.
        open_files: Descriptors of one process.
    """

    memory_bytes: int
    num_processes: int = 256
    file_bytes: int = 1 << 30
    folder_bytes: int = 1 << 30
    open_files: int = 1024

    def apply_to_template(self) -> None:
        """Sets the limits that every process inherits from the template."""
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            own_bytes = int(file.read().split()[0]) * resource.getpagesize()
        for what, limit in (
            (resource.RLIMIT_AS, own_bytes + self.memory_bytes),
            (resource.RLIMIT_FSIZE, self.file_bytes),
            (resource.RLIMIT_NOFILE, self.open_files),
            (resource.RLIMIT_CORE, 0),
        ):
            hard = resource.getrlimit(what)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(what, (limit, limit))


def map_user(process: int | str, user: int, group: int) -> None:
    """Gives a new user namespace its one user and group, under the numbers that they have outside."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        fd = os.open(f"/proc/{process}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def cage(hidden: str) -> None:
    """Leaves the fork server's view of files and processes; the caller maps the user afterwards.

    Args:
        hidden: A mount of the fork server that is not to be seen.

    Raises:
        OSError: The kernel refused.
    """
    empty_proc = _proc_of_nobody()
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.unmount(hidden)
    syscalls.unmount("/proc")
    # A sandbox may mount a proc of its own only where one can be seen already: this one shows no process.
    syscalls.move_mount(empty_proc, "/proc")
    os.close(empty_proc)
    # In a mount namespace of another user namespace the mounts above are locked, and cannot be lifted.
    syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)


def _proc_of_nobody() -> int:
    """A proc file system, not yet attached, of a pid namespace whose only process has ended."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        outer = os.fork()
        if outer == 0:
            syscalls.unshare(syscalls.CLONE_NEWPID)
            inner = os.fork()
            if inner == 0:
                mount_fd = syscalls.new_mount("proc", {}, executable=False)
                socket.send_fds(theirs, [b"proc"], [mount_fd])
            else:
                os.waitpid(inner, 0)
            os._exit(0)
        os.waitpid(outer, 0)
        ours.setblocking(False)
        _, fds, _, _ = socket.recv_fds(ours, 16, 1)
    return fds[0]


def enter(mount_fd: int, name: str, user: int, group: int, num_processes: int) -> None:
    """Finishes the walls of this process, the first of its namespaces, and gives up every capability.

    Args:
        mount_fd: The private folder's mount; closed here.
        name: The host name.
        user: Its user, as the number outside; nobody knows it inside before it is mapped.
        group: As `user`.
        num_processes: Most processes and threads of the sandbox.

    Raises:
        OSError: The kernel refused.
    """
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    # A signal to "my process group" must not reach another sandbox's. A session of its own would do too, but
    # is far slower to make: the kernel gives each a scheduling group.
    os.setpgid(0, 0)
    quiet = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    syscalls.mount("proc", "/proc", "proc", quiet)
    map_user("self", user, group)
    _write("/proc/sys/user/max_user_namespaces", "0")
    syscalls.move_mount(mount_fd, WORK)
    os.close(mount_fd)
    syscalls.set_host_name(name)
    _bring_up_loopback()
    resource.setrlimit(resource.RLIMIT_NPROC, (num_processes, num_processes))
    syscalls.drop_capabilities()


def _bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        fcntl.ioctl(link.fileno(), _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
