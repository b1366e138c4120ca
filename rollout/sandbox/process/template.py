"""The template: the keeper of which every fresh sandbox is a copy.

It is forked by the fork server, gives up all that is the server's, goes into its cage, and only then imports
what sandboxes run. What an environment needs is imported by the environment, in its own sandbox.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
from typing import Never

from rollout.sandbox.process import syscalls, walls
from rollout.sandbox.process.keeper import MAX_REQUEST_BYTES, Keeper, Report, Request
from rollout.sandbox.process.keepers import control_pair
from rollout.sandbox.process.seccomp import guard_program

__all__ = ["fork_template"]


def fork_template(hidden: str, limits: walls.Limits) -> tuple[int, socket.socket, int]:
    """Forks the template and sees it through its cage; for the fork server.

    Args:
        hidden: The mount that only the fork server may see.
        limits: Of every sandbox.

    Returns:
        Its process id, the connection to it, and the descriptor over which its filter asks.

    Raises:
        RuntimeError: It could not be made.
        OSError: It could not be made.
    """
    ours, theirs = control_pair()
    pid = os.fork()
    if pid == 0:
        try:
            _be_template(theirs.fileno(), hidden, limits)
        finally:
            os._exit(1)  # this is another process: nothing may go on as the fork server
    theirs.close()
    _expect(ours, Report.CAGED)
    walls.map_user(pid, os.geteuid(), os.getegid())
    ours.send(Request.GO_ON)
    (listener,) = _expect(ours, Report.GUARDED)
    _expect(ours, Report.BORN)
    return pid, ours, listener


def _be_template(control_fd: int, hidden: str, limits: walls.Limits) -> None:
    """The life of the template, which has nothing of the fork server's but its memory."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if int(name) not in (0, 1, 2, control_fd):
            with contextlib.suppress(OSError):  # the descriptor of this very listing
                os.close(int(name))
    os.dup2(1, 2)
    control = socket.socket(fileno=control_fd)
    try:
        _run(control, hidden, limits)
    except Exception as error:
        control.send(Report.FAILED + f"{type(error).__name__}: {error}".encode())


def _expect(control: socket.socket, kind: bytes) -> list[int]:
    """Waits for a report of the template; returns the descriptors that came with it."""
    # the kernel adds the sender's credentials, for which `socket.recv_fds` leaves no room
    report, ancillary, _, _ = control.recvmsg(4096, socket.CMSG_SPACE(12) + socket.CMSG_SPACE(4))
    rights = [data for _, kind_of_data, data in ancillary if kind_of_data == socket.SCM_RIGHTS]
    fds = [int.from_bytes(data[:4], sys.byteorder) for data in rights]
    if report[:1] != kind:
        reason = report[1:].decode(errors="replace") or "its process ended"
        raise RuntimeError(f"the template could not be made: {reason}")
    return fds


def _run(control: socket.socket, hidden: str, limits: walls.Limits) -> Never:
    """From the fork server's memory to a caged keeper that has imported what every sandbox needs."""
    limits.apply_to_template()
    walls.cage(hidden)
    control.send(Report.CAGED)
    control.recv(MAX_REQUEST_BYTES)  # the fork server has mapped the user
    listener = syscalls.listen_to_calls(guard_program())
    socket.send_fds(control, [Report.GUARDED], [listener])
    os.close(listener)

    from rollout.sandbox.process.player import Player

    keeper = Keeper(control, Player(), limits.num_processes)
    gc.collect()
    gc.freeze()  # the collector never touches, and so never copies, what all sandboxes share
    keeper.run()
