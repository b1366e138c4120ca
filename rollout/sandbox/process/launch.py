"""Starts the fork server in its namespaces, with bubblewrap.

What the server and its sandboxes see of this machine is read-only and as little as Python needs: `/usr`, the
interpreter, its installed packages, and this package. Root first becomes an unprivileged user that owns
nothing, so that no wall is root's.

Not seen: home folders, the working directory, modules that are found only through it, `/etc` apart from the
dynamic linker's, and every device but null, zero, full, random and urandom.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from rollout.errors import BootError
from rollout.sandbox.process.seccomp import filter_program
from rollout.sandbox.process.server import SCRATCH
from rollout.sandbox.process.walls import WORK, Limits

__all__ = ["Launched", "as_unprivileged_user", "launch", "path_inside"]

_PACKAGE = Path(__file__).resolve().parents[2]
_LIBRARY = "/opt/rollout"
_HOST_TMP = "/opt/host-tmp"
"""Where sandboxes see what Python needs of this machine's /tmp: a virtual environment, say."""
_DEVICES = ("null", "zero", "full", "random", "urandom")
_SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_CONFIGURATION = (
    "/etc/alternatives",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
)
_LINKS = {
    "/proc/self/fd": "/dev/fd",
    "/proc/self/fd/0": "/dev/stdin",
    "/proc/self/fd/1": "/dev/stdout",
    "/proc/self/fd/2": "/dev/stderr",
    f"{WORK}/.tmp": "/tmp",
    f"{WORK}/.shm": "/dev/shm",
}
_NAMESPACES = ("user", "pid", "net", "ipc", "uts")
_FIRST_USER, _NUM_USERS = 61184, 4336
"""The range that systemd keeps for services without a user of their own."""

_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
    "HOME": WORK,
    "USER": "sandbox",
    "LOGNAME": "sandbox",
    "SHELL": "/bin/sh",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    # a second thread would be lost in every clone
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    # equal seeds give equal episodes, even where an environment iterates over a set
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "SDL_VIDEODRIVER": "dummy",
    "SDL_AUDIODRIVER": "dummy",
    "MPLBACKEND": "Agg",
}


@dataclass(frozen=True, slots=True)
class Launched:
    """A fork server that has been started and not yet said that it is ready.

    Attributes:
        process: bubblewrap; killing it kills the server and everything below.
        control: Connection to the server; blocking.
        complaints: What bubblewrap and the interpreter write to standard error; an unlinked file.
    """

    process: subprocess.Popen[bytes]
    control: socket.socket
    complaints: IO[bytes]


