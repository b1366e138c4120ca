"""The walls of a process sandbox, from inside; each beside the same code where that wall is not."""

import ast
import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from process_helpers import MIB, ROGUE, boot_rogue, make_engine, players, run_code

from rollout.errors import EnvError, GuestError
from rollout.sandbox.process.walls import Limits

pytestmark = pytest.mark.process


def run_outside(code: str) -> str:
    """Runs the same kind of code in an ordinary process of this machine."""
    script = f"import rogue_env\nenv = rogue_env.RogueEnv()\nprint(env.step({code!r})[0])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROGUE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def secret_in_home():
    path = Path.home() / f".rollout-test-secret-{os.getpid()}"
    path.write_text("the secret")
    yield path
    path.unlink()


async def test_files_of_this_machine_cannot_be_read(secret_in_home, tmp_path):
    (tmp_path / "other").write_text("the secret")
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        for path in (secret_in_home, tmp_path / "other"):
            code = f"result = open({str(path)!r}).read()"
            assert run_outside(code) == "the secret"
            with pytest.raises(EnvError, match="No such file"):
                await run_code(sandbox, code)
            assert (await sandbox.exec(["cat", str(path)])).exit_code == 1
        for path in ("/etc/shadow", "/etc/passwd", "/root/.bashrc", "/var", "/run", "/sys", "/dev/vda"):
            assert await run_code(sandbox, f"import os; result = os.path.exists({path!r})") == "False"


async def test_the_environment_variables_of_this_process_are_not_inherited(monkeypatch):
    monkeypatch.setenv("ROLLOUT_TEST_TOKEN", "the secret")
    code = "import os; result = os.environ.get('ROLLOUT_TEST_TOKEN')"
    assert run_outside(code) == "the secret"
    async with make_engine() as engine:
        assert await run_code(await boot_rogue(engine), code) == "None"


async def test_the_network_of_this_machine_cannot_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        port = server.getsockname()[1]
        name = f"\0rollout-test-{os.getpid()}"
        abstract.bind(name)
        abstract.listen()
        over_tcp = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5).close(); result = 'in'"
        over_unix = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({name!r}); result = 'in'"
        assert run_outside(over_tcp) == run_outside(over_unix) == "in"
        async with make_engine() as engine:
            sandbox = await boot_rogue(engine)
            for code in (over_tcp, over_unix):
                with pytest.raises(EnvError, match="Connection refused"):
                    await run_code(sandbox, code)
            with pytest.raises(EnvError, match="Network is unreachable"):
                await run_code(sandbox, "import socket; socket.create_connection(('192.0.2.1', 80), 5)")


async def test_siblings_have_networks_and_shared_memory_of_their_own():
    listen = (
        "import socket; memory['s'] = socket.create_server(('127.0.0.1', 4000)); "
        "memory['u'] = socket.socket(socket.AF_UNIX); memory['u'].bind('\\0name'); memory['u'].listen()"
    )
    make_segment = "import ctypes; result = ctypes.CDLL(None).shmget(7, 4096, 0o1600)"
    async with make_engine() as engine:
        checkpoint = await (await boot_rogue(engine)).checkpoint()
        first, second = await engine.fork(checkpoint, 2)
        await run_code(first, listen)
        with pytest.raises(EnvError, match="Connection refused"):
            await run_code(second, "import socket; socket.create_connection(('127.0.0.1', 4000), 5)")
        await run_code(second, listen)  # the same port and name are free there
        connect = "import socket; socket.create_connection(('127.0.0.1', 4000), 5).close(); result = 'in'"
        assert await run_code(second, connect) == "in"
        made = [int(await run_code(sandbox, make_segment)) for sandbox in (first, second)]
        assert min(made) >= 0
        # exclusive creation: a second segment of one key is refused where the first can be seen
        assert int(await run_code(first, make_segment.replace("0o1600", "0o3600"))) == -1


async def test_siblings_cannot_be_seen_or_signalled():
    signal_all = (
        "import os, signal\n"
        "for pid in [-1, *range(2, 2000)]:\n"
        "    try: os.kill(pid, signal.SIGKILL)\n"
        "    except ProcessLookupError: pass\n"
        "result = 'done'"
    )
    async with make_engine() as engine:
        checkpoint = await (await boot_rogue(engine)).checkpoint()
        attacker, victim, parked = await engine.fork(checkpoint, 3)
        saved = await parked.checkpoint()
        await run_code(victim, "import subprocess; memory['child'] = subprocess.Popen(['sleep', '1000'])")
        seen = await run_code(
            attacker, "import os; result = [name for name in os.listdir('/proc') if name.isdigit()]"
        )
        assert seen == "['1']"
        assert await run_code(attacker, signal_all) == "done"
        assert await run_code(victim, "result = memory['child'].poll()") == "None"
        (clone,) = await engine.fork(saved)
        assert await run_code(clone, "result = 'alive'") == "alive"
        # without the wall: its own children are seen and die of the same code
        assert await run_code(victim, signal_all + "; result = memory['child'].wait()") == "-9"


