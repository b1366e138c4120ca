"""The launcher: a small process that starts VMMs, and whose end is theirs. Standard library only.

It runs as PID 1 of its own PID namespace, inside bubblewrap: without network, with a read-only view. So VMMs
are never forked from a process with much memory, and when the launcher ends, for whatever reason, the kernel
ends every VMM with it. It ends when its owner closes the control socket, which the kernel does too when the
owner is killed.

What a VMM is confined by is in `rollout.sandbox.microvm.confinement`; all of it holds before the VMM's
program begins. A VMM is a child that executes its program, or, for requests that say so, a fork of a template
that has it loaded already: one for each argument vector, started with the first request. Where templates do
not work (the kernel does not tell where a thread's id is kept, the linker does not take the stub) the
launcher says so once on its standard error, and executes. A third kind of request starts the first process of
a family of VMMs (`rollout.sandbox.microvm.family`), whose owner speaks with it from then on.

Each request is one packet on a SOCK_SEQPACKET socket: JSON with an argument vector and limits, and
descriptors, which the VMM finds at `FIRST_FD` and after. The answer carries a pidfd of the new process, so
that no process id is ever used after its process is gone, says whether it came from a template, and repeats
the number of its request: who gave up waiting can tell a late answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from rollout.sandbox.microvm.confinement import (
    FIRST_FD,
    VIEW_FOLDER,
    Filter,
    SystemCall,
    confinement,
    filter_header,
    namespaces,
)
from rollout.sandbox.microvm.family import first_process
from rollout.sandbox.microvm.template import (
    CONTROL_FD,
    FORK_FLAGS,
    STUB_FD,
    forked,
    number_from,
    packed,
    stub_object,
)

__all__ = ["MAX_PACKET_BYTES", "main"]

MAX_PACKET_BYTES = 1 << 16
_MAX_FDS = 8
_MAX_TEMPLATES = 8
_ANSWER_WITHIN_S = 10.0
_EXEC_FAILED = 127
_SYS_CLONE = 56
_PR_SET_NO_NEW_PRIVS = 38
_ENVIRONMENT = {
    **{"PATH": "/usr/bin:/bin", "LANG": "C", "MALLOC_ARENA_MAX": "1"},
    **{"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "16384"},
}
"""One arena, and freed memory goes back: with no huge pages, this saves an idle VMM a fifth of its memory."""
_TEMPLATE_ENVIRONMENT = {**_ENVIRONMENT, "LD_BIND_NOW": "1", "LD_PRELOAD": f"/proc/self/fd/{STUB_FD}"}
"""All that the linker could do later is done in the template, and shared."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Template(NamedTuple):
    """A process that waits to be forked.

    Attributes:
        control: Its socket; closing it ends the template.
        address: Where packets lie in its memory.
    """

    control: socket.socket
    address: int


def main() -> None:
    """Serves spawn requests on descriptor 0 until it is closed."""
    control = socket.socket(fileno=os.dup(0))
    os.set_inheritable(control.fileno(), False)
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    os.set_blocking(wake_read, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the owner to handle
    gc.collect()
    gc.freeze()  # forked children then copy fewer pages
    launcher = _Launcher(control)
    while True:
        ready, _, _ = select.select([control, wake_read], [], [])
        if wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake_read, 4096)
            _reap()
        if control in ready and not launcher.serve_one():
            return


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


