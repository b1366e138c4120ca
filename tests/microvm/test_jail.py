"""The jail from inside: programs that are started as VMMs are try what no VMM may.

Each attempt is made twice by the same program: in the jail, where it must fail, and outside of it, where it
must succeed; so that no attempt fails for a reason of its own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from interpreters import DEADLINE_S, LIBRARY, MEMORY_BYTES, PYTHON, StoppedInterpreter, interpreter_files

from rollout.errors import BootError
from rollout.sandbox.microvm.confinement import FIRST_FD
from rollout.sandbox.microvm.spawner import Child, Spawner

pytestmark = [
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
]
PRELUDE = """
import ctypes, os, resource, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""


def probe(attempt: str) -> str:
    """A program that says on standard error what came of an attempt: one line of JSON."""
    indented = "\n".join(f"    {line}" for line in attempt.splitlines())
    return (
        f"{PRELUDE}\nimport json\ntry:\n{indented}\n    answer = {{'done': True}}\n"
        "except BaseException as error:\n"
        "    answer = {'error': type(error).__name__, 'errno': getattr(error, 'errno', None)}\n"
        "os.write(2, json.dumps(answer).encode())\n"
    )


@pytest.fixture(scope="module")
def python_files() -> list[Path]:
    return interpreter_files()


class ForkingSpawner(Spawner):
    """One whose processes all come from templates."""

    def spawn(
        self,
        argv: Sequence[str],
        fds: Sequence[int],
        limits: Mapping[str, int],
        *,
        from_template: bool = True,
    ) -> Child:
        child = super().spawn(argv, fds, limits, from_template=from_template)
        assert child.is_fork == (argv[0] == str(PYTHON))
        return child


class FamilySpawner(Spawner):
    """One whose processes are forks of an interpreter that has run."""

    is_half_started = False

    def __init__(self, read_only: Mapping[str, Path], *, programs: Sequence[str | Path]) -> None:
        super().__init__(read_only, programs=programs)
        self._interpreter = StoppedInterpreter(self, "pass", is_half_started=self.is_half_started)

    def spawn(
        self,
        argv: Sequence[str],
        fds: Sequence[int],
        limits: Mapping[str, int],
        *,
        from_template: bool = True,
    ) -> Child:
        if argv[0] != str(PYTHON):
            return super().spawn(argv, fds, limits, from_template=from_template)
        return self._interpreter.fork(argv[-1], fds, limits)

    @property
    def prototype(self) -> Child:
        return self._interpreter.child

    def close(self) -> None:
        self._interpreter.close()
        super().close()


class HalfStartedSpawner(FamilySpawner):
    """One whose processes are forks of an interpreter that has yet to open what it needs."""

    is_half_started = True


KINDS = {
    "executed": Spawner,
    "forked": ForkingSpawner,
    "family": FamilySpawner,
    "half started": HalfStartedSpawner,
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def spawner(request: pytest.FixtureRequest, python_files: list[Path]) -> Iterator[Spawner]:
    spawner = request.param({str(LIBRARY): LIBRARY}, programs=python_files)
    yield spawner
    spawner.close()


@pytest.fixture
def memory_fd() -> Iterator[int]:
    """What stands for guest memory."""
    fd = os.memfd_create("memory")
    os.ftruncate(fd, MEMORY_BYTES)
    yield fd
    os.close(fd)


def ended(child: Child) -> dict[str, Any]:
    """What a probe said, once it has ended."""
    try:
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0], "the probe hangs"
        # Where no thread can be made, the C library may have the last word.
        return json.JSONDecoder().raw_decode(os.pread(child.log_fd, 1 << 16, 0).decode())[0]
    finally:
        child.kill()
        child.close()


def in_jail(spawner: Spawner, attempt: str, fds: list[int]) -> dict[str, Any]:
    return ended(spawner.spawn([str(PYTHON), "-I", "-S", "-c", probe(attempt)], fds, {}))


