"""The fork server's side of keepers: makes them, hears from them, ends them.

Invariants:

- What a keeper sends is checked: its memory is shared with code that is not trusted. One that breaks the
  protocol, or does not listen, is killed.
- A keeper that is ended leaves no player behind, whatever the player did about it.
- A process is only ever signalled through a descriptor of it (pidfd): a number may mean another process by
  the time it is used.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from rollout.sandbox.process.folders import Folder, FolderStore, Layer
from rollout.sandbox.process.keeper import Report, Request

__all__ = ["Keeper", "Keepers"]

_CREDENTIALS = struct.Struct("iII")
_MAX_REPORT_BYTES = 4096

Told = Callable[[str | None], None]
"""Called with None when something has happened, or with the reason why it never will."""


@dataclass(slots=True, eq=False)
class Keeper:
    """A keeper process, as the server knows it.

    Attributes:
        control: Connection to it.
        layers: What its sandbox's folder holds (parked) or began with (running); retained.
        source: What it is forked from, until it has reported.
        fork_number: Of the request for it.
        pidfd: Refers to the process, once it has reported.
        folder: The folder of its player, while that runs.
        channel: The guest channel that waits for its first start, or -1.
        name: Name of the sandbox that it is, or None.
        checkpoints: Names of the checkpoints that it is.
        unborn: Copies that it was asked for and that have not reported.
        on_born: Told when its first player starts.
        on_parked: Told when its player has parked.
    """

    control: socket.socket
    layers: tuple[Layer, ...] = ()
    source: Keeper | None = None
    fork_number: int = -1
    pidfd: int = -1
    pid: int = -1
    folder: Folder | None = None
    channel: int = -1
    name: str | None = None
    checkpoints: set[str] = field(default_factory=set[str])
    is_dead: bool = False
    unborn: set[Keeper] = field(default_factory=lambda: set["Keeper"]())
    on_born: Told | None = None
    on_parked: Told | None = None

    @property
    def is_parked(self) -> bool:
        """It has no player: it can be forked."""
        return self.folder is None and self.pidfd >= 0 and not self.is_dead

    def tell_born(self, reason: str | None) -> None:
        """Tells who waits for its birth, once."""
        told, self.on_born = self.on_born, None
        if told is not None:
            told(reason)

    def tell_parked(self, reason: str | None) -> None:
        """Tells who waits for it to park, once."""
        told, self.on_parked = self.on_parked, None
        if told is not None:
            told(reason)

    def close_channel(self) -> None:
        """Lets go of a guest channel that it has been given, or never will be."""
        if self.channel >= 0:
            os.close(self.channel)
            self.channel = -1


class Keepers:
    """Makes and ends keepers, and follows them.

    Args:
        selector: The server's loop; callbacks without arguments are registered with it.
        folders: Where sandboxes' folders come from.
        on_death: Told of a keeper that ended by itself, and why; what refers to it is then gone.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        folders: FolderStore,
        on_death: Callable[[Keeper, str], None],
    ) -> None:
        self._selector = selector
        self._folders = folders
        self._on_death = on_death
        self._numbers = itertools.count()

    def adopt_template(self, pid: int, control: socket.socket) -> Keeper:
        """Takes the template, which has reported already, as the keeper of all fresh sandboxes."""
        template = Keeper(control, pidfd=os.pidfd_open(pid), pid=pid)
        self._watch(template)
        return template

    def copy(self, source: Keeper, names: list[str], channels: list[int], born: Told) -> list[Keeper]:
        """Asks a parked keeper for copies of itself, and starts their players as they come.

        Args:
            source: The keeper.
            names: Of the sandboxes that the copies will be.
            channels: One guest channel for each, its owner's no longer; none to have the only copy take over
                the source's.
            born: Told once for each copy.

        Raises:
            OSError: There are no descriptors left, or the source does not listen; nothing is left of the
                attempt, and the channels are still the caller's.
        """
        pairs: list[tuple[socket.socket, socket.socket]] = []
        try:
            for _ in names:
                pairs.append(control_pair())
            number = next(self._numbers)
            request = (Request.FORK if channels else Request.PASS_ON) + str(number).encode()
            socket.send_fds(source.control, [request], [theirs.fileno() for _, theirs in pairs])
        except OSError:
            for ours, _ in pairs:
                ours.close()
            raise
        finally:
            for _, theirs in pairs:
                theirs.close()
        copies: list[Keeper] = []
        for index, (ours, _) in enumerate(pairs):
            copy = Keeper(ours, source.layers, source, fork_number=number, name=names[index], on_born=born)
            copy.channel = channels[index] if channels else -1
            self._folders.retain(source.layers)
            self._watch(copy)
            copies.append(copy)
        source.unborn |= set(copies)
        return copies

    def start(self, keeper: Keeper) -> None:
        """Gives a parked keeper a folder and lets it run its player.

        Raises:
            OSError: No folder can be made, or the keeper does not listen; it is parked as before.
        """
        folder, mount_fd = self._folders.open(keeper.layers)
        try:
            fds = [mount_fd] if keeper.channel < 0 else [mount_fd, keeper.channel]
            socket.send_fds(keeper.control, [Request.START + (keeper.name or "").encode()], fds)
        except OSError:
            self._folders.close(folder)
            raise
        finally:
            os.close(mount_fd)
        keeper.folder = folder
        keeper.close_channel()

    def end(self, keeper: Keeper) -> set[int]:
        """Kills a keeper and its player, and frees what belonged to them. Idempotent.

        Returns:
            A descriptor of each process that is about to end, readable when it has; the caller closes them.
        """
        if keeper.is_dead:
            return set()
        keeper.is_dead = True
        self._forget_source(keeper)
        self._selector.unregister(keeper.control)
        keeper.control.close()
        keeper.close_channel()
        ending: set[int] = set()
        if keeper.pidfd >= 0:
            ending |= self._players(keeper)
            ending.add(keeper.pidfd)
            for pidfd in ending:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            keeper.pidfd = -1
        if keeper.folder is not None:
            self._folders.close(keeper.folder)
            keeper.folder = None
        self._folders.release(keeper.layers)
        keeper.layers = ()
        return ending

    def _watch(self, keeper: Keeper) -> None:
        keeper.control.setblocking(False)
        self._selector.register(keeper.control, selectors.EVENT_READ, lambda: self._hear(keeper))

    def _players(self, keeper: Keeper) -> set[int]:
        """Descriptors of a keeper's children: its copies are children of the server.

        A player dies with its keeper anyway, unless it has changed that.
        """
        found: set[int] = set()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            with open(f"/proc/{keeper.pid}/task/{keeper.pid}/children", encoding="ascii") as file:  # noqa: PTH123
                children = file.read().split()
            for child in children:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    found.add(os.pidfd_open(int(child)))
        return found

    def _hear(self, keeper: Keeper) -> None:
        """Takes in one message of a keeper, or its end."""
        if keeper.is_dead:  # by an earlier event of the same moment
            return
        size = socket.CMSG_SPACE(_CREDENTIALS.size)  # no room for descriptors: the kernel drops them
        try:
            data, ancillary, _, _ = keeper.control.recvmsg(_MAX_REPORT_BYTES, size)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        kind, rest = data[:1], data[1:].decode(errors="replace")
        if kind == Report.BORN and keeper.pidfd < 0 and ancillary:
            self._hear_birth(keeper, _CREDENTIALS.unpack(ancillary[0][2])[0])
        elif kind == Report.PARKED and keeper.folder is not None:
            self._hear_parking(keeper, keeper.folder)
        elif kind == Report.NOT_FORKED:
            number, _, reason = rest.partition(" ")
            for copy in [copy for copy in keeper.unborn if str(copy.fork_number) == number]:
                self._lose(copy, reason)
        elif kind == Report.FAILED:
            self._lose(keeper, rest)
        elif data:
            self._lose(keeper, "it broke the protocol")
        else:
            if keeper.source is not None and not keeper.source.is_dead:
                self._hear(keeper.source)  # it knows why there is no such copy
            self._lose(keeper, "its process ended")

    def _hear_birth(self, keeper: Keeper, pid: int) -> None:
        try:
            keeper.pidfd = os.pidfd_open(pid)
            keeper.pid = pid
            self.start(keeper)
        except OSError as error:
            self._lose(keeper, str(error))
            return
        self._forget_source(keeper)
        keeper.tell_born(None)

    def _hear_parking(self, keeper: Keeper, folder: Folder) -> None:
        try:
            layers = self._folders.save(folder)
        except OSError as error:
            self._lose(keeper, f"its folder cannot be saved: {error}")
            return
        self._folders.release(keeper.layers)
        keeper.layers = layers
        keeper.folder = None
        keeper.tell_parked(None)

    def _forget_source(self, keeper: Keeper) -> None:
        if keeper.source is not None:
            keeper.source.unborn.discard(keeper)
            keeper.source = None

    def _lose(self, keeper: Keeper, reason: str) -> None:
        """A keeper ended by itself, or is to be ended for what it did."""
        if keeper.is_dead:
            return
        for pidfd in self.end(keeper):
            os.close(pidfd)
        keeper.tell_born(reason)
        keeper.tell_parked(reason)
        self._on_death(keeper, reason)


def control_pair() -> tuple[socket.socket, socket.socket]:
    """A connection to a keeper; the first end gets the kernel's word on who sends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs
