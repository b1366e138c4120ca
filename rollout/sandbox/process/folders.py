"""The private folders of sandboxes: what one writes is its own, and its clones begin with it.

A sandbox writes into a memory file system (tmpfs) of its own, so that its limit is its own too. When the
sandbox is saved, what it has written becomes a layer that never changes again; a clone sees its ancestors'
layers through an overlay, with a fresh one on top. Where this kernel offers no overlay to a user namespace
(before Linux 5.11), or one that loses deletions (tmpfs without user attributes, before 6.6), a clone gets a
copy of the one layer below it instead.

Invariants:

- Nobody but the fork server sees the layers: a sandbox gets a mount that is attached nowhere, as a
  descriptor, and attaches it in its own mount namespace.
- A sandbox that has written nothing adds no layer, and costs nothing when it is saved.
- At most `MAX_LAYERS` layers lie below a sandbox, whatever its depth: one more, and all are made one.
- All is memory: nothing is left on a disk when the fork server dies, however it dies.

Not guaranteed: times of access and extended attributes in a layer that was copied or flattened.
"""

from __future__ import annotations

import itertools
import os
import stat
from dataclasses import dataclass

from rollout.sandbox.process import syscalls

__all__ = ["MAX_LAYERS", "Folder", "FolderStore", "Layer"]

MAX_LAYERS = 12
"""Below one sandbox. The kernel takes a list of layers of at most 255 bytes."""
SKELETON = (".tmp", ".shm")
"""Made in every folder: what `/tmp` and `/dev/shm` of a sandbox point to."""
_MAX_ENTRIES = 1 << 20


@dataclass(slots=True, eq=False)
class Layer:
    """A tmpfs that holds what one sandbox has written, in its folder `c`.

    Attributes:
        path: Where it is mounted.
        num_users: Checkpoints and sandboxes that need it.
    """

    path: str
    num_users: int = 0

    @property
    def content(self) -> str:
        """The folder with the files."""
        return f"{self.path}/c"


@dataclass(frozen=True, slots=True, eq=False)
class Folder:
    """The folder of one running sandbox.

    Attributes:
        lower: What it began with, oldest first.
        upper: What it writes.
    """

    lower: tuple[Layer, ...]
    upper: Layer


