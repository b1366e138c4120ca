"""Files and commands of the inline engine's sandboxes: a private folder each, and no wall around it.

A sandbox has no folder until it writes, reads or runs something. A checkpoint keeps a copy of the folder, and
only if there is one; clones of it copy that when they first need it. Paths are taken relative to the folder,
absolute ones too, and cannot leave it. A command starts in the folder but sees the host's files.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, cast

from rollout.errors import CheckpointError, GuestError
from rollout.sandbox.agent_command import Command, CommandSpec
from rollout.sandbox.guest_loop import Loop
from rollout.types import ExecResult, Value

__all__ = ["FrozenFolder", "PrivateFolder", "ScratchFolder", "run_command"]


class ScratchFolder:
    """The engine's temporary folder, made when it is first needed."""

    def __init__(self) -> None:
        self._path: Path | None = None

    def new_folder(self) -> Path:
        """A fresh, empty folder in it.

        Raises:
            OSError: It cannot be made.
        """
        if self._path is None:
            self._path = Path(tempfile.mkdtemp(prefix="rollout-inline-"))
        return Path(tempfile.mkdtemp(dir=self._path))

    def remove(self) -> None:
        """Removes it with everything inside. Idempotent."""
        if self._path is not None:
            _remove(self._path)
            self._path = None


class FrozenFolder:
    """A saved folder, shared by a checkpoint and the clones that have not needed a copy yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = sum(file.lstat().st_size for file in path.rglob("*"))
        self._num_holders = 1

    def hold(self) -> FrozenFolder:
        """One more holder, who must `release` it."""
        self._num_holders += 1
        return self

    def release(self) -> None:
        """The last holder's release removes it."""
        self._num_holders -= 1
        if self._num_holders == 0:
            _remove(self.path)


class PrivateFolder:
    """The folder of one sandbox; `origin`, which it holds, is what it begins as."""

    def __init__(self, scratch: ScratchFolder, origin: FrozenFolder | None = None) -> None:
        self._scratch = scratch
        self._origin = origin
        self._path: Path | None = None

    def path(self) -> Path:
        """Where it is; made, or copied, when it is first asked for.

        Raises:
            GuestError: There is no room for it.
        """
        if self._path is None:
            try:
                self._path = _copy(self._scratch, self._origin.path if self._origin else None)
            except OSError as error:
                raise GuestError(f"the sandbox's folder cannot be made: {error}", retryable=True) from error
            self._let_go_of_origin()
        return self._path

    def resolve(self, path: str) -> Path:
        """Where a path of the sandbox is on the host.

        Raises:
            GuestError: It leaves the folder, by its text or by a link.
        """
        folder = self.path()
        resolved = Path(os.path.normpath(folder / PurePosixPath(path.lstrip("/"))))
        if not resolved.resolve().is_relative_to(folder.resolve()):
            raise GuestError(f"the path {path!r} leaves the sandbox's folder")
        return resolved

    def freeze(self) -> FrozenFolder | None:
        """A copy for a checkpoint; None if there is nothing in it.

        Raises:
            CheckpointError: There is no room for it.
        """
        if self._path is None:
            return self._origin.hold() if self._origin else None
        try:
            return FrozenFolder(_copy(self._scratch, self._path))
        except OSError as error:
            raise CheckpointError(f"the sandbox's files cannot be saved: {error}", retryable=True) from error

    def remove(self) -> None:
        """Removes it. Idempotent."""
        self._let_go_of_origin()
        if self._path is not None:
            _remove(self._path)
            self._path = None

    def _let_go_of_origin(self) -> None:
        if self._origin is not None:
            self._origin.release()
            self._origin = None


def _copy(scratch: ScratchFolder, source: Path | None) -> Path:
    target = scratch.new_folder()
    if source is not None:
        try:
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
        except OSError:  # shutil.Error, the list of what could not be copied, is one too
            _remove(target)
            raise
    return target


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


class _Result:
    """Takes a command's result and ends its loop."""

    id = 0
    is_current = True
    is_congested = False

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.value: ExecResult | None = None

    def event(self, value: Value) -> None:
        """Never called: the output is kept, not streamed."""

    def reply(self, value: Value) -> None:
        self.value = ExecResult(**cast("dict[str, Any]", value))
        self._loop.stop()


async def run_command(
    argv: Sequence[str],
    *,
    stdin: bytes,
    timeout_s: float,
    cwd: Path,
    env: Mapping[str, str],
    max_output_bytes: int,
) -> ExecResult:
    """Runs a host command in a thread; its whole process group is killed when it ends or is cancelled.

    Raises:
        GuestError: It cannot be started.
    """
    spec = CommandSpec(
        argv=[*argv],
        stdin=stdin,
        timeout_s=timeout_s,
        cwd=str(cwd),
        env=dict(env),
        max_output_bytes=max_output_bytes,
        kills_group=True,
    )
    cancel_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    running = asyncio.ensure_future(asyncio.to_thread(_run, spec, cancel_fd))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        os.eventfd_write(cancel_fd, 1)
        while not running.done():  # however often it is cancelled: the thread still uses the descriptor
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        raise
    finally:
        os.close(cancel_fd)


def _run(spec: CommandSpec, cancel_fd: int) -> ExecResult:
    loop = Loop()
    try:
        command = Command(loop, 0, spec)
        try:
            result = _Result(loop)
            loop.watch(cancel_fd, selectors.EVENT_READ, lambda _: loop.stop())
            command.attach(result, stream=False, on_waited=lambda _: None)
            loop.run()
        finally:
            command.kill()
        return result.value or ExecResult(-signal.SIGKILL, b"", b"")  # cancelled: nobody reads it
    finally:
        loop.close()