def outside(attempt: str) -> dict[str, Any]:
    done = subprocess.run(
        [PYTHON, "-I", "-S", "-c", probe(attempt)], stderr=subprocess.PIPE, timeout=DEADLINE_S, check=False
    )
    return json.loads(done.stderr.splitlines()[-1])


ATTEMPTS = {
    "read a file of the host": "open(SECRET).read()",
    "read the host's accounts": "open('/etc/passwd').read()",
    "read a parent's environment": "open(f'/proc/{os.getppid() or OWNER}/environ', 'rb').read()",
    "write beside its files": "open('/tmp/rt-jail-probe', 'w').close(); os.unlink('/tmp/rt-jail-probe')",
    "open an internet socket": "socket.socket(socket.AF_INET).close()",
    "open a Unix socket": "socket.socket(socket.AF_UNIX).close()",
    "connect to a port of the host": "socket.create_connection(('127.0.0.1', PORT), 5).close()",
    "make a pair of sockets": "socket.socketpair()[0].close()",
    "fork": "pid = os.fork() or os._exit(0)\nos.waitpid(pid, 0)",
    "make a process by posix_spawn": "pid = os.posix_spawn(sys.executable, [sys.executable, '-c', ''], {})\n"
    "os.waitpid(pid, 0)",
    "signal another process": "os.kill(SIBLING, 0)",
    "trace another process": "checked(libc.ptrace(16, SIBLING, 0, 0))",
    "make a user namespace": "checked(libc.unshare(0x10000000))",
    "set up io_uring": "import struct\nchecked(libc.syscall(425, 4, ctypes.create_string_buffer(120)))",
    "grow a file": "fd = os.memfd_create('x')\nos.truncate(fd, 100 << 20)",
    "take memory": "import mmap\nmmap.mmap(-1, 3 << 30).close()",
    "open many files": "fds = [os.dup(1) for _ in range(300)]",
}


@pytest.fixture
def sibling() -> Iterator[int]:
    """Another process of the host's."""
    process = subprocess.Popen(["sleep", "60"])
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("name", ATTEMPTS)
def test_what_no_vmm_may(
    spawner: Spawner, memory_fd: int, sibling: int, port: int, tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    secret.chmod(0o644)
    known = f"SECRET, SIBLING, PORT, OWNER = {str(secret)!r}, {sibling}, {port}, {os.getpid()}\n"
    assert outside(known + ATTEMPTS[name]) == {"done": True}, "the attempt fails without the jail too"
    refused = in_jail(spawner, known + ATTEMPTS[name], [memory_fd])
    assert "error" in refused, f"a VMM can {name}"
    assert refused["error"] in ("OSError", "PermissionError", "FileNotFoundError", "ProcessLookupError")


@contextlib.contextmanager
def waiting(spawner: Spawner, memory_fd: int) -> Generator[Path]:
    """A program that does nothing in the jail: what the host's `/proc` says about it."""
    program = f"{PRELUDE}\nos.write(2, b'waits')\nsignal.pause()"
    child = spawner.spawn([str(PYTHON), "-ISc", program], [memory_fd], {})
    try:
        give_up_at_s = time.monotonic() + DEADLINE_S
        while child.log() != "waits":
            assert time.monotonic() < give_up_at_s, child.log()
            time.sleep(0.005)
        yield Path(f"/proc/{child.pid}")
    finally:
        child.kill()
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0]
        child.close()


def status_of(process: Path) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())


