"""The launcher: a small process that starts VMMs, and whose end is theirs. Standard library only.

It runs as PID 1 of its own PID namespace, inside bubblewrap: without network, with a read-only view of the
files that a VMM needs. So VMMs are never forked from a process with much memory, and when the launcher ends,
for whatever reason, the kernel ends every VMM with it. It ends when its owner closes the control socket,
which the kernel does too when the owner is killed.

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
import sys
from typing import Any, NoReturn

__all__ = ["FIRST_FD", "MAX_PACKET_BYTES"]

FIRST_FD = 100
"""Number of a request's first descriptor in the new process; its standard error is the request's last one."""
MAX_PACKET_BYTES = 1 << 16
_MAX_FDS = 8
_PR_SET_NO_NEW_PRIVS = 38
_EXEC_FAILED = 127


def main() -> None:
    """Serves spawn requests on descriptor 0 until it is closed."""
    control = socket.socket(fileno=os.dup(0))
    os.set_inheritable(control.fileno(), False)
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
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
        pid = os.fork()
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
        for name, value in request["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        if (uid := request["uid"]) is not None:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        os.execve(request["argv"][0], request["argv"], {"PATH": "/usr/bin:/bin", "LANG": "C"})
    except BaseException as error:
        os.write(2, f"cannot start {request['argv'][0]}: {error}\n".encode())
    os._exit(_EXEC_FAILED)


if __name__ == "__main__":
    sys.exit(main())
