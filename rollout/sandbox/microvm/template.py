"""Processes that have a program loaded and wait to become copies of it. Standard library only.

Half of the time in which QEMU starts goes into its dynamic linking: 236,000 relocations, which also make
almost five megabytes of memory private in each process. So a program is loaded once, and held before its own
first instruction; each VMM is a fork of that *template*, which shares what was relocated, and confines
itself before it goes on. Nothing of the program is patched: what holds it is a shared object, `stub_object`,
that the dynamic linker is asked to load first (`LD_PRELOAD`), and whose initialiser runs before the
program's own code. Those of its libraries have run by then: the launcher uses no template in which one has
started a thread.

The stub also stands in for `gnutls_rnd`, from which QEMU has what it tells guests that ask their CPU for
random numbers (RDRAND), and has the kernel answer. The library's own generator keeps a state in memory, which
forks would all go on from alike: it learns of no fork but the C library's.

The stub serves packets on `CONTROL_FD`. It first sends the address of its buffer, as eight bytes. Each
packet that it gets is of `packed`, with descriptors, which get the lowest free numbers, from `CONTROL_FD +
1` on. It forks (`clone`, with the packet's flags). If there is no fork it answers with the negative error
number. If there is, the fork answers with a zero, to which the kernel adds who sends it, and carries out its
system calls of the packet, while the template carries out its own. Then the template waits for the next
packet, and the fork returns from the initialiser, or becomes a template itself. If a call fails that may
not, the process says so on its standard error and ends; it ends, too, when its socket is closed.

There is a second way into the stub, for processes that have run (`rollout.sandbox.microvm.stopping`): at its
label `stop` it handles a signal. A thread notes its stack, its thread-local storage and the place of its id,
and waits for ever; the first thread serves packets, on the socket that its own packet named, until a fork
returns from the handler.

What forks share beyond memory that nobody can change: where everything is in their address space, and the
secret of their stack protectors. Who has taken one of them over knows these of the others.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

from rollout.sandbox.microvm.confinement import Filter, SystemCall, filter_header

__all__ = [
    "CLONE_PARENT",
    "CONTROL_FD",
    "FORK_FLAGS",
    "MAX_SCRIPT_BYTES",
    "STUB_FD",
    "forked",
    "number_from",
    "packed",
    "stop_handler",
    "stub_object",
    "threads_address",
]

CONTROL_FD = 3
STUB_FD = 4
"""Where a template finds its stub when it is executed; closed once it waits."""
MAX_SCRIPT_BYTES = 1 << 16

CLONE_PARENT = 0x00008000
_CLONE_CHILD_CLEARTID, _CLONE_CHILD_SETTID = 0x00200000, 0x01000000
FORK_FLAGS = CLONE_PARENT | _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
"""Flags of `clone` beside its namespaces: the fork is a child of who started the template, and the C library
learns its new thread id, as in its own `fork`."""
_HEADER = struct.Struct("6Q")
"""Flags, the fork's socket, whether it stays, number of its calls; number of the template's, and where."""
_CALL = struct.Struct("8Q")  # number, six arguments, outcome
_CREDENTIALS = struct.Struct("iII")
_CLOSE_RANGE = 436
_CLOSE_OTHERS = SystemCall("close_range", _CLOSE_RANGE, (CONTROL_FD + 1, 0xFFFFFFFF, 0))


def packed(
    calls: Sequence[SystemCall],
    flags: int,
    address: int,
    *,
    control_fd: int = CONTROL_FD,
    stays: bool = False,
    afterwards: Sequence[SystemCall] = (_CLOSE_OTHERS,),
) -> bytes:
    """A packet for a template.

    Args:
        calls: What the fork does.
        flags: Of `clone`.
        address: Of the template's buffer, where pointers will point.
        control_fd: The fork's socket, if it becomes a template.
        stays: It becomes one when it has done its calls, instead of going on to the program.
        afterwards: What the template does when it has forked, or failed to: lets go of the packet's
            descriptors, or the next packet's would get other numbers.

    Raises:
        ValueError: It does not fit into the buffer.
    """
    data_at = address + _HEADER.size + (len(calls) + len(afterwards)) * _CALL.size
    table, data = bytearray(), bytearray()

    def point_to(content: bytes) -> int:
        data.extend(bytes(-len(data) % 8))
        place = data_at + len(data)
        data.extend(content)
        return place

    for call in (*calls, *afterwards):
        numbers: list[int] = []
        for argument in call.arguments:
            if isinstance(argument, Filter):
                numbers.append(point_to(filter_header(argument, point_to(argument))))
            else:
                numbers.append(point_to(argument) if isinstance(argument, bytes) else argument)
        numbers += [0] * (6 - len(numbers))
        table += _CALL.pack(call.number, *numbers, call.outcome)
    afterwards_at = address + _HEADER.size + len(calls) * _CALL.size
    header = _HEADER.pack(flags, control_fd, stays, len(calls), len(afterwards), afterwards_at)
    packet = header + bytes(table + data)
    if len(packet) > MAX_SCRIPT_BYTES:
        raise ValueError(f"a script of {len(packet)} bytes is longer than {MAX_SCRIPT_BYTES}")
    return packet


def forked(control: socket.socket, packet: bytes, fds: Sequence[int]) -> int:
    """Has a template fork.

    Args:
        control: Our end of its socket, with `SO_PASSCRED`: the fork says that it is there, the kernel who.
        packet: What `packed` makes.
        fds: Descriptors for the fork.

    Returns:
        The new process's id as this process sees it, or the negative error number.

    Raises:
        OSError: The template is gone, or late.
    """
    socket.send_fds(control, [packet], fds)
    size_bytes = socket.CMSG_SPACE(_CREDENTIALS.size)
    answer, ancillary, _, _ = control.recvmsg(8, size_bytes)
    if len(answer) != 8 or not ancillary:
        raise OSError("a template has ended")
    return struct.unpack("<q", answer)[0] or _CREDENTIALS.unpack(ancillary[0][2])[0]


def number_from(control: socket.socket) -> int:
    """The next eight bytes from a template.

    Raises:
        OSError: They do not come.
    """
    answer = control.recv(8)
    if len(answer) != 8:
        raise OSError("a template has ended")
    return struct.unpack("<q", answer)[0]


_SYMBOLS_AT, _CODE_AT = 0x160, 0x200
_DYNAMIC_AT, _DATA_AT, _THREADS_AT, _BUFFER_AT = 0x1000, 0x1200, 0x1300, 0x1A00
_WORDS = b"cannot confine a VMM: a call was refused\n"
# Offsets in the data: the answer; the thread id's address; a msghdr (iov, its number, control, its length);
# an iovec; the socket's number; room for descriptors. The threads are two counters, and their slots.
_CODE: tuple[tuple[str, str, str], ...] = (
    # label or machine code; what a relative displacement that follows refers to; what it is
    ("53 55 41 54 41 55", "", "push rbx, rbp, r12, r13"),
    ("48 8d 2d", "data", "lea rbp, [data]"),
    ("48 8d 1d", "buffer", "lea rbx, [buffer]"),
    ("48 89 5d 00", "", "mov [rbp], rbx: the first answer is the buffer's address"),
    ("48 8d 45 60", "", "lea rax, [rbp+0x60]"),
    ("48 89 45 20", "", "mov [rbp+0x20], rax: msg_iov"),
    ("48 89 5d 60", "", "mov [rbp+0x60], rbx: iov_base"),
    ("48 c7 45 68 00 00 01 00", "", "mov qword [rbp+0x68], 0x10000: iov_len"),
    ("48 c7 45 28 01 00 00 00", "", "mov qword [rbp+0x28], 1: msg_iovlen"),
    ("48 8d 85 80 00 00 00", "", "lea rax, [rbp+0x80]"),
    ("48 89 45 30", "", "mov [rbp+0x30], rax: msg_control"),
    ("48 c7 45 70 03 00 00 00", "", "mov qword [rbp+0x70], CONTROL_FD"),
    ("b8 9d 00 00 00 bf 28 00 00 00", "", "mov eax, 157 (prctl); mov edi, 40 (PR_GET_TID_ADDRESS)"),
    ("48 8d 75 08 31 d2 45 31 d2 45 31 c0", "", "lea rsi, [rbp+8]; xor edx, edx; r10d; r8d"),
    ("0f 05 48 85 c0", "", "syscall; test rax, rax"),
    ("0f 88", "leave", "js leave"),
    ("b8 b4 01 00 00 bf 04 00 00 00", "", "mov eax, 436 (close_range); mov edi, CONTROL_FD + 1"),
    ("be ff ff ff ff 31 d2 0f 05", "", "mov esi, -1; xor edx, edx; syscall"),
    ("answer:", "", ""),
    ("b8 01 00 00 00 48 8b 7d 70", "", "mov eax, 1 (write); mov rdi, [rbp+0x70]"),
    ("48 89 ee ba 08 00 00 00 0f 05", "", "mov rsi, rbp; mov edx, 8; syscall"),
    ("serve:", "", ""),
    ("48 c7 45 38 80 00 00 00", "", "mov qword [rbp+0x38], 0x80: msg_controllen"),
    ("b8 2f 00 00 00 48 8b 7d 70", "", "mov eax, 47 (recvmsg); mov rdi, [rbp+0x70]"),
    ("48 8d 75 10 31 d2 0f 05 48 85 c0", "", "lea rsi, [rbp+0x10]; xor edx, edx; syscall; test rax, rax"),
    ("0f 8e", "leave", "jle leave: nobody is there any more"),
    ("b8 38 00 00 00 48 8b 3b 31 f6 31 d2", "", "mov eax, 56 (clone); mov rdi, [rbx]; xor esi, esi; edx"),
    ("4c 8b 55 08 45 31 c0 0f 05", "", "mov r10, [rbp+8]; xor r8d, r8d; syscall"),
    ("48 89 45 00 48 85 c0", "", "mov [rbp], rax; test rax, rax"),
    ("0f 84", "born", "jz born"),
    ("0f 89", "parent", "jns parent"),
    ("b8 01 00 00 00 48 8b 7d 70", "", "there is no fork: mov eax, 1 (write); mov rdi, [rbp+0x70]"),
    ("48 89 ee ba 08 00 00 00 0f 05", "", "mov rsi, rbp; mov edx, 8; syscall"),
    ("parent:", "", ""),
    ("4c 8b 63 20 4c 8b 6b 28", "", "mov r12, [rbx+32]; r13, [rbx+40]: calls of the template"),
    ("e9", "next", "jmp next"),
    ("born:", "", ""),
    ("b8 01 00 00 00 48 8b 7d 70", "", "mov eax, 1 (write); mov rdi, [rbp+0x70]"),
    ("48 89 ee ba 08 00 00 00 0f 05", "", "mov rsi, rbp; mov edx, 8; syscall: the kernel adds who says it"),
    ("48 8b 43 08 48 89 45 70", "", "mov rax, [rbx+8]; mov [rbp+0x70], rax: where it would serve"),
    ("4c 8d 05", "threads", "lea r8, [threads]"),
    ("31 c0 49 89 00 49 89 40 08", "", "xor eax, eax; mov [r8], rax; [r8+8], rax: none is stopped"),
    ("4c 8b 63 18 4c 8d 6b 30", "", "mov r12, [rbx+24]; lea r13, [rbx+48]: calls of the fork"),
    ("next:", "", ""),
    ("4d 85 e4", "", "test r12, r12"),
    ("0f 84", "done", "jz done"),
    ("49 8b 45 00 49 8b 7d 08 49 8b 75 10", "", "mov rax, [r13]; rdi, [r13+8]; rsi, [r13+16]"),
    ("49 8b 55 18 4d 8b 55 20", "", "mov rdx, [r13+24]; r10, [r13+32]"),
    ("4d 8b 45 28 4d 8b 4d 30", "", "mov r8, [r13+40]; r9, [r13+48]"),
    ("0f 05 48 85 c0", "", "syscall; test rax, rax"),
    ("0f 8f", "passed", "jg passed"),
    ("0f 88", "failed", "js failed"),
    ("49 83 7d 38 02", "", "cmp qword [r13+56], 2: was it to make a thread?"),
    ("0f 84", "return", "je return: this is the thread, on its own stack"),
    ("passed:", "", ""),
    ("49 83 c5 40 49 ff cc", "", "add r13, 64; dec r12"),
    ("e9", "next", "jmp next"),
    ("failed:", "", ""),
    ("49 83 7d 38 01", "", "cmp qword [r13+56], 1: may it fail?"),
    ("0f 84", "passed", "je passed"),
    ("b8 01 00 00 00 bf 02 00 00 00", "", "mov eax, 1 (write); mov edi, 2"),
    ("48 8d 35", "words", "lea rsi, [words]"),
    (f"ba {len(_WORDS):02x} 00 00 00 0f 05", "", "mov edx, their length; syscall"),
    ("leave:", "", ""),
    ("b8 e7 00 00 00 bf 7f 00 00 00 0f 05", "", "mov eax, 231 (exit_group); mov edi, 127; syscall"),
    ("done:", "", ""),
    ("48 83 7d 00 00", "", "cmp qword [rbp], 0"),
    ("0f 85", "serve", "jne serve: this is the template"),
    ("48 83 7b 10 00", "", "cmp qword [rbx+16], 0: is the fork to be a template?"),
    ("0f 85", "answer", "jne answer"),
    ("41 5d 41 5c 5d 5b", "", "pop r13, r12, rbp, rbx"),
    ("return:", "", ""),
    ("c3", "", "ret: on to the program, or to where the signal came"),
    ("stop:", "", ""),
    ("b8 27 00 00 00 0f 05 41 89 c0", "", "mov eax, 39 (getpid); syscall; mov r8d, eax"),
    ("b8 ba 00 00 00 0f 05 44 39 c0", "", "mov eax, 186 (gettid); syscall; cmp eax, r8d"),
    ("0f 84", "first", "je first"),
    ("4c 8d 05", "threads", "lea r8, [threads]"),
    ("b8 01 00 00 00 f0 41 0f c1 00", "", "mov eax, 1; lock xadd [r8], eax"),
    ("83 f8 40", "", "cmp eax, 64"),
    ("0f 83", "wait", "jae wait: there is no slot"),
    ("6b c0 18 4d 8d 4c 00 10", "", "imul eax, eax, 24; lea r9, [r8+rax+16]"),
    ("49 89 21", "", "mov [r9], rsp"),
    ("64 48 8b 04 25 10 00 00 00 49 89 41 08", "", "mov rax, fs:[16]; mov [r9+8], rax"),
    ("b8 9d 00 00 00 bf 28 00 00 00", "", "mov eax, 157 (prctl); mov edi, 40 (PR_GET_TID_ADDRESS)"),
    ("49 8d 71 10 31 d2 45 31 d2 0f 05", "", "lea rsi, [r9+16]; xor edx, edx; r10d; syscall"),
    ("4c 8d 05", "threads", "lea r8, [threads]"),
    ("f0 49 ff 40 08", "", "lock inc qword [r8+8]"),
    ("wait:", "", ""),
    ("b8 22 00 00 00 0f 05", "", "mov eax, 34 (pause); syscall"),
    ("e9", "wait", "jmp wait"),
    ("first:", "", ""),
    ("53 55 41 54 41 55", "", "push rbx, rbp, r12, r13"),
    ("48 8d 2d", "data", "lea rbp, [data]"),
    ("48 8d 1d", "buffer", "lea rbx, [buffer]"),
    ("e9", "answer", "jmp answer"),
    ("restore:", "", ""),
    ("b8 0f 00 00 00 0f 05", "", "mov eax, 15 (rt_sigreturn); syscall"),
    ("random:", "", ""),
    ("49 89 f0 49 89 d1", "", "mov r8, rsi: where; mov r9, rdx: how many bytes"),
    ("more:", "", ""),
    ("4d 85 c9", "", "test r9, r9"),
    ("0f 84", "enough", "jz enough"),
    ("b8 3e 01 00 00 4c 89 c7 4c 89 ce", "", "mov eax, 318 (getrandom); mov rdi, r8; mov rsi, r9"),
    ("31 d2 0f 05", "", "xor edx, edx; syscall"),
    ("48 83 f8 fc", "", "cmp rax, -4 (EINTR)"),
    ("0f 84", "more", "je more"),
    ("48 85 c0", "", "test rax, rax"),
    ("0f 88", "none", "js none"),
    ("49 01 c0 49 29 c1", "", "add r8, rax; sub r9, rax"),
    ("e9", "more", "jmp more"),
    ("enough:", "", ""),
    ("31 c0 c3", "", "xor eax, eax; ret"),
    ("none:", "", ""),
    ("b8 32 ff ff ff c3", "", "mov eax, -206 (GNUTLS_E_RANDOM_FAILED); ret"),
)


def _places() -> dict[str, int]:
    """Where in the object the labels are."""
    places, size = {"data": _DATA_AT, "threads": _THREADS_AT, "buffer": _BUFFER_AT}, 0
    for code, target, _ in _CODE:
        if code.endswith(":"):
            places[code[:-1]] = _CODE_AT + size
        else:
            size += len(bytes.fromhex(code)) + (4 if target else 0)
    places["words"] = _CODE_AT + size
    return places


def stop_handler(address: int) -> tuple[int, int]:
    """Addresses of what handles the stop signal, and of how it returns, given that of the buffer."""
    places = _places()
    return address - _BUFFER_AT + places["stop"], address - _BUFFER_AT + places["restore"]


def threads_address(address: int) -> int:
    """Where stopped threads are noted: slots begun, and written; then slots: stack, storage, id's place."""
    return address - _BUFFER_AT + _THREADS_AT