def test_a_vmm_sees_only_itself_and_its_view(spawner: Spawner, memory_fd: int) -> None:
    needed = {"dev", "empty", "etc", "lib", "lib64", "proc", "usr", LIBRARY.parts[1], PYTHON.parts[1]}
    with waiting(spawner, memory_fd) as process:
        seen = {entry.name for entry in (process / "root").iterdir()}
        if isinstance(spawner, FamilySpawner) and not spawner.is_half_started:
            assert not seen
        else:
            assert seen <= needed
            assert {entry.name for entry in (process / "root/dev").iterdir()} == {"null", "urandom", "zero"}
        status = status_of(process)
        assert status["NSpid"].split()[-1] == "1"
        if os.geteuid() == 0:
            assert status["Groups"].split() == []
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[kind], 16) == 0, kind
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert status["Uid"].split()[0] != "0"
        mounts = [line.split()[1:4] for line in (process / "mounts").read_text().splitlines()]
        writable = {where for where, _, options in mounts if "ro" not in options.split(",")}
        assert writable <= {"/proc", "/dev/null", "/dev/urandom", "/dev/zero"}
        for kind in ("pid", "mnt", "ipc", "uts", "net", "cgroup"):
            own, hosts = ((each / "ns" / kind).readlink() for each in (process, Path("/proc/self")))
            assert own != hosts, f"it shares the host's {kind} namespace"


@pytest.mark.skipif(os.geteuid() != 0, reason="the kernel may refuse others a /proc of their own")
def test_a_vmm_sees_no_other_process(spawner: Spawner, memory_fd: int) -> None:
    attempt = """
found = [name for name in os.listdir('/proc') if name.isdigit()]
assert found == [os.readlink('/proc/self')], found
"""
    with waiting(spawner, memory_fd):
        answer = in_jail(spawner, attempt, [memory_fd])
    if isinstance(spawner, FamilySpawner) and not spawner.is_half_started:
        assert answer["error"] == "FileNotFoundError"
    else:
        assert answer == {"done": True}


def test_vmms_cannot_reach_each_other(spawner: Spawner, memory_fd: int) -> None:
    waits = [str(PYTHON), "-ISc", "import signal; signal.pause()"]
    victim = spawner.spawn(waits, [memory_fd], {})
    try:
        inside = [
            line for line in Path(f"/proc/{victim.pid}/status").read_text().splitlines() if "NSpid" in line
        ]
        in_launcher = int(inside[0].split()[-2])
        for pid in (in_launcher, victim.pid):
            for attempt in (f"os.kill({pid}, 9)", f"open('/proc/{pid}/mem', 'rb').read(1)"):
                assert "error" in in_jail(spawner, attempt, [memory_fd])
        assert not victim.has_ended
        signal.pidfd_send_signal(victim.pidfd, signal.SIGTERM)  # the control: who may, reaches it
        victim.kill()
        assert select.select([victim.pidfd], [], [], DEADLINE_S)[0]
    finally:
        victim.kill()
        victim.close()


def test_vmms_cannot_reach_each_other_as_a_group(spawner: Spawner, memory_fd: int) -> None:
    """Process groups reach over process id namespaces, and whoever is forked is in one with others."""
    attempts = """
def number_of(call, *arguments):
    return ctypes.get_errno() if libc.syscall(call, *arguments) < 0 else 0
found = [number_of(141, 1, 0, 19), number_of(251, 2, 0, (3 << 13) | 7)]  # setpriority, ioprio_set
os.write(2, json.dumps(found).encode())
os.kill(0, signal.SIGKILL)
"""
    with waiting(spawner, memory_fd) as victim:
        attacker = spawner.spawn(
            [str(PYTHON), "-ISc", f"{PRELUDE}\nimport json\n{attempts}"], [memory_fd], {}
        )
        try:
            assert select.select([attacker.pidfd], [], [], DEADLINE_S)[0]
            refused = json.JSONDecoder().raw_decode(os.pread(attacker.log_fd, 1 << 16, 0).decode())[0]
        finally:
            attacker.close()
        assert refused == [errno.EPERM] * 2
        time.sleep(0.05)  # the time in which a signal would end it
        assert status_of(victim)["State"].startswith("S")
    if isinstance(spawner, FamilySpawner):
        assert select.select([spawner.prototype.pidfd], [], [], 0)[0] == [], "nor what all are forked from"


