"""The system-call filters of the process engine: no process reaches into another, or into the kernel.

Namespaces already keep siblings apart. The filters close what namespaces do not cover for processes that
share a user id. `filter_program` is loaded by bubblewrap and refuses calls to everything below it.
`guard_program` is loaded by the template: it hands every call that acts on a process by its number to the
fork server, which lets those of sandboxes pass (the numbers are of their own namespace) and refuses those of
keepers, which have no business with any process: see `rollout.sandbox.process.guard`.

Not covered: what a process does to itself, or to its own children and sandbox.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Final

from rollout.errors import BootError

__all__ = ["filter_program", "guard_program"]

_DENIED: Final[dict[str, dict[str, int]]] = {
    "x86_64": {
        "ptrace": 101,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "migrate_pages": 256,
        "move_pages": 279,
        "perf_event_open": 298,
        "open_by_handle_at": 304,
        "setns": 308,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "kcmp": 312,
        "bpf": 321,
        "userfaultfd": 323,
        "io_uring_setup": 425,
        "pidfd_getfd": 438,
        "process_madvise": 440,
    },
    "aarch64": {
        "ptrace": 117,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
        "migrate_pages": 238,
        "move_pages": 239,
        "perf_event_open": 241,
        "open_by_handle_at": 265,
        "setns": 268,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "kcmp": 272,
        "bpf": 280,
        "userfaultfd": 282,
        "io_uring_setup": 425,
        "pidfd_getfd": 438,
        "process_madvise": 440,
    },
}
_GUARDED: Final[dict[str, dict[str, int]]] = {
    "x86_64": {
        "kill": 62,
        "rt_sigqueueinfo": 129,
        "ioprio_set": 251,
        "setpriority": 141,
        "tkill": 200,
        "tgkill": 234,
        "rt_tgsigqueueinfo": 297,
        "pidfd_send_signal": 424,
        "pidfd_open": 434,
        "process_mrelease": 448,
    },
    "aarch64": {
        "ioprio_set": 30,
        "kill": 129,
        "tkill": 130,
        "tgkill": 131,
        "rt_sigqueueinfo": 138,
        "setpriority": 140,
        "rt_tgsigqueueinfo": 240,
        "pidfd_send_signal": 424,
        "pidfd_open": 434,
        "process_mrelease": 448,
    },
}
"""Calls that act on a process by its number, or by a descriptor of it."""
_GUARDED_UNLESS_OWN: Final[dict[str, dict[str, int]]] = {
    "x86_64": {
        "setpgid": 109,
        "sched_setparam": 142,
        "sched_setscheduler": 144,
        "sched_setaffinity": 203,
        "prlimit64": 302,
        "sched_setattr": 314,
    },
    "aarch64": {
        "sched_setparam": 118,
        "sched_setscheduler": 119,
        "sched_setaffinity": 122,
        "setpgid": 154,
        "prlimit64": 261,
        "sched_setattr": 274,
    },
}
"""Calls whose first argument is a process; 0 is the caller itself."""
_GUARDED_COMMANDS: Final[dict[str, dict[int, tuple[int, int]]]] = {
    "x86_64": {72: (8, 15), 16: (0x8901, 0x8902)},
    "aarch64": {25: (8, 15), 29: (0x8901, 0x8902)},
}
"""fcntl with F_SETOWN(_EX), ioctl with FIOSETOWN and SIOCSPGRP: who gets a descriptor's signals."""
_AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000

# classic BPF: (operation, jump if true, jump if false, operand)
_Instruction = tuple[int, int, int, int]
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_OFFSET_OF_NUMBER, _OFFSET_OF_ARCH, _OFFSET_OF_ARGUMENTS = 0, 4, 16
_ALLOW, _REFUSE, _KILL, _ASK = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000, 0x7FC00000


def filter_program(machine: str | None = None) -> bytes:
    """The compiled filter of what nobody may call.

    Args:
        machine: Name of the architecture; this machine's if None.

    Raises:
        BootError: The numbers of its system calls are not known here.
    """
    machine = _known(machine)
    program = [
        (_LOAD, 0, 0, _OFFSET_OF_ARCH),
        (_JUMP_IF_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),  # the 32-bit calls have other numbers
        (_LOAD, 0, 0, _OFFSET_OF_NUMBER),
    ]
    if machine == "x86_64":
        program += [(_JUMP_IF_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, _REFUSE)]
    for number in sorted(_DENIED[machine].values()):
        program += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    return _compiled([*program, (_RETURN, 0, 0, _ALLOW)])


def guard_program(machine: str | None = None) -> bytes:
    """The compiled filter of what the fork server is asked about; it goes on top of the other.

    Args:
        machine: As for `filter_program`.

    Raises:
        BootError: As `filter_program`.
    """
    machine = _known(machine)
    program: list[_Instruction] = [(_LOAD, 0, 0, _OFFSET_OF_NUMBER)]
    for number in sorted(_GUARDED[machine].values()):
        program += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ASK)]
    for number in sorted(_GUARDED_UNLESS_OWN[machine].values()):
        program += [
            (_JUMP_IF_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, _OFFSET_OF_ARGUMENTS),
            (_JUMP_IF_EQUAL, 0, 1, 0),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _ASK),
        ]
    for number, (first, second) in sorted(_GUARDED_COMMANDS[machine].items()):
        program += [
            (_JUMP_IF_EQUAL, 0, 5, number),
            (_LOAD, 0, 0, _OFFSET_OF_ARGUMENTS + 8),
            (_JUMP_IF_EQUAL, 1, 0, first),
            (_JUMP_IF_EQUAL, 0, 1, second),
            (_RETURN, 0, 0, _ASK),
            (_RETURN, 0, 0, _ALLOW),
        ]
    return _compiled([*program, (_RETURN, 0, 0, _ALLOW)])


def _known(machine: str | None) -> str:
    machine = machine or os.uname().machine
    if machine not in _DENIED:
        known = ", ".join(_DENIED)
        raise BootError(f"the process engine's system-call filter knows {known}, not {machine}")
    return machine


def _compiled(program: list[_Instruction]) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
