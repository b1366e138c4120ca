"""The sockets and files between a VMM and us, while the VMM is started."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass

from rollout.errors import BootError
from rollout.sandbox.microvm.rewind import Rewinder

__all__ = ["VmmEnds"]


@dataclass(frozen=True, slots=True)
class VmmEnds:
    """All that a VMM and we share.

    Attributes:
        qmp: Our end of the monitor.
        channel: Our end of the guest's channel.
        theirs: The VMM's ends of both.
        state_fds: The file that device state is saved to: for reading, and as the VMM writes it.
        rewinder: Puts it back; None for the VM that makes a base.
    """

    qmp: socket.socket
    channel: socket.socket
    theirs: tuple[socket.socket, socket.socket]
    state_fds: tuple[int, int]
    rewinder: Rewinder | None

    @classmethod
    def open(cls, *, forgets_code: bool | None) -> VmmEnds:
        """Makes them.

        Args:
            forgets_code: That of the `Rewinder`; None for the VM that makes a base.

        Raises:
            BootError: There are no descriptors left; then nothing stays open.
        """
        try:
            with contextlib.ExitStack() as undo:
                rewinder = None if forgets_code is None else Rewinder(forgets_code=forgets_code)
                if rewinder is not None:
                    undo.callback(rewinder.close)
                qmp, their_qmp = map(undo.enter_context, socket.socketpair())
                channel, their_channel = map(undo.enter_context, socket.socketpair())
                read_fd = os.memfd_create("vmm-state", os.MFD_CLOEXEC)
                undo.callback(os.close, read_fd)
                write_fd = os.open(f"/proc/self/fd/{read_fd}", os.O_WRONLY | os.O_CLOEXEC)
                undo.pop_all()
        except OSError as error:
            raise BootError(f"a VMM cannot be started: {error}", retryable=True) from error
        return cls(qmp, channel, (their_qmp, their_channel), (read_fd, write_fd), rewinder)

    def far_fds(self, ram_fd: int) -> list[int]:
        """What the VMM gets, in the order of `FIRST_FD` and after."""
        theirs = [end.fileno() for end in self.theirs]
        return [*theirs, self.state_fds[1], ram_fd, *(self.rewinder.far_fds if self.rewinder else ())]

    def has_started(self) -> None:
        """The VMM has its copies: when it ends, our ends must notice."""
        for end in self.theirs:
            end.close()
        if self.rewinder is not None:
            self.rewinder.has_started()

    def close(self) -> None:
        """Closes everything; the VMM did not come up."""
        self.has_started()
        self.qmp.close()
        self.channel.close()
        for fd in self.state_fds:
            os.close(fd)
        if self.rewinder is not None:
            self.rewinder.close()
