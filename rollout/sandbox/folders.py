"""Files and folders that go into a sandbox and come out of it, through `tar` in the guest.

Both directions are streams with an archive on the host's disk between: the host never holds more than a few
MiB of it in memory, and the guest never holds a copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from rollout.errors import GuestError
from rollout.sandbox import archives
from rollout.sandbox.commands import PART_BYTES, Chunk, Command, GuestCommands
from rollout.types import ExecResult

__all__ = ["GuestFolders"]

_MAX_COMPLAINT_BYTES = 2000


class GuestFolders(GuestCommands):
    """What sandboxes with a guest agent share: background commands, and folders of the host."""

    async def upload(
        self, source: Path, path: str, *, timeout_s: float = 600.0, max_bytes: int = archives.MAX_BYTES
    ) -> None:
        """Copies a file or folder of the host into the sandbox; see `Sandbox.upload`."""
        is_folder = await asyncio.to_thread(source.is_dir)
        parent, name = (path, ".") if is_folder else _split(path)
        with tempfile.TemporaryFile() as archive:
            await asyncio.to_thread(archives.pack, source, name, archive, max_bytes=max_bytes)
            await self._run(["mkdir", "-p", "--", parent], f"cannot upload to {path!r}")
            archive.seek(0)
            tar = ["tar", "-x", "-p", "-o", "-f", "-", "-C", parent]
            command = await self.spawn(tar, keep_stdin_open=True, timeout_s=timeout_s)
            try:
                await _feed(command, archive)
                result = await command.wait()
            except BaseException:
                await asyncio.shield(_end(command))
                raise
        _require_success(result, f"cannot upload to {path!r}")

    async def download(
        self,
        path: str,
        target: Path,
        *,
        timeout_s: float = 600.0,
        max_bytes: int = archives.MAX_BYTES,
        max_entries: int = archives.MAX_ENTRIES,
    ) -> None:
        """Copies a file or folder of the sandbox to the host; see `Sandbox.download`."""
        parent, name = _split(path)
        member = name if name == "." else f"./{name}"
        with tempfile.TemporaryFile() as archive:
            complaints = bytearray()
            is_full = asyncio.Event()

            def take(chunk: Chunk) -> None:
                if chunk.stream == "stderr":
                    complaints.extend(chunk.data[: _MAX_COMPLAINT_BYTES - len(complaints)])
                elif archive.tell() + len(chunk.data) > max_bytes:
                    is_full.set()
                else:
                    archive.write(chunk.data)

            tar = ["tar", "-c", "-f", "-", "-C", parent, member]
            command = await self.spawn(tar, timeout_s=timeout_s)
            guard = asyncio.create_task(_kill_when(is_full, command))
            try:
                result = await command.hear(take)
            finally:
                guard.cancel()
                await asyncio.wait([guard])
            if is_full.is_set():
                raise GuestError(f"cannot download {path!r}: it is longer than {max_bytes} bytes")
            _require_success(replace(result, stderr=bytes(complaints)), f"cannot download {path!r}")
            try:
                await asyncio.to_thread(
                    archives.unpack, archive, name, target, max_bytes=max_bytes, max_entries=max_entries
                )
            except GuestError as error:
                raise GuestError(f"cannot download {path!r}: {error.message}") from error

    async def _run(self, argv: Sequence[str], context: str) -> None:
        async with self.using() as client:
            _require_success(await client.exec(argv), context)


async def _kill_when(event: asyncio.Event, command: Command) -> None:
    await event.wait()
    with contextlib.suppress(GuestError):  # it has ended meanwhile
        await command.kill()


async def _feed(command: Command, archive: IO[bytes]) -> None:
    """Gives a command all of a file; a command that takes no more says why when it is waited for."""
    with contextlib.suppress(GuestError):
        while part := archive.read(PART_BYTES):
            await command.write(part)
        await command.write(b"", close=True)


async def _end(command: Command) -> None:
    with contextlib.suppress(GuestError):  # then the sandbox has ended, or the command has
        await command.kill()
        await command.wait()


def _split(path: str) -> tuple[str, str]:
    """The folder that a path lies in and its name there; `.` for a folder that has none."""
    if not path or "\0" in path:
        raise GuestError(f"{path!r} is not a path")
    parent, name = posixpath.split(posixpath.normpath(path))
    return (path, ".") if name in ("", ".", "..") else (parent or ".", name)


def _require_success(result: ExecResult, context: str) -> None:
    if result.exit_code:
        reason = "it took too long" if result.timed_out else _complaint(result.stderr)
        raise GuestError(f"{context}: {reason or f'exit code {result.exit_code}'}")


def _complaint(stderr: bytes) -> str:
    """The first line, which may be anything, made printable."""
    line = stderr[:_MAX_COMPLAINT_BYTES].decode(errors="replace").strip().split("\n")[0]
    return "".join(char if char.isprintable() else "?" for char in line)