async def test_inside_a_sandbox_all_of_that_works():
    """What the guard refuses to keepers is a sandbox's own business."""
    code = (
        "import fcntl, os, resource, signal, socket, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        "os.setpriority(os.PRIO_PROCESS, child.pid, 7)\n"
        "limits = resource.prlimit(child.pid, resource.RLIMIT_NOFILE, (64, 64))\n"
        "os.sched_setaffinity(child.pid, os.sched_getaffinity(0))\n"
        "with socket.socket() as s: fcntl.fcntl(s, fcntl.F_SETOWN, os.getpid())\n"
        "held = os.pidfd_open(child.pid)\n"
        "signal.pidfd_send_signal(held, signal.SIGTERM); os.close(held)\n"
        "result = os.getpriority(os.PRIO_PROCESS, child.pid), child.wait()"
    )
    async with make_engine() as engine:
        assert await run_code(await boot_rogue(engine), code) == "(7, -15)"


async def test_a_signal_to_the_process_group_stays_inside():
    code = (
        "import os, signal; signal.signal(signal.SIGUSR1, lambda *_: memory.__setitem__('heard', 'yes'))\n"
        "os.kill(0, signal.SIGUSR1); result = 'sent'"
    )
    async with make_engine() as engine:
        checkpoint = await (await boot_rogue(engine)).checkpoint()
        first, second = await engine.fork(checkpoint, 2)
        assert await run_code(first, code) == "sent"
        assert await run_code(first, "result = memory.get('heard')") == "yes"
        assert await run_code(second, "result = memory.get('heard')") == "None"


async def test_nothing_outside_its_folder_can_be_written(tmp_path):
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        for path in ("/file", "/usr/file", "/opt/file", "/home/file", "/proc/sys/kernel/hostname"):
            with pytest.raises(EnvError, match=r"Read-only|denied|not permitted"):
                await run_code(sandbox, f"open({path!r}, 'w').write('x')")
            with pytest.raises(GuestError, match=r"Read-only|denied|not permitted"):
                await sandbox.write_file(path, b"x")
        for path in ("here", "/tmp/file", "/dev/shm/file", "~/sub/file"):
            assert (await sandbox.exec(["sh", "-c", f"mkdir -p ~/sub && echo x > {path}"])).exit_code == 0
        assert run_outside(f"result = open({str(tmp_path / 'file')!r}, 'w').write('x')") == "1"


