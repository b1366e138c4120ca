"""The system calls that Python 3.11 has no name for. Linux only, for single-threaded callers.

Each function makes one call and raises `OSError` with the kernel's errno. Nothing is loaded or called on
import. Flags and call numbers are those of the kernel's UAPI headers; the mount calls (428 to 432) have the
same number on every architecture.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

__all__ = [
    "clone_onto_stack",
    "drop_capabilities",
    "fork_sibling",
    "listen_to_calls",
    "make_entry",
    "mount",
    "move_mount",
    "new_mount",
    "open_tree",
    "prctl",
    "set_host_name",
    "unmount",
    "unshare",
]

CLONE_VM: Final = 0x00000100
CLONE_FILES: Final = 0x00000400
CLONE_SIGHAND: Final = 0x00000800
CLONE_VFORK: Final = 0x00004000
CLONE_PARENT: Final = 0x00008000
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

PR_SET_PDEATHSIG: Final = 1

MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8

_MNT_DETACH = 2
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 428, 429, 430, 431, 432
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_CLOEXEC = 1  # both FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC
_MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV, _MOUNT_ATTR_NOEXEC = 2, 4, 8
_AT_FDCWD = -100
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 8
_CAPABILITY_VERSION_3 = 0x20080522

_ENTRY_TYPE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


@cache
def _number_of_clone() -> int:
    return {"x86_64": 56, "aarch64": 220}[os.uname().machine]


@cache
def _libc() -> ctypes.PyDLL:
    # PyDLL keeps the interpreter lock during a call: `clone_onto_stack` depends on it, the others are short.
    return ctypes.PyDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(what: str, number: int, *args: int | bytes | None) -> int:
    words = [ctypes.c_long(arg) if isinstance(arg, int) else ctypes.c_char_p(arg) for arg in args]
    return _check(_libc().syscall(ctypes.c_long(number), *words), what)


def unshare(flags: int) -> None:
    """Puts this process into new namespaces (for CLONE_NEWPID: its next children)."""
    _check(_libc().unshare(ctypes.c_int(flags)), "unshare")


def prctl(option: int, value: int) -> None:
    """One of the process controls that take one number."""
    zero = ctypes.c_ulong(0)
    _check(_libc().prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero), f"prctl {option}")


def set_host_name(name: str) -> None:
    """Sets the host name of this process's uts namespace."""
    encoded = name.encode()
    _check(_libc().sethostname(encoded, ctypes.c_size_t(len(encoded))), "sethostname")


def drop_capabilities() -> None:
    """Gives up every capability of this process: permitted, effective and inheritable."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc().capset(header, bytes(24)), "capset")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Attaches a new mount of a file system."""
    arguments = source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    _check(_libc().mount(*arguments), f"mount {kind} on {target}")


def unmount(target: str) -> None:
    """Detaches a mount; it ends when nothing uses it any more."""
    _check(_libc().umount2(target.encode(), ctypes.c_int(_MNT_DETACH)), f"unmount {target}")


def new_mount(kind: str, options: Mapping[str, str | None], *, executable: bool = True) -> int:
    """Makes a mount of a new file system that is attached nowhere; returns its descriptor.

    Args:
        kind: File system type.
        options: Its options; None is a flag without a value. The kernel takes values of up to 255 bytes.
        executable: Whether programs on it can be run.
    """
    attributes = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV | (0 if executable else _MOUNT_ATTR_NOEXEC)
    context = _syscall(f"fsopen {kind}", _SYS_FSOPEN, kind.encode(), _CLOEXEC)
    try:
        for key, value in options.items():
            command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
            encoded = None if value is None else value.encode()
            _syscall(f"{kind} option {key}", _SYS_FSCONFIG, context, command, key.encode(), encoded, 0)
        _syscall(f"create {kind}", _SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _syscall(f"fsmount {kind}", _SYS_FSMOUNT, context, _CLOEXEC, attributes)
    finally:
        os.close(context)


def open_tree(path: str) -> int:
    """Makes a mount of a folder that is attached nowhere (a detached bind); returns its descriptor."""
    return _syscall("open_tree", _SYS_OPEN_TREE, _AT_FDCWD, path.encode(), _OPEN_TREE_CLONE | os.O_CLOEXEC)


def move_mount(mount_fd: int, target: str) -> None:
    """Attaches a detached mount to a folder of this process's mount namespace."""
    what = f"move_mount to {target}"
    _syscall(what, _SYS_MOVE_MOUNT, mount_fd, b"", _AT_FDCWD, target.encode(), _MOVE_MOUNT_F_EMPTY_PATH)


def listen_to_calls(program: bytes) -> int:
    """Loads a system-call filter into this process and what it forks.

    Returns:
        The descriptor over which calls that the filter asks about are heard and answered.
    """
    instructions = ctypes.create_string_buffer(program, len(program))
    pointer = ctypes.cast(instructions, ctypes.c_void_p).value
    assert pointer is not None
    filter_ = struct.pack("HxxxxxxP", len(program) // 8, pointer)
    number = {"x86_64": 317, "aarch64": 277}[os.uname().machine]
    return _syscall("seccomp", number, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_NEW_LISTENER, filter_)


def fork_sibling() -> int:
    """Forks a copy of this process whose parent is this process's parent; 0 in the copy.

    None of the handlers that Python or the C library run around a fork is run: they exist for programs with
    threads, and Python's would reseed the `random` module in the copy.
    """
    return _syscall("clone", _number_of_clone(), CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)


def make_entry(function: Callable[[], int]) -> Any:
    """Makes a function callable by `clone_onto_stack`; the caller keeps the result alive."""

    def entry(argument: object) -> int:
        return function()

    return _ENTRY_TYPE(entry)


def clone_onto_stack(entry: Any, stack_top: int, flags: int) -> int:
    """Runs `entry` in a child, on a stack of its own.

    With CLONE_VM | CLONE_VFORK the child shares this process's memory, and the kernel suspends this process
    until the child has ended: exactly one of the two runs Python at any time. The interpreter lock belongs
    to the memory, not to a process, and stays held throughout. What the child did to memory is there when
    this returns.

    Returns:
        The child's process id; the child has ended and is to be waited for.
    """
    clone = _libc().clone
    clone.argtypes = [_ENTRY_TYPE, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    return _check(clone(entry, stack_top, flags, None), "clone")
