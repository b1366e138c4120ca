"""Keepers: the processes whose memory sandboxes and checkpoints are.

A pid namespace cannot be left: what a sandbox forks stays in the sandbox's namespace, so a checkpoint forked
by the sandbox itself would die with it, and clones of clones would nest, which the kernel stops at depth 32.
Therefore a sandbox is two processes with one memory:

- the **keeper** lives in the engine's pid namespace and runs none of the environment's code;
- the **player** shares the keeper's memory and descriptors (CLONE_VM, CLONE_FILES) but has namespaces and
  credentials of its own. It serves the guest channel and runs the environment.

The kernel suspends the keeper (CLONE_VFORK) until the player ends, so the two never run at the same time. A
checkpoint is a keeper whose player has ended properly ("parked"): it sleeps in `recvmsg`, costs no CPU, and
holds the whole state in its memory. Cloning is to fork the keeper; each copy starts a player in fresh
namespaces, next to all others and not below them. So nothing nests, at any depth, and a branch that is saved
and released has cost one fork.

    template ──fork──> keeper ══memory══ player     (a sandbox)
                         │ player parks
                       keeper                       (a checkpoint)
                         ├──fork──> keeper ══ player
                         └──fork──> keeper ══ player

All are children of the fork server, which waits for them.

One packet is one message, its first byte says what it is (`Request`, `Report`); short and plain, because
whatever a new process touches has to be copied first.

A player that attacks this code in its own memory can take the keeper over. It then has the keeper's rights:
capabilities over namespaces of its own, but none over the host, and neither its siblings' files nor their
processes (see `rollout.sandbox.process.walls`, `.seccomp` and `.guard`).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import socket
import struct
from typing import TYPE_CHECKING, Final, Never

from rollout.sandbox.process import syscalls, walls

if TYPE_CHECKING:
    from rollout.sandbox.process.player import Player

__all__ = ["CHANNEL_FD", "CONTROL_FD", "MAX_REQUEST_BYTES", "Keeper", "Report", "Request"]


class Request:
    """What the fork server asks for: the first byte of a packet."""

    FORK: Final = b"f"
    """Make a copy for each control socket that comes along. The rest is the number of the request."""
    PASS_ON: Final = b"p"
    """Make one copy, which gets the guest channel, for the socket that comes along. Else as `FORK`."""
    START: Final = b"s"
    """Start the player. With the folder's mount and, for the first time, the guest channel; the rest is the
    sandbox's name."""
    GO_ON: Final = b"g"
    """To the template: the user has been mapped."""


class Report:
    """What a keeper says: the first byte of a packet."""

    BORN: Final = b"b"
    """It exists; the packet carries its process id, which the kernel vouches for."""
    NOT_FORKED: Final = b"n"
    """Not all copies could be made. The rest is the number of the request, a blank, and the reason."""
    PARKED: Final = b"p"
    """Its player has ended, and it can be forked."""
    FAILED: Final = b"e"
    """It is about to end. The rest is the reason."""
    CAGED: Final = b"c"
    """From the template: its user is to be mapped."""
    GUARDED: Final = b"g"
    """From the template: its filter is loaded. With the descriptor over which the filter asks."""


CHANNEL_FD: Final = 3
CONTROL_FD: Final = 4
"""Fixed, so that descriptors which an environment holds never get in the way."""

_LAST_WORD = int(signal.SIGRTMAX)
"""The kernel sends it to a keeper when its player ends. The player has both ignore it just before it returns;
when it is killed in the middle of something, the interpreter cannot go on, and the keeper dies too."""
_STACK_BYTES = 16 << 20
_MAP_NORESERVE, _MAP_STACK = 0x4000, 0x20000
_SHARED = syscalls.CLONE_VM | syscalls.CLONE_VFORK | syscalls.CLONE_FILES | syscalls.CLONE_SIGHAND
_FLAGS = _SHARED | walls.NAMESPACES | _LAST_WORD
_CREDENTIALS = struct.Struct("iII")
_WALL = 0x40000000  # waitpid(2): children with another exit signal than SIGCHLD, too
MAX_REQUEST_BYTES = 256
_MAX_DESCRIPTORS = 250


