"""The fork server: the first process of the engine's namespaces, which owns keepers, folders and their names.

It runs none of an environment's code and imports only the standard library. The engine asks over one control
socket; the server passes on to keepers, and answers in any order.

| request | meaning |
|---|---|
| `fork` checkpoint or null, sandboxes, with a guest channel for each | makes clones, or fresh sandboxes |
| `save` sandbox, checkpoint or null | waits until a sandbox has parked, and names it |
| `wake` sandbox | lets a parked sandbox go on |
| `kill` sandboxes | ends them; answered when they have ended |
| `discard` checkpoints | forgets them, also one whose sandbox has not parked yet |
| `stats` | counts |

Invariants:

- A keeper lives as long as a sandbox or a checkpoint refers to it.
- `fork` makes all of its sandboxes or none.
- When the engine's process ends, however it ends, the server ends; with the first process of a pid namespace
  the kernel ends all others, and what was mounted ends with its mount namespace. Nothing is left.

Not guaranteed: that it answers while it copies a large folder (where there is no overlay, or at depth).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, Never

from rollout.sandbox.process import packets, syscalls, walls
from rollout.sandbox.process.folders import FolderStore
from rollout.sandbox.process.guard import Guard
from rollout.sandbox.process.keepers import Keeper, Keepers
from rollout.sandbox.process.template import fork_template

__all__ = ["SCRATCH", "main"]

SCRATCH = "/scratch"
"""An empty folder of the view, for the fork server's own mounts."""