def launch(limits: Limits, python_path: Sequence[Path] = ()) -> Launched:
    """Starts a fork server.

    Args:
        limits: Of every sandbox.
        python_path: Folders with further modules that sandboxes can import.

    Raises:
        BootError: bubblewrap is missing, or cannot be started.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise BootError("the process engine needs bubblewrap; run: apt-get install bubblewrap")
    for folder in python_path:
        if not folder.is_dir():
            raise BootError(f"engine.python_path: there is no folder {folder}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    complaints = tempfile.TemporaryFile()  # noqa: SIM115  (the connection closes it)
    owner = os.pidfd_open(os.getpid())
    program = _in_memory(filter_program())
    try:
        outer = as_unprivileged_user(bwrap, python_path)
        package = Path(_LIBRARY, _PACKAGE.name) if outer else _PACKAGE
        command = [
            *outer,
            *_inner_bwrap(bwrap, program, package, python_path, is_nested=bool(outer)),
            *(str(path_inside(Path(sys.executable))), "-s", "-m", "rollout.sandbox.process.server"),
            *(str(theirs.fileno()), str(owner), json.dumps(asdict(limits))),
        ]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            pass_fds=(theirs.fileno(), owner, program),
            env=_ENVIRONMENT | {"PYTHONPATH": ":".join([_LIBRARY, *map(str, map(path_inside, python_path))])},
            start_new_session=True,  # an interrupt from the keyboard is the engine's to handle
        )
    except OSError as error:
        ours.close()
        complaints.close()
        raise BootError(f"bubblewrap cannot be started: {error}") from error
    finally:
        theirs.close()
        os.close(owner)
        os.close(program)
    return Launched(process, ours, complaints)


def as_unprivileged_user(bwrap: str, python_path: Sequence[Path]) -> list[str]:
    """For root: a first bubblewrap, which can reach what root can, then another user. Otherwise nothing.

    Raises:
        BootError: setpriv is missing.
    """
    if os.geteuid() != 0:
        return []
    user = str(_FIRST_USER + os.getpid() % _NUM_USERS)
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise BootError("the process engine, run as root, needs setpriv; run: apt-get install util-linux")
    return [
        *(bwrap, "--die-with-parent", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"),
        *_view(_PACKAGE, python_path, is_nested=False),
        *("--bind", "/proc", "/proc", "--dev-bind", "/dev", "/dev"),
        *("--dir", "/tmp", "--"),
        *(setpriv, "--reuid", user, "--regid", user, "--clear-groups", "--pdeathsig", "KILL", "--"),
    ]


def _inner_bwrap(
    bwrap: str, program_fd: int, package: Path, python_path: Sequence[Path], *, is_nested: bool
) -> list[str]:
    arguments = [bwrap, "--die-with-parent", "--as-pid-1", "--cap-add", "ALL", "--seccomp", str(program_fd)]
    arguments += [f"--unshare-{name}" for name in _NAMESPACES]
    arguments += _view(package, python_path, is_nested=is_nested)
    arguments += ["--proc", "/proc", "--dir", "/dev"]
    for name in _DEVICES:
        arguments += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for target, link in _LINKS.items():
        arguments += ["--symlink", target, link]
    arguments += ["--dir", WORK, "--dir", SCRATCH, "--chdir", "/", "--remount-ro", "/", "--"]
    return arguments


def path_inside(path: Path) -> Path:
    """Where sandboxes see a path of this machine: at the same path, but for /tmp, which is their own."""
    return Path(_HOST_TMP, *path.parts[2:]) if path.is_relative_to("/tmp") else path


def _view(package: Path, python_path: Sequence[Path], *, is_nested: bool) -> list[str]:
    """Arguments that show what Python needs, read-only.

    Args:
        package: Where our package is.
        python_path: Folders with further modules.
        is_nested: Another bubblewrap with this view is around this one.
    """
    arguments: list[str] = ["--ro-bind", "/usr", "/usr"]
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            arguments += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    made = {Path("/")}
    for path in [*map(Path, _CONFIGURATION), *_python_folders(), *python_path]:
        if path.exists() and not path.is_relative_to("/usr"):
            arguments += _bind(path_inside(path) if is_nested else path, path_inside(path), made)
    return arguments + _bind(package, Path(_LIBRARY, _PACKAGE.name), made)


def _bind(source: Path, target: Path, made: set[Path]) -> list[str]:
    """Binds a path; the folders above it are made by hand, or bubblewrap gives them the source's modes."""
    arguments: list[str] = []
    for parent in reversed(target.parents):
        if parent not in made:
            made.add(parent)
            arguments += ["--dir", str(parent)]
    made.add(target)
    return [*arguments, "--ro-bind", str(source), str(target)]


def _python_folders() -> list[Path]:
    """The interpreter's folders and its installed packages', without those inside another."""
    folders = {
        Path(folder).absolute()
        for folder in (
            sys.base_prefix,
            sys.base_exec_prefix,
            sys.prefix,
            sys.exec_prefix,
            sysconfig.get_path("stdlib"),
            sysconfig.get_path("purelib"),
            sysconfig.get_path("platlib"),
            *site.getsitepackages(),
        )
    }
    return sorted(folder for folder in folders if not any(parent in folders for parent in folder.parents))


def _in_memory(data: bytes) -> int:
    fd = os.memfd_create("filter", os.MFD_CLOEXEC)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
