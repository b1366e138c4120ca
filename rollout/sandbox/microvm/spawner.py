"""The owner's side of the launcher: starts it inside its wall, and asks it for VMMs.

One launcher serves one engine. `spawn` may be called from many threads; requests take turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.errors import BootError
from rollout.sandbox.microvm import confinement, family, launcher, template
from rollout.sandbox.microvm.confinement import VIEW_FOLDER
from rollout.sandbox.microvm.family import EMPTY_FOLDER
from rollout.sandbox.microvm.launcher import MAX_PACKET_BYTES

__all__ = ["MAX_THREADS", "Child", "Spawner", "limits_for", "new_log"]

_REPLY_TIMEOUT_S = 30.0
_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/alternatives")
_FIRST_UID = 0x70000000
"""VMMs started by root get user ids from here up: above what distributions and user namespaces hand out."""
_NUM_UIDS = 1 << 19
"""Of single VMMs, and as many of families."""
_CAPABILITIES = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT")
"""The launcher's, to make namespaces and to give up what it has; a VMM has none."""
_VMM_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_VMM_DATA = ("/usr/share/qemu", "/usr/share/seabios", "/usr/lib/x86_64-linux-gnu/qemu", "/etc/ld.so.cache")
"""Firmware, and QEMU's own modules."""
MAX_THREADS = 96
"""QEMU's own few, and at most 64 that read disks."""
_MAX_FILE_BYTES = 64 << 20
_OWN_ADDRESS_SPACE_BYTES = 2 << 30
"""Beside the files that a VMM is given: programs, stacks, heaps, translated code; mostly never touched."""
_LAUNCHER_FOLDER = "/launcher"
_LAUNCHER_MODULES = (launcher, confinement, family, template)
_LAUNCH = f"import sys; sys.path.append({_LAUNCHER_FOLDER!r}); import {launcher.__name__} as it; it.main()"


