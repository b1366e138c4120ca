"""What is killed, hangs or lies ends in a typed error at once, and leaves nothing."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from process_helpers import (
    ROGUE,
    boot_rogue,
    is_alive,
    keepers,
    make_engine,
    namespace_pids,
    players,
    processes_below,
    run_code,
)

from rollout.errors import BootError, CheckpointError, ForkError, GuestError

pytestmark = pytest.mark.process

LONG_S = 600.0
"""Far beyond the test's own deadline: what passes has not waited for it."""
GONE_WITHIN_S = 10.0


async def fork_busy(engine):
    """Two clones, of which the first, whose processes are the older ones, is in the middle of a call."""
    checkpoint = await (await boot_rogue(engine)).checkpoint()
    [first] = await engine.fork(checkpoint)
    [second] = await engine.fork(checkpoint)
    await run_code(first, "memory['n'] = 1")
    call = asyncio.create_task(run_code(first, "import time; time.sleep(1000)", timeout_s=LONG_S))
    await asyncio.sleep(0.05)
    return first, second, call


@pytest.mark.parametrize("victim", ["player", "keeper"])
async def test_a_process_killed_in_the_middle_of_a_call(victim):
    async with make_engine() as engine:
        first, second, call = await fork_busy(engine)
        by_kind = {"player": players(engine), "keeper": keepers(engine)}[victim]
        by_kind[-2].send_signal(signal.SIGKILL)
        with pytest.raises(GuestError, match=r"ended|closed"):
            await call
        with pytest.raises(GuestError):
            await first.call("ping")
        with pytest.raises(GuestError):
            await first.checkpoint()
        assert await run_code(second, "result = 'fine'") == "fine"
        assert (await engine.ask("stats"))["sandboxes"] == 2
        assert engine.num_sandboxes == 2


@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(3)",
        "import os; os.abort()",
        "import ctypes; ctypes.string_at(8)",
        "import os; os.close(3); import time; time.sleep(1000)",
        "import os; os.closerange(3, 100); import time; time.sleep(1000)",
    ],
)
async def test_an_environment_that_ends_its_process_or_loses_its_channel(code):
    async with make_engine() as engine:
        _, second, call = await fork_busy(engine)
        with pytest.raises(GuestError, match=r"ended|closed"):
            await run_code(second, code, timeout_s=LONG_S)
        assert not call.done()
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call


async def test_garbage_from_the_guest_kills_it():
    async with make_engine() as engine:
        _, second, call = await fork_busy(engine)
        before = len(players(engine))
        garbage = "import os; os.write(3, b'\\xff' * 1000); import time; time.sleep(1000)"
        with pytest.raises(GuestError, match="garbage"):
            await run_code(second, garbage, timeout_s=LONG_S)
        assert len(players(engine)) == before - 1
        assert engine.num_sandboxes == 2
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call


async def test_silence_ends_at_the_deadline_and_the_guest_is_killed():
    async with make_engine(checkpoint_timeout_s=0.3, fork_timeout_s=5) as engine:
        sandbox = await boot_rogue(engine)
        with pytest.raises(GuestError, match="did not answer") as raised:
            await run_code(sandbox, "import time; time.sleep(1000)", timeout_s=0.3)
        assert raised.value.retryable
        assert players(engine) == []
        assert engine.num_sandboxes == 0
        another = await boot_rogue(engine)
        await run_code(
            another, "import signal, time; signal.signal(signal.SIGALRM, lambda *_: time.sleep(1000))"
        )
        await run_code(another, "import signal; signal.setitimer(signal.ITIMER_REAL, 0.05)")
        await asyncio.sleep(0.2)
        with pytest.raises(CheckpointError):
            await another.checkpoint()


async def test_a_checkpoint_whose_process_is_gone_cannot_be_cloned():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        checkpoint = await sandbox.checkpoint()
        keepers(engine)[-1].kill()
        with pytest.raises((CheckpointError, ForkError)):
            await engine.fork(checkpoint)
        with pytest.raises(CheckpointError, match="no checkpoint"):
            await engine.fork(checkpoint)
        assert await run_code(await boot_rogue(engine), "result = 'fine'") == "fine"


@pytest.mark.parametrize("victim", ["bubblewrap", "server", "template"])
async def test_the_end_of_the_fork_server_ends_every_process_and_every_call(victim):
    async with make_engine() as engine:
        first, second, call = await fork_busy(engine)
        checkpoint = await second.checkpoint()
        below = processes_below(engine)
        (server,) = [process for process in below if namespace_pids(process)[1:] == [1]]
        assert engine.server_pid is not None
        pid = {"bubblewrap": engine.server_pid, "server": server.pid, "template": keepers(engine)[0].pid}[
            victim
        ]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(GuestError):
            await call
        await wait_until_gone(below)
        with pytest.raises((ForkError, CheckpointError)):
            await engine.fork(checkpoint)
        with pytest.raises(BootError):
            await engine.boot()
        await engine.discard(checkpoint)
        await first.kill()


async def test_a_fork_server_that_hangs_is_not_waited_for():
    async with make_engine(fork_timeout_s=0.5) as engine:
        sandbox = await boot_rogue(engine)
        checkpoint = await sandbox.checkpoint()
        below = processes_below(engine)
        (server,) = [process for process in below if namespace_pids(process)[1:] == [1]]
        server.suspend()
        with pytest.raises(ForkError, match="not ready within"):
            await engine.fork(checkpoint)
    await wait_until_gone(below)


@pytest.mark.parametrize("arguments", [[], ["--fork"]])
def test_nothing_outlives_a_killed_owner(arguments):
    owner = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("process_owner.py")), *arguments],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{ROGUE.parent}:{os.environ.get('PYTHONPATH', '')}"},
    )
    with owner:
        assert owner.stdout is not None
        about = json.loads(owner.stdout.readline())
        below = [psutil.Process(pid) for pid in about["below"]]
        assert len(below) > 10
        forked = [process for process in below if process.cmdline()[:2] == owner_command(owner)]
        owner.kill()
    try:
        asyncio.run(wait_until_gone([process for process in below if process not in forked]))
    finally:
        for process in forked:
            process.kill()


def owner_command(owner):
    return [str(part) for part in owner.args[:2]]


async def wait_until_gone(processes):
    deadline_s = time.monotonic() + GONE_WITHIN_S
    while alive := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline_s, alive
        await asyncio.sleep(0.02)