def _assembled() -> bytes:
    """The stub's code and the words after it; each reference is four bytes relative to their end."""
    places = _places()
    out = bytearray()
    for code, target, _ in _CODE:
        if code.endswith(":"):
            continue
        out += bytes.fromhex(code)
        if target:
            out += struct.pack("<i", places[target] - (_CODE_AT + len(out) + 4))
    return bytes(out) + _WORDS


def stub_object() -> bytes:
    """The shared object: an ELF file with one page of code, and one of data that goes on as the buffer.

    Source of the fields: the System V ABI, "Object Files" and "Program Loading and Dynamic Linking".
    """
    load, dynamic, stack = 1, 2, 0x6474E551
    reads, writes, executes = 4, 2, 1
    end_of_data = _BUFFER_AT + MAX_SCRIPT_BYTES
    names, global_function = b"\0gnutls_rnd\0", 0x12
    symbols = bytes(24) + struct.pack("<IBBHQQ", 1, global_function, 0, 1, _places()["random"], 0)
    chains = struct.pack("<5I", 1, 2, 1, 0, 0)  # one bucket, two symbols, of which the second is in it
    tags = {
        4: _SYMBOLS_AT + len(symbols),
        5: _SYMBOLS_AT + len(symbols + chains),
        6: _SYMBOLS_AT,
        10: len(names),
        11: 24,
        12: _CODE_AT,
        0: 0,
    }  # HASH, STRTAB, SYMTAB, STRSZ, SYMENT, INIT, NULL
    tables = b"".join(struct.pack("<QQ", *entry) for entry in tags.items())
    segments = [
        (load, reads | executes, 0, 0x1000, 0x1000, 0x1000),
        (load, reads | writes, 0x1000, _BUFFER_AT - 0x1000, end_of_data - 0x1000, 0x1000),
        (dynamic, reads | writes, _DYNAMIC_AT, len(tables), len(tables), 8),
        (stack, reads | writes, 0, 0, 0, 16),  # without it the linker makes stacks executable
    ]
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little-endian
    shared_object, x86_64, version = 3, 62, 1
    sizes = (64, 56, len(segments), 64, 0, 0)  # of this header, of a segment's, how many; no sections
    header = identity + struct.pack("<HHIQQQIHHHHHH", shared_object, x86_64, version, 0, 64, 0, 0, *sizes)
    for kind, flags, place, file_bytes, memory_bytes, align in segments:
        header += struct.pack("<IIQQQQQQ", kind, flags, place, place, place, file_bytes, memory_bytes, align)
    header = header.ljust(_SYMBOLS_AT, b"\0") + symbols + chains + names
    code = header.ljust(_CODE_AT, b"\0") + _assembled()
    return (code.ljust(_DYNAMIC_AT, b"\0") + tables).ljust(_BUFFER_AT, b"\0")