@dataclass(slots=True)
class Child:
    """A started VMM.

    Attributes:
        pid: As this process sees it; safe to use while `pidfd` is open and the process has not been reaped.
        pidfd: Readable once the process has ended.
        log_fd: Memory file with its standard error.
        is_fork: It is a fork of a template, with which it shares memory that neither changes.
    """

    pid: int
    pidfd: int
    log_fd: int
    is_fork: bool

    @property
    def has_ended(self) -> bool:
        """The process is gone, or waits to be reaped."""
        poll = select.poll()  # not select: with many machines descriptors have large numbers
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def kill(self) -> None:
        """SIGKILL; no error when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def log(self) -> str:
        """The last line of its standard error."""
        lines = os.pread(self.log_fd, 1 << 16, 0).decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def close(self) -> None:
        """Closes the descriptors."""
        os.close(self.pidfd)
        os.close(self.log_fd)


class Spawner:
    """A running launcher.

    Args:
        read_only: Folders that VMMs may read, by their path inside.
        devices: Device files that they may use.
        programs: What is started, of which the libraries are shown too; nothing else of the host's is.

    Raises:
        BootError: bubblewrap is missing or may not make namespaces here.
    """

    def __init__(
        self,
        read_only: Mapping[str, Path],
        devices: Sequence[Path] = (),
        *,
        programs: Sequence[str | Path],
    ) -> None:
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise BootError("the microvm engine needs bubblewrap; install with: apt-get install bubblewrap")
        self._lock = threading.Lock()
        self._num_spawned = 0
        self._num_uids = secrets.randbelow(_NUM_UIDS)  # other engines on this machine begin elsewhere
        self._is_root = os.geteuid() == 0
        files = _files_of(programs)  # refused before anything is made
        self._nodes: tempfile.TemporaryDirectory[str] | None = None
        nodes = {device: device for device in devices}
        if self._is_root and devices:
            self._nodes = tempfile.TemporaryDirectory(prefix="rollout-nodes-")
            nodes = _own_nodes(devices, Path(self._nodes.name))
        wall = _wall(_view(read_only, nodes, files), as_root=self._is_root)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = subprocess.Popen(
                [bwrap, *wall],
                stdin=theirs.fileno(),
                stdout=self._log,
                stderr=self._log,
                env={
                    **{"PATH": "/usr/bin:/bin", "LANG": "C"},
                    **{"OWNER_UID": str(os.geteuid()), "OWNER_GID": str(os.getegid())},
                },
                start_new_session=True,
            )
        finally:
            theirs.close()
        self._control.settimeout(_REPLY_TIMEOUT_S)

    @property
    def pid(self) -> int:
        """The process outside of the namespace whose end is the launcher's."""
        return self._process.pid

    def spawn(
        self,
        argv: Sequence[str],
        fds: Sequence[int],
        limits: Mapping[str, int],
        *,
        from_template: bool = False,
    ) -> Child:
        """Starts a program with descriptors from `FIRST_FD` on, confined as `confinement` says.

        Args:
            argv: Program and arguments.
            fds: Descriptors; they stay open here.
            limits: Resource limits by their name in the `resource` module, instead of the usual ones.
            from_template: Fork it from a process that has loaded the program, where that works (see
                `rollout.sandbox.microvm.template`).

        Raises:
            BootError: The launcher is gone, or the process could not be made (`retryable`).
        """
        wanted = {"argv": list(argv), "limits": {**limits_for(fds), **limits}, "uid": self.new_uid()}
        return self._started({**wanted, "kind": "fork" if from_template else "program"}, fds)[0]

    def start_family(self, argv: Sequence[str], control: socket.socket) -> tuple[Child, int]:
        """Starts the first process of a family of VMMs (see `rollout.sandbox.microvm.family`).

        Args:
            argv: Program and arguments of its prototype.
            control: Its socket.

        Returns:
            The process, and the address of its buffer (see `rollout.sandbox.microvm.template`).

        Raises:
            BootError: As `spawn`; or templates do not work here.
        """
        wanted = {"argv": list(argv), "own_users": not self._is_root, "kind": "family"}
        child, reply = self._started(wanted, [control.fileno()])
        return child, reply["address"]

    def new_uid(self, *, is_family: bool = False) -> int | None:
        """A user id that no living VMM of this engine has, and most probably none of another.

        Args:
            is_family: It is for a family, which has many threads: the kernel counts those of a user together,
                so it is never one that another engine gives to a single VMM.

        Returns:
            The id; None where only the owner's can be had.
        """
        if not self._is_root:
            return None
        with self._lock:
            self._num_uids += 1
            first = _FIRST_UID + _NUM_UIDS if is_family else _FIRST_UID
            return first + self._num_uids % _NUM_UIDS

    def _started(self, wanted: dict[str, Any], fds: Sequence[int]) -> tuple[Child, dict[str, Any]]:
        log_fd = new_log()
        with self._lock:
            self._num_spawned += 1
            number = self._num_spawned
            request = json.dumps({**wanted, "number": number}).encode()
            try:
                if len(request) > MAX_PACKET_BYTES:
                    raise BootError("a VMM's arguments are too long")
                socket.send_fds(self._control, [request], [*fds, log_fd])
                reply, pidfds = self._answer_to(number)
            except (OSError, BootError) as error:
                os.close(log_fd)
                raise BootError(f"the VMM launcher is gone ({error}): {self._last_words()}") from error
        if not pidfds:
            os.close(log_fd)
            reason = reply["error"] if reply else self._last_words()
            raise BootError(f"cannot start a VMM: {reason}", retryable=True)
        self._remove_nodes()  # the launcher runs, so they are mounted, and nothing is left if we are killed
        is_fork = bool(reply.get("from_template", True))
        return Child(pid_of(pidfds[0]), pidfds[0], log_fd, is_fork), reply

    def _answer_to(self, number: int) -> tuple[dict[str, Any], list[int]]:
        """The answer to a request, and its descriptors; whatever a late one has started is ended."""
        while True:
            packet, pidfds, _, _ = socket.recv_fds(self._control, MAX_PACKET_BYTES, 1)
            for pidfd in pidfds:
                os.set_inheritable(pidfd, False)
            if not packet:
                return {}, pidfds
            answer = json.loads(packet)
            if answer["number"] == number:
                return answer, pidfds
            for pidfd in pidfds:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)

    def close(self) -> None:
        """Ends the launcher and with it every VMM; returns when they are gone. Idempotent."""
        self._control.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._remove_nodes()

    def _remove_nodes(self) -> None:
        nodes, self._nodes = self._nodes, None
        if nodes is not None:
            nodes.cleanup()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def new_log() -> int:
    """A memory file for a process's standard error.

    Raises:
        BootError: There are no descriptors left.
    """
    try:
        return os.memfd_create("vmm-log", os.MFD_CLOEXEC)
    except OSError as error:
        raise BootError(f"a VMM cannot be started: {error}", retryable=True) from error