def test_no_two_vmms_share_a_user(spawner: Spawner, memory_fd: int) -> None:
    """Each has a number of its own, or is alone in a user namespace."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(waiting(spawner, memory_fd)) for _ in range(3)]
        users = {((each / "ns/user").readlink(), status_of(each)["Uid"].split()[0]) for each in processes}
        assert len(users) == 3
        if os.geteuid() == 0:
            assert not {"0"} & {uid for _, uid in users}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has users to give")
def test_no_engine_gives_a_vmm_the_user_of_anothers_family(python_files: list[Path]) -> None:
    """The kernel counts a user's threads together: those of a large family would leave the VMM none."""
    spawners = [Spawner({str(LIBRARY): LIBRARY}, programs=python_files) for _ in range(2)]
    try:
        vmms, families = (
            [{each.new_uid(is_family=is_family) for _ in range(50)} for each in spawners]
            for is_family in (False, True)
        )
    finally:
        for each in spawners:
            each.close()
    assert max(uid or 0 for uids in vmms for uid in uids) < min(uid or 0 for uids in families for uid in uids)


def test_threads_are_limited(spawner: Spawner, memory_fd: int) -> None:
    attempt = (
        "import threading\nstop = threading.Event()\ncount = 0\n"
        "try:\n    while count < 300:\n        threading.Thread(target=stop.wait, daemon=True).start()\n"
        "        count += 1\nfinally:\n    stop.set()\n"
    )
    assert outside("resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n" + attempt) == {"done": True}
    assert in_jail(spawner, attempt, [memory_fd])["error"] == "RuntimeError"


def test_the_c_library_knows_the_threads_of_a_vmm(spawner: Spawner, memory_fd: int) -> None:
    # The clock of a thread's time is named after the id that the library has noted; a fork must note it anew.
    attempt = (
        "import threading, time\nclock = time.pthread_getcpuclockid(threading.get_ident())\n"
        "assert ~(clock >> 3) == threading.get_native_id()"
    )
    assert in_jail(spawner, attempt, [memory_fd]) == {"done": True}


def test_what_a_vmm_needs_works(spawner: Spawner, memory_fd: int) -> None:
    ours, theirs = socket.socketpair()
    attempt = (
        f"import mmap\nmmap.mmap({FIRST_FD}, {MEMORY_BYTES})[0] = 7\nos.urandom(8)\n"
        f"channel = socket.socket(fileno={FIRST_FD + 1})\nchannel.sendall(channel.recv(5))\n"
        "import threading\nthread = threading.Thread(target=os.getpid)\nthread.start()\nthread.join()"
    )
    with ours, theirs:
        ours.sendall(b"hello")
        assert in_jail(spawner, attempt, [memory_fd, theirs.fileno()]) == {"done": True}
        assert ours.recv(5) == b"hello"
    assert os.pread(memory_fd, 1, 0) == b"\x07"


def test_a_program_that_is_not_shown_is_not_started(spawner: Spawner, memory_fd: int) -> None:
    child = spawner.spawn([shutil.which("cat") or "/bin/cat"], [memory_fd], {})
    try:
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0]
        assert "cannot start" in child.log()
    finally:
        child.close()
    with pytest.raises(BootError, match="no-such-program"):
        Spawner({}, programs=["/no-such-program"])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_end_of_the_launcher_is_the_end_of_its_vmms(
    python_files: list[Path], kind: type[Spawner]
) -> None:
    spawner = kind({str(LIBRARY): LIBRARY}, programs=python_files)
    child = spawner.spawn([str(PYTHON), "-ISc", "import signal; signal.pause()"], [], {})
    launcher = psutil.Process(child.pid).parent()
    if launcher is not None and issubclass(kind, FamilySpawner):
        launcher = launcher.parent()  # of the family's first process
    try:
        assert launcher is not None
        launcher.kill()
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0], "a VMM outlives its launcher"
        with pytest.raises(BootError, match="launcher is gone"):
            Spawner.spawn(spawner, [str(PYTHON)], [], {})
    finally:
        child.close()
        spawner.close()
