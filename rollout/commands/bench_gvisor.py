"""What a microVM stands beside: a sandbox of gVisor, saved and restored by gVisor itself.

Measured where its program `runsc` is on the path, and by root only. What is in the sandbox is this Python
with numpy and gymnasium imported, waiting for a signal; its root folder is the host's own, read-only, without
a network. A guest of ours without an episode has imported the same, but is not the same: it holds an agent
and a Linux kernel, too. Figures are of whole commands of `runsc`, as whoever uses gVisor runs them.

Run as a program (`python -m rollout.commands.bench_gvisor SAMPLES FOLDER`): it measures, and prints one JSON
object. `measure_gvisor` starts it in a process namespace of its own, so that nothing of it is left when it
ends, or when who started it does, however that happens; a sandbox of gVisor is nobody's child.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rollout.commands.bench_rival import private_mib
from rollout.errors import BootError

__all__ = ["GvisorFigures", "GvisorRival", "measure_gvisor"]

_PLATFORM = "ptrace"
_MAX_SAMPLES = 10
_BUDGET_S = 60.0
"""After this long no further sample is begun."""
_DEADLINE_S = 60.0
"""Of one command, and of one answer of the program in the sandbox."""
_SETTLE_S = 1.0
_PROGRAM = """
import signal
import gymnasium, numpy
signal.signal(signal.SIGUSR1, lambda *_: print("again", flush=True))
print("ready", flush=True)
while True:
    signal.pause()