class _Launcher:
    """Serves one owner. Processes are reaped between requests only, so an id stays valid within one."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._owner = (os.environ["OWNER_UID"], os.environ["OWNER_GID"])
        self._templates: dict[tuple[str, ...], Template] = {}
        self._has_templates = True

    def serve_one(self) -> bool:
        """Answers one request; False when the owner is gone."""
        packet, fds, _, _ = socket.recv_fds(self._control, MAX_PACKET_BYTES, _MAX_FDS)
        if not packet:
            return False
        request = json.loads(packet)
        number = {"number": request["number"]}
        try:
            if request["kind"] == "family":
                pid, address = self._start_family(request, fds)
                answer = {**number, "address": address}
            else:
                found = self._fork_template(request, fds) if request["kind"] == "fork" else None
                answer = {**number, "from_template": found is not None}
                pid = self._execute(request, fds) if found is None else found
            pidfd = os.pidfd_open(pid)
            try:
                socket.send_fds(self._control, [json.dumps(answer).encode()], [pidfd])
            finally:
                os.close(pidfd)
        except OSError as error:
            self._control.send(json.dumps({**number, "error": str(error)}).encode())
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _execute(self, request: dict[str, Any], fds: Sequence[int]) -> int:
        """Starts a program in a child that confines itself first."""
        # A raw system call: this process has no other thread to care for.
        flags = namespaces(own_users=request["uid"] is None)
        pid = _libc.syscall(ctypes.c_long(_SYS_CLONE), ctypes.c_long(flags), None, None, None, None)
        if _check(pid, "clone") == 0:
            calls = confinement(fds, request["limits"], request["uid"], self._owner)
            _become(request["argv"], calls)
        return pid

    def _fork_template(self, request: dict[str, Any], fds: Sequence[int]) -> int | None:
        """Forks the template of a program; None where templates do not work.

        Raises:
            OSError: The kernel makes no process.
        """
        argv = tuple(request["argv"])
        if not os.access(VIEW_FOLDER + argv[0], os.X_OK):
            return None  # the launcher sees more programs than VMMs do
        reason: Exception | None = None
        for _ in range(2):  # somebody may have killed the template: then another is started, once
            if not self._has_templates:
                return None
            try:
                template = self._templates.get(argv) or self._start_template(argv)
                pid = self._fork(template, request, fds)
            except TimeoutError as error:  # it may fork late, and nobody else may have these descriptors
                self._end_template(argv)
                raise OSError(f"a template did not answer in {_ANSWER_WITHIN_S:g} s") from error
            except (OSError, ValueError) as error:
                self._end_template(argv)
                reason = error
                continue
            return _check(pid, "clone", -pid)
        print(f"VMMs are executed one by one: {reason}", file=sys.stderr, flush=True)
        self._has_templates = False
        return None

    def _fork(self, template: Template, request: dict[str, Any], fds: Sequence[int]) -> int:
        """The new process's id, or the negative error number."""
        own_users = request["uid"] is None
        there = range(CONTROL_FD + 1, CONTROL_FD + 1 + len(fds))
        calls = confinement(there, request["limits"], request["uid"], self._owner)
        script = packed(calls, namespaces(own_users=own_users) | FORK_FLAGS, template.address)
        return forked(template.control, script, fds)

    def _start_family(self, request: dict[str, Any], fds: Sequence[int]) -> tuple[int, int]:
        """Starts the first process of a family of VMMs: its id, and where its packets lie.

        Raises:
            OSError: Templates do not work, or the kernel makes no process.
        """
        argv = tuple(request["argv"])
        template = self._templates.get(argv) or self._start_template(argv)
        own_users = bool(request["own_users"])
        control_fd, log_fd = range(CONTROL_FD + 1, CONTROL_FD + 1 + len(fds))
        calls = first_process(control_fd, log_fd, self._owner, own_users=own_users)
        script = packed(calls, namespaces(own_users=own_users) | FORK_FLAGS, template.address, stays=True)
        try:
            pid = forked(template.control, script, fds)
        except OSError:
            self._end_template(argv)
            raise
        return _check(pid, "clone", -pid), template.address

    def _start_template(self, argv: tuple[str, ...]) -> Template:
        """Loads a program, and waits until it waits.

        Raises:
            OSError: It does not.
        """
        while len(self._templates) >= _MAX_TEMPLATES:
            self._end_template(next(iter(self._templates)))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_ANSWER_WITHIN_S)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        stub_fd = os.memfd_create("stub")
        try:
            os.write(stub_fd, stub_object())
            if (pid := os.fork()) == 0:
                _become_template(list(argv), theirs.fileno(), stub_fd)
        finally:
            os.close(stub_fd)
            theirs.close()
        try:
            address = number_from(ours)
            if (num_threads := _num_threads(pid)) != 1:
                raise OSError(f"a library of {argv[0]} has started {num_threads - 1} threads")
            self._templates[argv] = Template(ours, address)
        except OSError:
            ours.close()
            raise
        return self._templates[argv]

    def _end_template(self, argv: tuple[str, ...]) -> None:
        if (template := self._templates.pop(argv, None)) is not None:
            template.control.close()


def _num_threads(pid: int) -> int:
    with os.scandir(f"/proc/{pid}/task") as threads:
        return sum(1 for _ in threads)


def _become(argv: list[str], calls: Sequence[SystemCall]) -> NoReturn:
    """Turns this child into a VMM; whatever goes wrong is told on its standard error."""
    try:
        _reset_signals()
        for call in calls:
            _carry_out(call)
        os.execve(argv[0], argv, _ENVIRONMENT)
    except BaseException as error:
        os.write(2, f"cannot start {argv[0]}: {error}\n".encode())
    os._exit(_EXEC_FAILED)


def _become_template(argv: list[str], control_fd: int, stub_fd: int) -> NoReturn:
    """Turns this child into a template; whatever goes wrong is told on the launcher's standard error."""
    try:
        _reset_signals()
        above = STUB_FD + 1
        control_fd, stub_fd = (fcntl.fcntl(fd, fcntl.F_DUPFD, above) for fd in (control_fd, stub_fd))
        os.dup2(os.open("/dev/null", os.O_RDWR), 0)
        os.dup2(control_fd, CONTROL_FD)
        os.dup2(stub_fd, STUB_FD)
        os.closerange(above, FIRST_FD)
        os.execve(argv[0], argv, _TEMPLATE_ENVIRONMENT)
    except BaseException as error:
        os.write(2, f"cannot load {argv[0]}: {error}\n".encode())
    os._exit(_EXEC_FAILED)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _carry_out(call: SystemCall) -> None:
    """Makes a system call.

    Raises:
        OSError: It failed, and may not.
    """
    held: list[Any] = []  # what pointers point to, until the call has returned

    def passed(argument: int | bytes) -> Any:
        if isinstance(argument, int):
            return ctypes.c_long(argument)
        held.append(ctypes.create_string_buffer(argument, len(argument)))
        if isinstance(argument, Filter):
            header = filter_header(argument, ctypes.addressof(held[-1]))
            held.append(ctypes.create_string_buffer(header, len(header)))
        return held[-1]

    result = _libc.syscall(ctypes.c_long(call.number), *map(passed, call.arguments))
    if not call.may_fail:
        _check(result, call.name)


def _check(result: int, doing: str, error: int | None = None) -> int:
    if result < 0:
        error = ctypes.get_errno() if error is None else error
        raise OSError(error, f"{doing}: {os.strerror(error)}")
    return result