class FolderStore:
    """Makes, saves and frees folders.

    Args:
        root: An existing empty folder that nobody else uses, on a tmpfs of this process's own.
        limit_bytes: What one sandbox may write until it is saved.
    """

    def __init__(self, root: str, limit_bytes: int) -> None:
        self._root = root
        self._limit_bytes = limit_bytes
        self._numbers = itertools.count()
        self._view = f"{root}/view"
        os.mkdir(self._view)  # noqa: PTH102  (pathlib is not needed in the fork server)
        self.has_overlay = self._probe_overlay()

    def open(self, lower: tuple[Layer, ...]) -> tuple[Folder, int]:
        """Makes a folder on top of saved layers.

        Returns:
            The folder, and the descriptor of a mount of it that is attached nowhere; the caller closes it.

        Raises:
            OSError: No memory, or too many mounts; nothing is left of the attempt.
        """
        upper = self._new_layer()
        try:
            if not lower:
                for name in SKELETON:
                    os.mkdir(f"{upper.content}/{name}", 0o1777)  # noqa: PTH102
                mount_fd = syscalls.open_tree(upper.content)
            elif self.has_overlay:
                mount_fd = self._overlay(lower, upper)
            else:
                _copy_tree(lower[-1].content, upper.content)
                lower = ()
                mount_fd = syscalls.open_tree(upper.content)
        except OSError:
            self._remove(upper)
            raise
        folder = Folder(lower, upper)
        self.retain((*lower, upper))
        return folder, mount_fd

    def save(self, folder: Folder) -> tuple[Layer, ...]:
        """Turns the folder of a sandbox that has ended into layers, retained once for the caller.

        Raises:
            OSError: No memory to flatten them; the folder is as it was.
        """
        layers = folder.lower
        if not self._is_pristine(folder):
            layers = (*layers, folder.upper)
        if len(layers) > MAX_LAYERS:
            layers = (self._flatten(layers),)
        self.retain(layers)
        self.close(folder)
        return layers

    def close(self, folder: Folder) -> None:
        """Frees the folder of a sandbox that has ended."""
        self.release((*folder.lower, folder.upper))

    def retain(self, layers: tuple[Layer, ...]) -> None:
        """Counts one more user of layers."""
        for layer in layers:
            layer.num_users += 1

    def release(self, layers: tuple[Layer, ...]) -> None:
        """Counts one user less, and removes what has none left."""
        for layer in layers:
            layer.num_users -= 1
            if layer.num_users == 0:
                self._remove(layer)

    def _new_layer(self) -> Layer:
        layer = Layer(f"{self._root}/{next(self._numbers)}")
        os.mkdir(layer.path)  # noqa: PTH102
        try:
            options = f"mode=755,size={self._limit_bytes},nr_inodes={_MAX_ENTRIES}"
            syscalls.mount("tmpfs", layer.path, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, options)
        except OSError:
            os.rmdir(layer.path)  # noqa: PTH106
            raise
        os.mkdir(layer.content, 0o755)  # noqa: PTH102
        return layer

    def _remove(self, layer: Layer) -> None:
        syscalls.unmount(layer.path)
        os.rmdir(layer.path)  # noqa: PTH106

    def _overlay(self, lower: tuple[Layer, ...], upper: Layer | None) -> int:
        # the kernel wants the top layer first
        options: dict[str, str | None] = {"lowerdir": ":".join(layer.content for layer in reversed(lower))}
        if upper is not None:
            work = f"{upper.path}/w"
            os.mkdir(work)  # noqa: PTH102
            options |= {"upperdir": upper.content, "workdir": work}
        return syscalls.new_mount("overlay", {**options, "userxattr": None})

    def _is_pristine(self, folder: Folder) -> bool:
        """Nothing has been written since the folder was made."""
        expected = [] if folder.lower else sorted(SKELETON)
        content = folder.upper.content
        if sorted(os.listdir(content)) != expected:  # noqa: PTH208
            return False
        return not any(os.listdir(f"{content}/{name}") for name in expected)  # noqa: PTH208

    def _flatten(self, layers: tuple[Layer, ...]) -> Layer:
        flat = self._new_layer()
        empty = self._new_layer()  # an overlay without an upper layer needs two lower ones
        try:
            mount_fd = self._overlay((empty, *layers), None)
            try:
                syscalls.move_mount(mount_fd, self._view)
            finally:
                os.close(mount_fd)
            try:
                _copy_tree(self._view, flat.content)
            finally:
                syscalls.unmount(self._view)
        except OSError:
            self._remove(flat)
            raise
        finally:
            self._remove(empty)
        return flat

    def _probe_overlay(self) -> bool:
        """Whether an overlay works here and hides what is deleted below it, even if it is made again."""
        lower, upper = self._new_layer(), self._new_layer()
        try:
            os.makedirs(f"{lower.content}/folder/below")  # noqa: PTH103
            mount_fd = self._overlay((lower,), upper)
            try:
                syscalls.move_mount(mount_fd, self._view)
            finally:
                os.close(mount_fd)
            try:
                os.rmdir(f"{self._view}/folder/below")  # noqa: PTH106
                os.rmdir(f"{self._view}/folder")  # noqa: PTH106
                os.mkdir(f"{self._view}/folder")  # noqa: PTH102
                return not os.listdir(f"{self._view}/folder")  # noqa: PTH208
            finally:
                syscalls.unmount(self._view)
        except OSError:
            return False
        finally:
            self._remove(lower)
            self._remove(upper)


def _copy_tree(source: str, target: str) -> None:
    """Copies a folder's content into an existing folder: files, folders, links, pipes, modes and times.

    Device nodes and sockets are left out: a sandbox cannot make the former, and the latter are dead.
    """
    linked: dict[tuple[int, int], str] = {}
    with os.scandir(source) as entries:
        pending = [(entry.path, f"{target}/{entry.name}") for entry in entries]
    folders: list[tuple[str, os.stat_result]] = []
    while pending:
        old, new = pending.pop()
        status = os.lstat(old)
        kind = stat.S_IFMT(status.st_mode)
        key = status.st_dev, status.st_ino
        if key in linked and kind != stat.S_IFDIR:
            os.link(linked[key], new, follow_symlinks=False)
            continue
        if kind == stat.S_IFDIR:
            os.mkdir(new, 0o700)  # noqa: PTH102
            folders.append((new, status))
            with os.scandir(old) as entries:
                pending += [(entry.path, f"{new}/{entry.name}") for entry in entries]
        elif kind == stat.S_IFREG:
            _copy_file(old, new, status.st_size)
            _copy_status(new, status)
        elif kind == stat.S_IFLNK:
            os.symlink(os.readlink(old), new)  # noqa: PTH115, PTH211
        elif kind == stat.S_IFIFO:
            os.mkfifo(new)
            _copy_status(new, status)
        else:
            continue
        if status.st_nlink > 1:
            linked[key] = new
    for folder, status in reversed(folders):  # children first: filling a folder changes its times
        _copy_status(folder, status)


def _copy_file(source: str, target: str, size_bytes: int) -> None:
    reading = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            while size_bytes > 0 and (sent := os.sendfile(writing, reading, None, size_bytes)):
                size_bytes -= sent
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _copy_status(path: str, status: os.stat_result) -> None:
    os.chmod(path, stat.S_IMODE(status.st_mode))  # noqa: PTH101
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