def pid_of(pidfd: int) -> int:
    """The process id behind a pidfd, in this process's namespace; -1 once it has been reaped."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            return int(line.split()[1])
    raise BootError("this kernel does not tell the process id of a pidfd (it needs Linux 5.4 or later)")


def limits_for(fds: Sequence[int], num_threads: int = MAX_THREADS) -> dict[str, int]:
    """What a VMM may use: the memory that it is given as files, and a bounded amount beside."""
    states = [os.fstat(fd) for fd in fds]
    given_bytes = sum(state.st_size for state in states if stat.S_ISREG(state.st_mode))
    wanted = {
        "RLIMIT_AS": given_bytes + _OWN_ADDRESS_SPACE_BYTES,
        "RLIMIT_FSIZE": _MAX_FILE_BYTES,
        "RLIMIT_NPROC": num_threads,
        "RLIMIT_NOFILE": 256,
        "RLIMIT_CORE": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    # Nobody may raise a limit that this process is under itself.
    hard = {name: resource.getrlimit(getattr(resource, name))[1] for name in wanted}
    return {name: value if hard[name] < 0 else min(value, hard[name]) for name, value in wanted.items()}


def _own_nodes(devices: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Nodes of the same devices that any user may open, for VMMs that have users of their own.

    Raises:
        BootError: They cannot be made.
    """
    folder.chmod(0o700)
    nodes: dict[Path, Path] = {}
    for device in devices:
        nodes[device] = folder / device.name
        try:
            os.mknod(nodes[device], stat.S_IFCHR, device.stat().st_rdev)
            nodes[device].chmod(0o666)
        except OSError as error:
            raise BootError.wrap(error, f"cannot give VMMs the device {device}") from error
    return nodes


def _view(read_only: Mapping[str, Path], devices: Mapping[Path, Path], files: Sequence[str]) -> list[str]:
    """Arguments of bubblewrap: the root folder of VMMs."""
    shown = {path: path for path in (*_VMM_DATA, *files)}
    shown |= {inside: str(path) for inside, path in read_only.items()}
    binds = [part for inside, path in shown.items() for part in ("--ro-bind-try", path, VIEW_FOLDER + inside)]
    nodes = {str(path): str(path) for path in _VMM_DEVICES}
    nodes |= {str(inside): str(path) for inside, path in devices.items()}
    binds += [part for inside, path in nodes.items() for part in ("--dev-bind", path, VIEW_FOLDER + inside)]
    # Made first, for anyone to enter: those that a bind makes on its way are only root's.
    folders = {str(folder) for inside in (*shown, *nodes) for folder in Path(inside).parents}
    entered = [
        part
        for folder in sorted({*folders, EMPTY_FOLDER} - {"/"})
        for part in ("--dir", VIEW_FOLDER + folder)
    ]
    return ["--tmpfs", VIEW_FOLDER, *entered, *binds, "--proc", f"{VIEW_FOLDER}/proc"]


def _files_of(programs: Sequence[str | Path]) -> list[str]:
    """Paths of programs, of the libraries that they are linked to, and of the loader.

    Raises:
        BootError: A program is not there, or is none.
    """
    files: list[str] = []
    for program in programs:
        done = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BootError(f"cannot start {program}: {(done.stderr or done.stdout).strip()}")
        files += [str(program), *re.findall(r"(/\S+) \(0x", done.stdout)]
    return list(dict.fromkeys(files))


def _wall(view: Sequence[str], *, as_root: bool) -> list[str]:
    """Arguments of bubblewrap: the launcher's namespaces, and all that it and its VMMs can see."""
    python = Path(sys.base_prefix)
    shown = [*_SYSTEM_FOLDERS, str(python)]
    binds = [part for path in shown for part in ("--ro-bind-try", path, path)]
    capabilities = [part for name in _CAPABILITIES for part in ("--cap-add", name)] if as_root else []
    return [
        *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *([] if as_root else ["--unshare-user"]),
        *("--as-pid-1", "--cap-drop", "ALL", *capabilities),
        *("--proc", "/proc", "--dev", "/dev", *binds, *view),
        *_launcher_binds(),
        *("--chdir", "/"),
        *("--remount-ro", VIEW_FOLDER, "--remount-ro", "/"),
        *("--", str(python / "bin" / _python_name())),
        *("-I", "-S", "-c", _LAUNCH),
    ]


def _launcher_binds() -> list[str]:
    """Shows the launcher its own modules, under their names, and nothing else of this package."""
    binds: list[str] = []
    for module in _LAUNCHER_MODULES:
        inside = f"{_LAUNCHER_FOLDER}/{module.__name__.replace('.', '/')}.py"
        binds += ["--ro-bind", str(module.__file__), inside]
    return binds


def _python_name() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"
