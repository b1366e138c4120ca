"""Folders that go in and out of the inline engine's sandboxes, which have no background commands."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from rollout.errors import GuestError
from rollout.sandbox import archives
from rollout.sandbox.commands import Command

__all__ = ["FolderTransfers"]


class FolderTransfers(ABC):
    """What an inline sandbox can do with folders of the host."""

    __slots__ = ()

    @abstractmethod
    def place(self, path: str) -> Path:
        """Where a path of the sandbox is on the host.

        Raises:
            GuestError: It leaves the sandbox's folder, or the sandbox is dead.
        """

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        keep_stdin_open: bool = False,
        timeout_s: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        max_output_bytes: int = 1 << 20,
    ) -> Command:
        """Refuses: see `Sandbox.spawn`."""
        self.place(".")
        raise GuestError(
            "the inline engine has no background commands: use the process or microvm engine, or exec"
        )

    async def commands(self) -> Sequence[Command]:
        """There are none; see `Sandbox.commands`."""
        self.place(".")
        return []

    async def upload(
        self, source: Path, path: str, *, timeout_s: float = 600.0, max_bytes: int = archives.MAX_BYTES
    ) -> None:
        """Copies a file or folder of the host into the sandbox's folder; see `Sandbox.upload`."""
        place = self.place(path)
        await asyncio.to_thread(_copy_in, source, place, max_bytes)

    async def download(
        self,
        path: str,
        target: Path,
        *,
        timeout_s: float = 600.0,
        max_bytes: int = archives.MAX_BYTES,
        max_entries: int = archives.MAX_ENTRIES,
    ) -> None:
        """Copies a file or folder of the sandbox's folder to the host; see `Sandbox.download`."""
        place = self.place(path)
        await asyncio.to_thread(_copy_out, place, target, max_bytes, max_entries)


def _copy_in(source: Path, place: Path, max_bytes: int) -> None:
    with tempfile.TemporaryFile() as archive:
        archives.pack(source, ".", archive, max_bytes=max_bytes)  # refuses what other engines would refuse
    try:
        if source.is_dir():
            shutil.copytree(source, place, symlinks=True, dirs_exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place)
    except OSError as error:
        raise GuestError(f"cannot upload {str(source)!r}: {error}") from error


def _copy_out(place: Path, target: Path, max_bytes: int, max_entries: int) -> None:
    with tempfile.TemporaryFile() as archive:
        archives.pack(place, ".", archive, max_bytes=max_bytes)
        archives.unpack(archive, ".", target, max_bytes=max_bytes, max_entries=max_entries)
