"""Probes of what separates sandboxes: user namespaces, bubblewrap, control groups."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout.doctor.finding import Finding, Status

__all__ = ["bubblewrap", "control_groups", "isolation_findings", "mounted_groups", "user_namespaces"]

_PROBE_TIMEOUT_S = 10.0
_WANTED_CONTROLLERS = ("cpu", "memory", "pids")


def isolation_findings() -> list[Finding]:
    """All probes of this module."""
    return [user_namespaces(), bubblewrap(), control_groups()]


def user_namespaces() -> Finding:
    """Makes every namespace that a process sandbox lives in, and runs a program there."""
    name = "user namespaces"
    remedy = "sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=16384"
    flags = ("--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork")
    try:
        problem = _try_command(["unshare", *flags, "true"])
    except FileNotFoundError:
        return Finding(name, Status.WARN, "not tried: there is no unshare", "apt-get install util-linux")
    if problem:
        apparmor = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
        if apparmor.exists() and apparmor.read_text().strip() == "1":
            remedy = "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
        return Finding(name, Status.MISSING, f"refused: {problem}", remedy, ("process",))
    return Finding(name, Status.OK, "work: user, mount, pid, net, ipc and uts made")


def bubblewrap() -> Finding:
    """Starts a program inside the wall of the process engine."""
    name = "bubblewrap"
    if shutil.which("bwrap") is None:
        return Finding(name, Status.MISSING, "not installed", "apt-get install bubblewrap", ("process",))
    version = _first_line(["bwrap", "--version"])
    problem = _try_command(
        ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "true"]
    )
    if problem:
        return Finding(
            name, Status.MISSING, f"{version}, refused: {problem}", "see user namespaces", ("process",)
        )
    return Finding(name, Status.OK, f"{version}, works")


@dataclass(frozen=True, slots=True)
class MountedGroup:
    """The control group of this process in one mounted hierarchy; `version` is 1 or 2."""

    version: int
    controllers: frozenset[str]
    folder: Path


def control_groups(proc: Path = Path("/proc")) -> Finding:
    """Tries to make, and removes again, a group below the own one in each hierarchy that matters."""
    name = "control groups"
    weaker = "sandboxes then have only per-process limits; run as root, or under `systemd-run --user --scope`"
    groups = mounted_groups(proc)
    versions = sorted({group.version for group in groups})
    if not groups:
        return Finding(name, Status.WARN, "none mounted", weaker)
    usable: list[str] = []
    refused: list[str] = []
    for controller in _WANTED_CONTROLLERS:
        group = next((g for g in groups if controller in g.controllers), None)
        if group is not None and _may_create_group(group):
            usable.append(f"{controller} (v{group.version})")
        else:
            refused.append(controller)
    mounted = "v" + "+v".join(str(version) for version in versions)
    if refused:
        have = f"may make groups for {', '.join(usable)}; " if usable else ""
        return Finding(name, Status.WARN, f"{mounted}: {have}not for {', '.join(refused)}", weaker)
    return Finding(name, Status.OK, f"{mounted}: may make groups for {', '.join(usable)}")


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


def _may_create_group(group: MountedGroup) -> bool:
    trial = group.folder / f"rollout-doctor-{os.getpid()}"
    try:
        trial.mkdir()
    except OSError:
        return False
    trial.rmdir()
    return True


def _try_command(argv: Sequence[str]) -> str:
    """Empty when the command succeeds, otherwise why not, in one line.

    Raises:
        FileNotFoundError: There is no such program.
    """
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end after {_PROBE_TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit {done.returncode}"


def _first_line(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown version"
    return (done.stdout.decode(errors="replace").splitlines() or ["unknown version"])[0]