"""


@dataclass(frozen=True, slots=True)
class GvisorFigures:
    """What was measured; one value for each sample.

    Attributes:
        checkpoint_ms: The command that saves the sandbox, which stands still meanwhile and then ends.
        restore_ms: The command that makes a new sandbox of that, which runs when it returns.
        private_mib: Private memory of all processes of a restored sandbox that has answered, and idles.
        file_mib: What was saved.
        version: Of runsc.
    """

    checkpoint_ms: tuple[float, ...]
    restore_ms: tuple[float, ...]
    private_mib: tuple[float, ...]
    file_mib: float
    version: str

    @classmethod
    def parse(cls, text: str) -> GvisorFigures:
        """Reads what the program printed.

        Raises:
            BootError: It is something else.
        """
        try:
            found = json.loads(text)
            return cls(
                checkpoint_ms=tuple(map(float, found["checkpoint_ms"])),
                restore_ms=tuple(map(float, found["restore_ms"])),
                private_mib=tuple(map(float, found["private_mib"])),
                file_mib=float(found["file_mib"]),
                version=str(found["version"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BootError.wrap(error, f"gVisor: no figures in {text[:200]!r}") from error

    @property
    def note(self) -> str:
        """What was measured, in words."""
        return f"gVisor {self.version} on {_PLATFORM}: Python with numpy and gymnasium imported, idle"


@dataclass(slots=True)
class GvisorRival:
    """Figures of gVisor, which are measured when somebody first asks."""

    samples: int
    _found: GvisorFigures | str | None = field(default=None, init=False)

    def figures(self) -> GvisorFigures | str:
        """The figures, or why there are none."""
        if self._found is None:
            try:
                self._found = measure_gvisor(self.samples)
            except (BootError, OSError) as error:
                self._found = str(error)
        return self._found


def measure_gvisor(samples: int) -> GvisorFigures:
    """Saves and restores sandboxes one after the other, at most 10 times or for about a minute.

    Raises:
        BootError: runsc is not installed, this is not root, or something did not come up in time.
    """
    if shutil.which("runsc") is None:
        raise BootError("gVisor is not installed: there is no runsc on the path")
    if os.geteuid() != 0:
        raise BootError("gVisor is measured by root only")
    with tempfile.TemporaryDirectory(prefix="rollout-gvisor-") as folder:
        alone = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"]
        program = [sys.executable, "-m", __name__, str(min(samples, _MAX_SAMPLES)), folder]
        try:
            done = subprocess.run(
                [*alone, "--mount-proc", *program],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_BUDGET_S + 4 * _DEADLINE_S,
            )  # fmt: skip
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            raise BootError.wrap(error, "gVisor") from error
    if done.returncode:
        complaint = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise BootError(f"gVisor: {complaint[0][:300]}")
    return GvisorFigures.parse(done.stdout)


def main(samples: int, folder: Path) -> None:
    """The program."""
    version = subprocess.run(["runsc", "--version"], capture_output=True, text=True, check=True).stdout
    sandboxes = _Sandboxes(folder)
    measured: list[Mapping[str, float]] = []
    give_up_at_s = time.monotonic() + _BUDGET_S
    while len(measured) < samples and (not measured or time.monotonic() < give_up_at_s):
        measured.append(sandboxes.save_and_restore(len(measured)))
    series = {name: [each[name] for each in measured] for name in measured[0] if name != "file_mib"}
    file_mib = statistics.median(each["file_mib"] for each in measured)
    print(json.dumps({**series, "file_mib": file_mib, "version": version.split("\n")[0].split()[-1]}))


class _Sandboxes:
    """Sandboxes of gVisor, of which at most one lives."""

    def __init__(self, folder: Path) -> None:
        self._root, self._bundle = folder / "root", folder / "bundle"
        self._folder = folder
        self._root.mkdir()
        self._bundle.mkdir()
        (self._bundle / "config.json").write_text(json.dumps(_config()))

    def save_and_restore(self, number: int) -> dict[str, float]:
        """One sample: a sandbox is made and saved, and another is made of it."""
        first, second, image = f"first-{number}", f"second-{number}", self._folder / "image"
        image.mkdir()
        try:
            self._start("run", first)
            self._wait_for(first, "ready")
            checkpoint_ms = self._run("checkpoint", "--image-path", str(image), first)
            self._end(first)
            restore_ms = self._start("restore", second, "--image-path", str(image))
            self._run("kill", second, str(int(signal.SIGUSR1)))
            self._wait_for(second, "again")
            time.sleep(_SETTLE_S)
            memory_mib = sum(private_mib(process.pid) for process in self._processes())
            file_mib = sum(path.stat().st_size for path in image.iterdir()) / (1 << 20)
        finally:
            self._end(first)
            self._end(second)
            shutil.rmtree(image)
        return {
            "checkpoint_ms": checkpoint_ms,
            "restore_ms": restore_ms,
            "private_mib": memory_mib,
            "file_mib": file_mib,
        }

    def _start(self, command: str, name: str, *more: str) -> float:
        return self._run(
            command, "--detach", "--bundle", str(self._bundle), *more, name, output=self._output(name)
        )

    def _output(self, name: str) -> Path:
        return self._folder / f"{name}.out"

    def _run(self, *words: str, output: Path | None = None) -> float:
        """Milliseconds that a command took.

        A sandbox keeps the output of the command that made it, so that goes to a file.

        Raises:
            BootError: It failed, or took too long.
        """
        argv = [
            "runsc",
            f"--root={self._root}",
            f"--platform={_PLATFORM}",
            "--network=none",
            "--ignore-cgroups",
        ]
        complaints = self._folder / "complaints"
        start_s = time.perf_counter()
        with (output or Path(os.devnull)).open("wb") as stdout, complaints.open("wb") as stderr:
            try:
                code = subprocess.run(
                    [*argv, *words],
                    env={"PATH": os.environ["PATH"]},  # not $TMPDIR, which gVisor's user may not enter
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    timeout=_DEADLINE_S,
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise BootError(f"runsc {words[0]} took more than {_DEADLINE_S:g} s") from error
        took_ms = (time.perf_counter() - start_s) * 1000
        if code:
            complaint = " ".join(complaints.read_text(errors="replace").split())[-200:]
            raise BootError(f"runsc {words[0]} failed: {complaint or f'exit code {code}'}")
        return took_ms

    def _wait_for(self, name: str, word: str) -> None:
        give_up_at_s = time.monotonic() + _DEADLINE_S
        while word not in self._output(name).read_text(errors="replace"):
            if time.monotonic() > give_up_at_s:
                raise BootError(f"the program in the sandbox did not say {word!r} in time")
            time.sleep(0.005)

    def _end(self, name: str) -> None:
        """Ends a sandbox, if it was made, and waits until its processes are gone."""
        with contextlib.suppress(BootError):  # there is none of that name
            self._run("delete", "--force", name)
        processes = self._processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=_DEADLINE_S)

    def _processes(self) -> list[psutil.Process]:
        """The sandbox, the process that opens files for it, and those that run its threads."""
        own = [each for each in psutil.process_iter() if f"--root={self._root}" in _argv(each)]
        return [*own, *(child for process in own for child in process.children(recursive=True))]


def _argv(process: psutil.Process) -> Sequence[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended meanwhile
        return ()


def _config() -> dict[str, Any]:
    """The sandbox as an OCI runtime bundle describes it (runtime-spec, `config.md`)."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": "/",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": [sys.executable, "-c", _PROGRAM],
            "env": [f"{name}={value}" for name, value in environment.items()],
            "cwd": "/",
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "root": {"path": "/", "readonly": True},
        "hostname": "gvisor",
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]},
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
