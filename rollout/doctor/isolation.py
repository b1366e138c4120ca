"""Probes of what separates sandboxes: user namespaces, bubblewrap, control groups."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rollout.doctor.finding import Finding, Status
from rollout.sandbox.control_groups import MountedGroup, mounted_groups

__all__ = ["bubblewrap", "control_groups", "isolation_findings", "user_namespaces"]

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
