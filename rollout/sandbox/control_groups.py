"""Control groups: where this process is in them, and groups of its own for the processes that it limits.

Both versions are known: version 2 with `cpu.max` and `memory.max`, version 1 with a quota and a limit in
hierarchies of their own. Reading is pure but for the files; `ControlGroups` makes and removes folders.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rollout.errors import BootError

__all__ = ["ControlGroups", "Group", "MountedGroup", "mounted_groups"]

_PERIOD_US = 20_000
"""Of processor quotas: short, so that a small share is not one long wait."""


@dataclass(frozen=True, slots=True)
class MountedGroup:
    """The control group of this process in one mounted hierarchy; `version` is 1 or 2."""

    version: int
    controllers: frozenset[str]
    folder: Path


def mounted_groups(proc: Path = Path("/proc")) -> list[MountedGroup]:
    """The own control group in every hierarchy that is mounted here; empty when that cannot be read."""
    try:
        mounts = (proc / "self/mountinfo").read_text().splitlines()
        memberships = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own_path: dict[frozenset[str], str] = {}
    for line in memberships:
        _, names, path = line.split(":", 2)
        own_path[frozenset(name for name in names.split(",") if name)] = path
    groups: list[MountedGroup] = []
    for line in mounts:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        mount_root, mount_point = fields[3], Path(fields[4])
        if kind[0] == "cgroup2":
            folder = _below(mount_point, mount_root, own_path.get(frozenset(), "/"))
            groups.append(MountedGroup(2, _controllers_of(folder), folder))
        elif kind[0] == "cgroup":
            options = frozenset(kind[2].split(","))
            names = next((names for names in own_path if names and names <= options), frozenset[str]())
            groups.append(MountedGroup(1, names, _below(mount_point, mount_root, own_path.get(names, "/"))))
    return groups


def _below(mount_point: Path, mount_root: str, path: str) -> Path:
    """Where the group `path` is, in a hierarchy of which `mount_root` is mounted (not "/" in a container)."""
    inside = path.removeprefix(mount_root) if path.startswith(mount_root) else path
    return mount_point / inside.lstrip("/")


def _controllers_of(folder: Path) -> frozenset[str]:
    try:
        return frozenset((folder / "cgroup.controllers").read_text().split())
    except OSError:
        return frozenset()


@dataclass(slots=True)
class Group:
    """One group of ours, in each hierarchy that matters.

    Attributes:
        folders: Its folder by controller, with the version of the hierarchy.
    """

    folders: dict[str, tuple[int, Path]]

    def add(self, pid: int) -> None:
        """Puts a process in, with all its threads.

        Raises:
            OSError: It has ended, or may not be moved.
        """
        for _, folder in set(self.folders.values()):
            (folder / "cgroup.procs").write_text(str(pid))

    def limit_cpu(self, share: float | None) -> None:
        """Processor time that it may use, as a part of one core; None for no limit.

        Raises:
            OSError: The kernel refuses.
        """
        version, folder = self.folders["cpu"]
        quota_us = None if share is None else max(1000, round(share * _PERIOD_US))
        if version == 2:
            (folder / "cpu.max").write_text(f"{'max' if quota_us is None else quota_us} {_PERIOD_US}")
            return
        (folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (folder / "cpu.cfs_quota_us").write_text(str(-1 if quota_us is None else quota_us))

    def limit_memory(self, max_bytes: int) -> None:
        """Memory that it may use; beyond it the kernel ends a process of the group.

        Raises:
            OSError: The kernel refuses.
        """
        version, folder = self.folders["memory"]
        (folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")).write_text(str(max_bytes))

    def remove(self) -> bool:
        """Removes its folders; False while a process is in it."""
        for _, folder in set(self.folders.values()):
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                return False
        return True


@dataclass(slots=True)
class ControlGroups:
    """Groups below the own one, for the processes of one engine.

    Attributes:
        parents: The folder that groups are made in, by controller, with the version of the hierarchy.
    """

    parents: dict[str, tuple[int, Path]]
    _num_made: int = 0
    _leaving: list[Group] = field(default_factory=list[Group])

    @classmethod
    def make(cls, controllers: Sequence[str], mounted: Sequence[MountedGroup] | None = None) -> ControlGroups:
        """Makes a parent for groups with these controllers ("cpu", "memory").

        Raises:
            BootError: This process may not; the message says which controller, and what to do.
        """
        mounted = mounted_groups() if mounted is None else mounted
        name = f"rollout-{os.getpid()}-{secrets.token_hex(4)}"
        parents: dict[str, tuple[int, Path]] = {}
        try:
            for controller in controllers:
                group = next((group for group in mounted if controller in group.controllers), None)
                if group is None:
                    raise OSError(f"no hierarchy with {controller} is mounted")
                folder = group.folder / name
                folder.mkdir(exist_ok=True)
                parents[controller] = (group.version, folder)
                if group.version == 2:
                    (group.folder / "cgroup.subtree_control").write_text(f"+{controller}")
                    (folder / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError as error:
            cls(parents).close()
            raise BootError(
                f"limits of {' and '.join(controllers)} need a control group that this process may divide "
                f"({error}); run as root or under `systemd-run --user --scope -p Delegate=yes`, or unset them"
            ) from error
        return cls(parents)

    def new(self) -> Group:
        """A group without a process.

        Raises:
            OSError: It cannot be made.
        """
        self._sweep()
        self._num_made += 1
        name = str(self._num_made)
        group = Group({key: (version, folder / name) for key, (version, folder) in self.parents.items()})
        for _, folder in set(group.folders.values()):
            folder.mkdir()
        return group

    def leave(self, group: Group) -> None:
        """Takes a group of which the processes end; it is removed once they have."""
        self._leaving.append(group)
        self._sweep()

    def close(self) -> None:
        """Removes what is empty by now. Idempotent."""
        self._sweep()
        for _, folder in set(self.parents.values()):
            with contextlib.suppress(OSError):  # a process that ends late keeps its group, and nothing else
                folder.rmdir()

    def _sweep(self) -> None:
        self._leaving = [group for group in self._leaving if not group.remove()]