class Keeper:
    """One keeper; created once, in the template, and copied from then on.

    Args:
        control: The connection to the fork server.
        player: What runs in the player.
        num_processes: Most processes of a sandbox.
    """

    def __init__(self, control: socket.socket, player: Player, num_processes: int) -> None:
        self._player = player
        self._num_processes = num_processes
        self._user, self._group = os.geteuid(), os.getegid()
        self._control = control
        self._take_control_socket(control.detach())
        _drop_channel()
        stack = mmap.mmap(
            -1, _STACK_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_STACK
        )
        self._stack = stack
        self._stack_top = ctypes.addressof(ctypes.c_char.from_buffer(stack)) + _STACK_BYTES
        self._entry = syscalls.make_entry(self._play)
        self._mount_fd = -1
        self._name = ""

    def run(self) -> Never:
        """Serves the fork server's requests until it closes the connection."""
        self._report_birth()
        while True:
            request, fds, _, _ = socket.recv_fds(self._control, MAX_REQUEST_BYTES, _MAX_DESCRIPTORS)
            if not request:
                os._exit(0)
            kind, rest = request[:1], request[1:]
            if kind == Request.START:
                self._start(rest.decode(), fds)
            else:
                self._fork(rest, fds, passes_on=kind == Request.PASS_ON)

    def _report_birth(self) -> None:
        own = _CREDENTIALS.pack(os.getpid(), self._user, self._group)
        self._control.sendmsg([Report.BORN], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, own)])

    def _take_control_socket(self, fd: int) -> None:
        if fd != CONTROL_FD:
            os.dup2(fd, CONTROL_FD, inheritable=False)
            os.close(fd)
        self._control = socket.socket(fileno=CONTROL_FD)

    def _fork(self, number: bytes, controls: list[int], *, passes_on: bool) -> None:
        """Makes one copy for each control socket; returns in all of them."""
        for index, control in enumerate(controls):
            try:
                is_copy = syscalls.fork_sibling() == 0
            except OSError as error:
                # said before the sockets of copies that do not exist are closed: it is why they are
                self._control.send(b"%b%b %b" % (Report.NOT_FORKED, number, str(error).encode()))
                break
            if is_copy:
                self._control.detach()
                self._take_control_socket(control)
                for other in controls[:index] + controls[index + 1 :]:
                    os.close(other)
                self._report_birth()
                return
        else:
            if passes_on:
                _drop_channel()
        for control in controls:
            os.close(control)

    def _start(self, name: str, fds: list[int]) -> None:
        """Runs the player until it ends, and says how."""
        self._name = name
        self._mount_fd = fds[0]
        if len(fds) > 1:
            os.dup2(fds[1], CHANNEL_FD, inheritable=False)
            os.close(fds[1])
        self._player.prepare(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        signal.signal(_LAST_WORD, signal.SIG_DFL)
        pid = syscalls.clone_onto_stack(self._entry, self._stack_top, _FLAGS)
        # From here on the memory is as the player left it.
        if not self._player.is_parked:
            self._control.send(Report.FAILED + self._player.failure.encode(errors="replace"))
            os._exit(1)
        self._control.send(Report.PARKED)
        os.waitpid(pid, _WALL)
        # The first process of a pid namespace ends by ignoring SIGCHLD, and these two share their handlers.
        signal.signal(signal.SIGCHLD, signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL)
        self._stack.madvise(mmap.MADV_DONTNEED)

    def _play(self) -> int:
        """The player's life; returns when it has parked or failed."""
        try:
            walls.enter(self._mount_fd, self._name, self._user, self._group, self._num_processes)
            self._player.play()
        except BaseException as error:  # nothing may pass through the C frame below
            self._player.failure = f"{type(error).__name__}: {error}"
        signal.signal(_LAST_WORD, signal.SIG_IGN)
        return 0


def _drop_channel() -> None:
    """Lets go of the guest channel; its number stays taken, so that nothing else gets it."""
    os.dup2(0, CHANNEL_FD, inheritable=False)
