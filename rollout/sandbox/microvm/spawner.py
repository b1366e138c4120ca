"""The owner's side of the launcher: starts it inside its wall, and asks it for VMMs.

One launcher serves one engine. `spawn` may be called from many threads; requests take turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout.errors import BootError
from rollout.sandbox.microvm import launcher as launcher_module
from rollout.sandbox.microvm.launcher import MAX_PACKET_BYTES

__all__ = ["Child", "Spawner"]

_REPLY_TIMEOUT_S = 30.0
_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/alternatives")
_FIRST_UID = 0x70000000
"""VMMs started by root get user ids from here up: above what distributions and user namespaces hand out."""
_NUM_UIDS = 1 << 20
_CAPABILITIES = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")
_LAUNCHER_PATH = "/launcher.py"


@dataclass(slots=True)
class Child:
    """A started VMM.

    Attributes:
        pid: As this process sees it; safe to use while `pidfd` is open and the process has not been reaped.
        pidfd: Readable once the process has ended.
        log_fd: Memory file with its standard error.
    """

    pid: int
    pidfd: int
    log_fd: int

    @property
    def has_ended(self) -> bool:
        """The process is gone, or waits to be reaped."""
        return bool(select.select([self.pidfd], [], [], 0)[0])

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

    Raises:
        BootError: bubblewrap is missing or may not make namespaces here.
    """

    def __init__(self, read_only: Mapping[str, Path], devices: Sequence[Path] = ()) -> None:
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise BootError("the microvm engine needs bubblewrap; install with: apt-get install bubblewrap")
        self._lock = threading.Lock()
        self._num_spawned = 0
        self._is_root = os.geteuid() == 0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = subprocess.Popen(
                [bwrap, *_wall(read_only, devices, as_root=self._is_root)],
                stdin=theirs.fileno(),
                stdout=self._log,
                stderr=self._log,
                env={"PATH": "/usr/bin:/bin", "LANG": "C"},
                start_new_session=True,
            )
        finally:
            theirs.close()
        self._control.settimeout(_REPLY_TIMEOUT_S)

    @property
    def pid(self) -> int:
        """The process outside of the namespace whose end is the launcher's."""
        return self._process.pid

    def spawn(self, argv: Sequence[str], fds: Sequence[int], limits: Mapping[str, int]) -> Child:
        """Starts a program with descriptors from `FIRST_FD` on.

        Args:
            argv: Program and arguments.
            fds: Descriptors; they stay open here.
            limits: Resource limits by their name in the `resource` module.

        Raises:
            BootError: The launcher is gone, or the process could not be made (`retryable`).
        """
        log_fd = os.memfd_create("vmm-log", os.MFD_CLOEXEC)
        with self._lock:
            uid = _FIRST_UID + self._num_spawned % _NUM_UIDS if self._is_root else None
            self._num_spawned += 1
            request = json.dumps({"argv": list(argv), "limits": dict(limits), "uid": uid}).encode()
            try:
                if len(request) > MAX_PACKET_BYTES:
                    raise BootError("a VMM's arguments are too long")
                socket.send_fds(self._control, [request], [*fds, log_fd])
                reply, pidfds, _, _ = socket.recv_fds(self._control, MAX_PACKET_BYTES, 1)
            except (OSError, BootError) as error:
                os.close(log_fd)
                raise BootError(f"the VMM launcher is gone ({error}): {self._last_words()}") from error
        if not pidfds:
            os.close(log_fd)
            reason = json.loads(reply)["error"] if reply else self._last_words()
            raise BootError(f"cannot start a VMM: {reason}", retryable=True)
        return Child(_pid_of(pidfds[0]), pidfds[0], log_fd)

    def close(self) -> None:
        """Ends the launcher and with it every VMM; returns when they are gone. Idempotent."""
        self._control.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _pid_of(pidfd: int) -> int:
    """The process id behind a pidfd, in this process's namespace; -1 once it has been reaped."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            return int(line.split()[1])
    raise BootError("this kernel does not tell the process id of a pidfd (it needs Linux 5.4 or later)")


def _wall(read_only: Mapping[str, Path], devices: Sequence[Path], *, as_root: bool) -> list[str]:
    """Arguments of bubblewrap: the launcher's namespaces, and all that it and its VMMs can see."""
    python = Path(sys.base_prefix)
    shown = {**{path: path for path in (*_SYSTEM_FOLDERS, str(python))}, **read_only}
    binds = [part for inside, path in shown.items() for part in ("--ro-bind-try", str(path), inside)]
    nodes = [part for path in devices for part in ("--dev-bind", str(path), str(path))]
    capabilities = [part for name in _CAPABILITIES for part in ("--cap-add", name)] if as_root else []
    return [
        *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"),
        *([] if as_root else ["--unshare-user"]),
        *("--as-pid-1", "--cap-drop", "ALL", *capabilities),
        *("--proc", "/proc", "--dev", "/dev", *nodes, *binds),
        *("--ro-bind", launcher_module.__file__, _LAUNCHER_PATH, "--chdir", "/"),
        *("--", str(Path(sysconfig.get_path("scripts", vars={"base": str(python)})) / _python_name())),
        *("-I", "-S", _LAUNCHER_PATH),
    ]


def _python_name() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"