class Refused(Exception):
    """A request that cannot be carried out; `kind` names the error that the engine raises."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Server:
    """The server's state and its loop.

    Args:
        control: Connection to the engine.
        owner_pidfd: Refers to the engine's process.
        limits: Of every sandbox.
    """

    def __init__(self, control: socket.socket, owner_pidfd: int, limits: walls.Limits) -> None:
        self._control = control
        self._selector = selectors.DefaultSelector()
        self._sandboxes: dict[str, Keeper] = {}
        self._checkpoints: dict[str, Keeper] = {}
        self._awaited: set[str] = set()  # checkpoints of sandboxes that have not parked yet
        self._obituaries: dict[
            str, str
        ] = {}  # of sandboxes that ended by themselves and were not killed since
        folders = FolderStore(SCRATCH, limits.folder_bytes)
        self._has_overlay = folders.has_overlay
        pid, template_control, listener = fork_template(SCRATCH, limits)
        guard = Guard(listener)
        self._keepers = Keepers(self._selector, folders, self._on_death)
        self._template = self._keepers.adopt_template(pid, template_control)
        self._wakeup = _watch_children()
        self._selector.register(control, selectors.EVENT_READ, self._on_request)
        self._selector.register(owner_pidfd, selectors.EVENT_READ, _end)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._reap)
        self._selector.register(listener, selectors.EVENT_READ, guard.answer)

    def run(self) -> Never:
        """Serves until the engine is gone."""
        self._tell({"event": "ready"})
        while True:
            for key, _ in self._selector.select():
                key.data()

    def _tell(self, message: packets.Message) -> None:
        try:
            packets.send(self._control, message)
        except OSError:  # there is nobody left to serve
            _end()

    def _on_request(self) -> None:
        try:
            received = packets.receive(self._control, packets.MAX_DESCRIPTORS)
        except OSError:
            received = None
        if received is None:
            _end()
        request, fds = received
        number = int(request["id"])
        try:
            match request["op"]:
                case "fork":
                    self._fork(number, request["checkpoint"], request["sandboxes"], fds)
                case "save":
                    self._save(number, request["sandbox"], request["checkpoint"])
                case "wake":
                    self._wake(number, request["sandbox"])
                case "kill":
                    self._kill(number, request["sandboxes"])
                case "discard":
                    self._discard(number, request["checkpoints"])
                case "stats":
                    self._answer(number, self._stats())
                case op:
                    raise Refused("GuestError", f"the fork server knows no request {op!r}")
        except Refused as refused:
            self._refuse(number, refused.kind, str(refused))

    def _answer(self, number: int, value: Any = None) -> None:
        self._tell({"id": number, "ok": value})

    def _refuse(self, number: int, kind: str, message: str) -> None:
        self._tell({"id": number, "error": [kind, message]})

    def _stats(self) -> dict[str, int]:
        keepers = {*self._sandboxes.values(), *self._checkpoints.values()}
        return {
            "sandboxes": len(self._sandboxes),
            "checkpoints": len(self._checkpoints),
            "keepers": len(keepers),
            "has_overlay": int(self._has_overlay),
        }

    def _fork(self, number: int, checkpoint: str | None, names: list[str], channels: list[int]) -> None:
        source = self._template if checkpoint is None else self._checkpoints.get(checkpoint)
        if source is None or len(names) != len(channels):
            for fd in channels:
                os.close(fd)
            if source is None:
                raise Refused(
                    "CheckpointError", f"there is no checkpoint {checkpoint}, or its process has ended"
                )
            raise Refused("ForkError", f"{len(channels)} channels came for {len(names)} sandboxes")
        clones: list[Keeper] = []
        reasons: list[str | None] = []

        def born(reason: str | None) -> None:
            reasons.append(reason)
            if len(reasons) < len(names):
                return
            failure = next((reason for reason in reasons if reason is not None), None)
            if failure is None:
                self._answer(number)
                return
            for clone in clones:
                self._forget(clone)
            self._refuse(number, "ForkError", failure)

        try:
            clones += self._keepers.copy(source, names, channels, born)
        except OSError as error:
            for fd in channels:
                os.close(fd)
            raise Refused("ForkError", str(error)) from error
        self._sandboxes |= zip(names, clones, strict=True)

    def _save(self, number: int, name: str, checkpoint: str | None) -> None:
        keeper = self._find(name)

        def parked(reason: str | None) -> None:
            if reason is None and checkpoint is not None and checkpoint not in self._awaited:
                reason = f"the checkpoint {checkpoint} was discarded before it was saved"
            if checkpoint is not None:
                self._awaited.discard(checkpoint)
            if reason is not None:
                self._refuse(number, "CheckpointError", reason)
                return
            if checkpoint is not None:
                keeper.checkpoints.add(checkpoint)
                self._checkpoints[checkpoint] = keeper
            self._answer(number)

        if checkpoint is not None:
            self._awaited.add(checkpoint)
        if keeper.is_parked:
            parked(None)
        else:
            keeper.on_parked = parked

    def _wake(self, number: int, name: str) -> None:
        keeper = self._find(name)
        if not keeper.is_parked:
            self._answer(number)
            return

        def born(reason: str | None) -> None:
            if reason is None:
                self._answer(number)
            else:
                self._refuse(number, "ForkError", reason)

        try:
            if keeper.checkpoints:  # it stays what it is, and a copy goes on as the sandbox
                (copy,) = self._keepers.copy(keeper, [name], [], born)
                keeper.name = None
                self._sandboxes[name] = copy
            else:
                self._keepers.start(keeper)
                self._answer(number)
        except OSError as error:
            raise Refused("ForkError", str(error)) from error

    def _find(self, name: str) -> Keeper:
        keeper = self._sandboxes.get(name)
        if keeper is None:
            raise Refused("GuestError", self._obituaries.get(name, f"there is no sandbox {name}"))
        return keeper

    def _kill(self, number: int, names: list[str]) -> None:
        ending: set[int] = set()
        for name in names:
            self._obituaries.pop(name, None)
            keeper = self._sandboxes.pop(name, None)
            if keeper is None:
                continue
            keeper.name = None
            if not keeper.checkpoints:
                ending |= self._keepers.end(keeper)
        if not ending:
            self._answer(number)

        def ended(pidfd: int) -> None:
            self._selector.unregister(pidfd)
            os.close(pidfd)
            ending.discard(pidfd)
            if not ending:
                self._answer(number)

        for pidfd in ending:
            self._selector.register(pidfd, selectors.EVENT_READ, lambda pidfd=pidfd: ended(pidfd))

    def _discard(self, number: int, checkpoints: Sequence[str]) -> None:
        for name in checkpoints:
            self._awaited.discard(name)
            keeper = self._checkpoints.pop(name, None)
            if keeper is not None:
                keeper.checkpoints.discard(name)
                if not keeper.checkpoints and keeper.name is None:
                    self._forget(keeper)
        self._answer(number)

    def _forget(self, keeper: Keeper) -> None:
        if keeper.name is not None:
            self._sandboxes.pop(keeper.name, None)
        for pidfd in self._keepers.end(keeper):
            os.close(pidfd)

    def _on_death(self, keeper: Keeper, reason: str) -> None:
        if keeper is self._template:
            self._tell({"event": "failed", "reason": f"the template: {reason}"})
            _end()
        if keeper.name is not None:
            self._sandboxes.pop(keeper.name, None)
            self._obituaries[keeper.name] = reason
            self._tell({"event": "ended", "sandbox": keeper.name, "reason": reason})
        for checkpoint in keeper.checkpoints:
            self._checkpoints.pop(checkpoint, None)

    def _reap(self) -> None:
        """Waits for whoever has ended: as the first process, this one inherits all orphans."""
        with contextlib.suppress(BlockingIOError):
            self._wakeup.recv(4096)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _watch_children() -> socket.socket:
    """A descriptor that is readable when a child has ended."""
    reading, writing = socket.socketpair()
    for end in (reading, writing):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, _do_nothing)
    signal.set_wakeup_fd(writing.detach(), warn_on_full_buffer=False)
    return reading


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A handler makes the kernel interrupt, and Python write to the wake-up descriptor."""


def _end() -> Never:
    os._exit(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m rollout.sandbox.process.server CONTROL_FD OWNER_PIDFD LIMITS`, as the first process."""
    control_fd, owner_pidfd, limits_text = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(control_fd))
    for fd in (int(control_fd), int(owner_pidfd)):
        os.set_inheritable(fd, False)
    try:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        syscalls.mount("tmpfs", SCRATCH, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=700")
        server = Server(control, int(owner_pidfd), walls.Limits(**json.loads(limits_text)))
    except (OSError, RuntimeError) as error:
        packets.send(control, {"event": "failed", "reason": str(error)})
        return
    server.run()


if __name__ == "__main__":
    main()