async def test_it_is_nobody_and_cannot_become_somebody():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        status = await run_code(sandbox, "result = open('/proc/self/status').read()")
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert {fields[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0000000000000000"}
        assert fields["NoNewPrivs"] == "1"
        assert fields["Seccomp"] == "2"
        assert (await sandbox.exec(["unshare", "-U", "true"])).exit_code == 1
        assert (await sandbox.exec(["mount", "-t", "tmpfs", "x", "/tmp"])).exit_code != 0
        assert (await sandbox.exec(["su", "-c", "true"])).exit_code != 0
        with pytest.raises(EnvError, match="Invalid argument"):  # there is no user 0 here
            await run_code(sandbox, "import os; os.setuid(0)")
        outside = players(engine)[-1].uids()
        assert outside.real == outside.effective == outside.saved != 0


async def test_it_cannot_reach_into_processes():
    trace_me = "import ctypes, os; lib = ctypes.CDLL(None, use_errno=True); result = lib.ptrace(0, 0, 0, 0)"
    assert run_outside(trace_me) == "0"
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        assert await run_code(sandbox, trace_me) == "-1"
        code = "import ctypes; result = ctypes.CDLL(None).syscall({}, 0, 0, 0, 0, 0, 0)"
        for number in (248, 250, 298, 308, 310, 321, 323, 425, 438):  # keys, setns, bpf, io_uring and so on
            assert await run_code(sandbox, code.format(number)) == "-1"


async def test_a_fork_bomb_is_limited_and_harms_no_sibling():
    bomb = (
        "import os, time\n"
        "memory['children'] = []\n"
        "try:\n"
        "    while len(memory['children']) < 500:\n"
        "        pid = os.fork()\n"
        "        if pid == 0: time.sleep(1000)\n"
        "        memory['children'].append(pid)\n"
        "except BlockingIOError: pass\n"
        "result = len(memory['children'])"
    )
    numbers = []
    for limit in (20, 60):
        async with make_engine(Limits(512 * MIB, num_processes=limit)) as engine:
            checkpoint = await (await boot_rogue(engine)).checkpoint()
            bomber, sibling = await engine.fork(checkpoint, 2)
            numbers.append(int(await run_code(bomber, bomb)))
            assert (await sibling.exec(["echo", "fine"])).stdout == b"fine\n"
            (another,) = await engine.fork(checkpoint)
            assert await run_code(another, "result = 'fine'") == "fine"
    assert numbers == [19, 59]  # and the environment's own process


async def test_memory_is_limited_and_the_sandbox_survives():
    async with make_engine(Limits(256 * MIB)) as engine:
        sandbox = await boot_rogue(engine)
        assert await run_code(sandbox, "result = len(bytes(16 << 20))") == str(16 << 20)
        with pytest.raises(EnvError, match="MemoryError"):
            await run_code(sandbox, "bytes(512 << 20)")
        with pytest.raises(EnvError, match=r"ValueError|not permitted"):
            await run_code(sandbox, "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))")
        assert await run_code(sandbox, "result = 'fine'") == "fine"


async def test_a_full_folder_is_an_error_and_its_siblings_folders_are_not_full():
    async with make_engine(Limits(512 * MIB, folder_bytes=4 * MIB, file_bytes=8 * MIB)) as engine:
        checkpoint = await (await boot_rogue(engine)).checkpoint()
        first, second = await engine.fork(checkpoint, 2)
        with pytest.raises(GuestError, match="No space left"):
            await first.write_file("large", bytes(6 * MIB))
        with pytest.raises(GuestError, match="No space left"):
            await first.write_file("/tmp/more", bytes(MIB))
        await second.write_file("small", bytes(2 * MIB))
        await first.exec(["rm", "large"])
        await first.write_file("small", bytes(2 * MIB))


async def test_a_keeper_that_is_taken_over_loses_only_its_own_sandbox():
    async with make_engine() as engine:
        checkpoint = await (await boot_rogue(engine)).checkpoint()
        attacker, victim = await engine.fork(checkpoint, 2)
        with pytest.raises(GuestError, match=r"protocol|closed the channel"):
            await run_code(attacker, "import os, time; os.write(4, b'?' * 100); time.sleep(1000)")
        assert await run_code(victim, "result = 'fine'") == "fine"
        await asyncio.gather(*(clone.kill() for clone in await engine.fork(checkpoint, 2)))
        assert (await engine.ask("stats"))["sandboxes"] == 2


TAKE_OVER = """
import errno, fcntl, os, resource, socket
from rollout.sandbox.process import keeper, syscalls

honest = keeper.Keeper._fork

def hostile(self, *arguments, **options):
    def attempt(name, what):
        try:
            memory[name] = what()
        except OSError as error:
            memory[name] = errno.errorcode[error.errno]
    attempt("pid", os.getpid)
    attempt("processes", lambda: [name for name in os.listdir("/proc") if name.isdigit()])
    attempt("layers", lambda: os.listdir("/scratch"))
    attempt("folders", lambda: os.listdir("/home/sandbox"))
    attempt("lift proc", lambda: syscalls.unmount("/proc"))
    attempt("mount proc", lambda: syscalls.mount("proc", "/home/sandbox", "proc", 0))
    attempt("write", lambda: open("/usr/file", "w"))
    attempt("remount", lambda: syscalls.mount("", "/usr", "", 32 | 4096))
    attempt("kill the template", lambda: os.kill(2, 9))
    attempt("kill all", lambda: os.kill(-1, 9))
    attempt("get hold of one", lambda: os.pidfd_open(2))
    attempt("slow all down", lambda: os.setpriority(os.PRIO_USER, 0, 19))
    attempt("limit one", lambda: resource.prlimit(2, resource.RLIMIT_NOFILE, (0, 0)))
    attempt("limit itself", lambda: resource.prlimit(0, resource.RLIMIT_CORE))
    with socket.socket() as signaller:
        attempt("let the kernel signal one", lambda: fcntl.fcntl(signaller, fcntl.F_SETOWN, 2))
    attempt("trace", lambda: syscalls._syscall("ptrace", NUMBER, 16, 1, 0, 0))
    attempt("become root", lambda: os.setuid(0))
    return honest(self, *arguments, **options)

keeper.Keeper._fork = hostile
"""


async def test_a_keeper_that_is_taken_over_reaches_neither_files_nor_processes():
    """What an environment writes into its memory, its keeper runs, outside of the sandbox's namespaces."""
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        sibling = await boot_rogue(engine)
        await sibling.write_file("secret", b"x")
        number = {"x86_64": "101", "aarch64": "117"}[os.uname().machine]
        await run_code(sandbox, TAKE_OVER.replace("NUMBER", number))
        (clone,) = await engine.fork(await sandbox.checkpoint())
        found = ast.literal_eval(await run_code(clone, "result = memory"))
        assert found.pop("pid") > 1  # it really ran there
        assert found == {
            "processes": [],
            "layers": [],
            "folders": [],
            "lift proc": "EINVAL",  # it is locked
            "mount proc": "EPERM",
            "write": "EROFS",
            "remount": "EPERM",
            "kill the template": "EPERM",
            "kill all": "EPERM",
            "get hold of one": "EPERM",
            "slow all down": "EPERM",
            "limit one": "EPERM",
            "limit itself": (0, 0),
            "let the kernel signal one": "EPERM",
            "trace": "EPERM",
            "become root": "EINVAL",
        }
        assert await sibling.read_file("secret") == b"x"
