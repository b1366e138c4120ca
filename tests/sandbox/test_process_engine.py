"""The process engine: checkpoints of any depth, what they hold, what they refuse, and failures half way."""

import asyncio
from dataclasses import replace

import pytest
from process_helpers import at_most_processes, boot_rogue, keepers, make_engine, run_code, server_of

from rollout.errors import CapacityError, CheckpointError, EnvError, ForkError, GuestError
from rollout.types import Randomness, RngPolicy

pytestmark = pytest.mark.process

_INHERIT = Randomness(RngPolicy.INHERIT)


async def test_a_sandbox_and_its_clones_go_on_from_the_checkpoint_each_for_itself():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        await run_code(sandbox, "memory['n'] = 1")
        checkpoint = await sandbox.checkpoint()
        first, second = await engine.fork(checkpoint, 2)
        await run_code(first, "memory['n'] += 10")
        await run_code(sandbox, "memory['n'] += 100")
        numbers = [await run_code(one, "result = memory['n']") for one in (sandbox, first, second)]
        assert numbers == ["101", "11", "1"]
        assert first.parent_id == second.parent_id == checkpoint.id
        assert checkpoint.parent_id is None


async def test_depth_is_not_limited_by_what_the_kernel_allows_to_nest():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        await run_code(sandbox, "memory['path'] = ''")
        for depth in range(40):  # pid and user namespaces nest 32 deep
            await run_code(sandbox, f"memory['path'] += '{depth},'; open('path', 'a').write('{depth},')")
            checkpoint = await sandbox.checkpoint()
            (clone,) = await engine.fork(checkpoint)
            await engine.discard(checkpoint)
            await sandbox.kill()
            sandbox = clone
        expected = "".join(f"{depth}," for depth in range(40))
        assert await run_code(sandbox, "result = memory['path']") == expected
        assert (await sandbox.read_file("path")).decode() == expected
        assert await engine.ask("stats") == {"sandboxes": 1, "checkpoints": 0, "keepers": 1, "has_overlay": 1}


async def test_a_checkpoint_outlives_its_sandbox_and_its_parent():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        first = await sandbox.checkpoint()
        (clone,) = await engine.fork(first)
        await run_code(clone, "memory['deep'] = 'yes'")
        second = await clone.checkpoint()
        await clone.kill()
        await sandbox.kill()
        await engine.discard(first)
        (again,) = await engine.fork(second)
        assert await run_code(again, "result = memory['deep']") == "yes"
        with pytest.raises(CheckpointError, match="no checkpoint"):
            await engine.fork(first)


async def test_saving_twice_without_a_change_holds_one_process():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        first, second = await sandbox.checkpoint(), await sandbox.checkpoint()
        assert (await engine.ask("stats"))["keepers"] == 1
        await engine.discard(first)
        (clone,) = await engine.fork(second)
        assert await run_code(clone, "result = 1") == "1"


async def test_an_exact_continuation_has_every_generator_of_its_checkpoint():
    draw = "import random, numpy; result = random.random(), numpy.random.random(), env.np_random.random()"
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        await run_code(sandbox, draw)
        checkpoint = await sandbox.checkpoint()
        clones = [*await engine.fork(checkpoint, 2, randomness=[_INHERIT, _INHERIT])]
        clones += await engine.fork(checkpoint, 2, randomness=[Randomness.seeded(5), Randomness.seeded(5)])
        clones += await engine.fork(checkpoint, 2)
        drawn = [await run_code(one, draw) for one in (sandbox, *clones)]
        own, inherited, also_inherited, seeded, also_seeded, unique, also_unique = drawn
        assert own == inherited == also_inherited
        assert seeded == also_seeded
        assert len({own, seeded, unique, also_unique}) == 4


async def test_the_memory_of_a_checkpoint_is_what_it_changed():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        await run_code(sandbox, "memory['blob'] = bytes(1 << 24)")
        root = await sandbox.checkpoint()
        small_clone, large_clone = await engine.fork(root, 2)
        small = await small_clone.checkpoint()
        await run_code(large_clone, "memory['more'] = b'x' * (1 << 23)")
        large = await large_clone.checkpoint()
        assert small.private_bytes < 6 << 20 < 8 << 20 <= large.private_bytes < 14 << 20
        assert root.private_bytes > 1 << 23


async def test_open_files_are_each_clones_own():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        await run_code(
            sandbox,
            "memory['log'] = open('log', 'w+'); memory['log'].write('ab'); memory['log'].flush()\n"
            "memory['module'] = open(__import__('os').__file__); memory['module'].readline()",
        )
        checkpoint = await sandbox.checkpoint()
        clones = [sandbox, *await engine.fork(checkpoint, 2)]
        read_a_line = "result = memory['module'].readline()"
        assert len({await run_code(clone, read_a_line) for clone in clones}) == 1
        for index, clone in enumerate(clones):
            await run_code(clone, f"memory['log'].write('{index}'); memory['log'].flush()")
        assert [await clone.read_file("log") for clone in clones] == [b"ab0", b"ab1", b"ab2"]


async def test_a_clone_can_wait_for_its_children():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        (clone,) = await engine.fork(await sandbox.checkpoint())
        for one in (sandbox, clone):
            code = "import subprocess; result = subprocess.Popen(['sh', '-c', 'exit 7']).wait()"
            assert await run_code(one, code) == "7"
            assert (await one.exec(["sh", "-c", "exit 7"])).exit_code == 7


async def test_the_working_folder_the_mask_and_signal_handlers_are_kept():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        await run_code(
            sandbox,
            "import os, signal; os.mkdir('sub'); os.chdir('sub'); os.umask(0o077)\n"
            "signal.signal(signal.SIGUSR1, lambda *_: memory.__setitem__('heard', 'yes'))",
        )
        (clone,) = await engine.fork(await sandbox.checkpoint())
        code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1); result = os.getcwd(), os.umask(0)"
        assert await run_code(clone, code) == f"('/home/sandbox/sub', {0o077})"
        assert await run_code(clone, "result = memory.get('heard')") == "yes"


@pytest.mark.parametrize(
    ("code", "undo", "reason"),
    [
        (
            "import threading; memory['stop'] = threading.Event(); "
            "memory['thread'] = threading.Thread(target=memory['stop'].wait); memory['thread'].start()",
            "memory['stop'].set(); memory['thread'].join()",
            "threads are running",
        ),
        (
            "import subprocess; memory['child'] = subprocess.Popen(['sleep', '1000'])",
            "memory['child'].kill(); memory['child'].wait()",
            r"background processes are running \(sleep\)",
        ),
        ("import os; memory['pipe'] = os.pipe()", "import os; [*map(os.close, memory['pipe'])]", "pipe"),
        (
            "import socket; memory['socket'] = socket.socket(socket.AF_UNIX)",
            "memory['socket'].close()",
            "socket",
        ),
        (
            "import mmap; memory['map'] = mmap.mmap(-1, 4096); memory['map'][0] = 1",
            "memory['map'].close()",
            "mapped shared",
        ),
        (
            "import tempfile; memory['file'] = tempfile.TemporaryFile()",
            "memory['file'].close()",
            "has no name",
        ),
    ],
)
async def test_what_a_forked_process_would_not_have_is_refused_and_the_sandbox_goes_on(code, undo, reason):
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        await run_code(sandbox, code)
        with pytest.raises(CheckpointError, match=reason):
            await sandbox.checkpoint()
        assert (await engine.ask("stats"))["checkpoints"] == 0
        await run_code(sandbox, undo)
        (clone,) = await engine.fork(await sandbox.checkpoint())
        assert await run_code(clone, "result = 'fine'") == "fine"


async def test_a_running_command_is_refused_and_a_finished_one_is_not():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        running = asyncio.create_task(sandbox.exec(["sh", "-c", "echo started > flag; sleep 1000"]))
        while b"started" not in (await sandbox.exec(["sh", "-c", "cat flag || true"])).stdout:
            pass
        with pytest.raises(CheckpointError, match="commands are running"):
            await sandbox.checkpoint()
        while (await sandbox.exec(["pkill", "sleep"])).exit_code != 0:
            pass  # the shell has yet to start it
        assert (await running).exit_code == -15 or (await running).exit_code == 143
        await sandbox.checkpoint()


async def test_hibernating_frees_all_processes_but_one_and_any_call_wakes():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        await run_code(sandbox, "memory['kept'] = 'yes'")
        awake = len(keepers(engine))
        await sandbox.hibernate()
        await sandbox.hibernate()
        assert len(keepers(engine)) == awake
        assert await run_code(sandbox, "result = memory['kept']") == "yes"
        await sandbox.hibernate()
        await sandbox.wake()
        await sandbox.wake()
        assert await run_code(sandbox, "result = memory['kept']") == "yes"


async def test_a_fork_that_fails_half_way_leaves_none():
    async with make_engine() as engine:
        with at_most_processes(12):  # what the engine itself has, and a few
            sandbox = await boot_rogue(engine)
        checkpoint = await sandbox.checkpoint()
        before = len(keepers(engine))
        with pytest.raises(ForkError, match="Resource temporarily unavailable"):
            await engine.fork(checkpoint, 8)
        while len(keepers(engine)) > before:  # a copy that has not reported yet finds out by itself
            await asyncio.sleep(0.01)
        assert engine.num_sandboxes == 1
        (clone,) = await engine.fork(checkpoint)
        assert await run_code(clone, "result = 'fine'") == "fine"


async def test_a_cancelled_fork_leaves_none():
    async with make_engine() as engine:
        checkpoint = await (await boot_rogue(engine)).checkpoint()
        for delay_s in (0.0, 0.002, 0.005, 0.01):
            forking = asyncio.create_task(engine.fork(checkpoint, 6))
            await asyncio.sleep(delay_s)
            forking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await forking
            assert engine.num_sandboxes == 1
            assert (await engine.ask("stats"))["sandboxes"] == 1
        while len(keepers(engine)) > 2:  # a copy that has not reported yet finds out by itself
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("late", ["server", "keeper"])
async def test_a_cancelled_checkpoint_leaves_none(late: str):
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        await run_code(sandbox, "memory['n'] = 1")
        process = server_of(engine) if late == "server" else keepers(engine)[-1]
        process.suspend()
        saving = asyncio.create_task(sandbox.checkpoint())
        async with asyncio.timeout(30):
            while not sandbox._is_parked:  # pyright: ignore[reportPrivateUsage]
                await asyncio.sleep(0.01)
        saving.cancel()
        await asyncio.sleep(0.01)  # now the server has been told, or will find it when it goes on
        process.resume()
        with pytest.raises(asyncio.CancelledError):
            await saving
        async with asyncio.timeout(30):
            while engine._server._pending:  # pyright: ignore
                await asyncio.sleep(0.01)
        assert await engine.ask("stats") == {"sandboxes": 1, "checkpoints": 0, "keepers": 1, "has_overlay": 1}
        assert await run_code(sandbox, "result = memory['n']") == "1"
        await sandbox.kill()
        assert (await engine.ask("stats"))["keepers"] == 0


async def test_more_clones_than_fit_one_message():
    async with make_engine() as engine:
        checkpoint = await (await boot_rogue(engine)).checkpoint()
        clones = await engine.fork(checkpoint, 260)
        assert await run_code(clones[-1], "result = 'last'") == "last"
        assert len({clone.id for clone in clones}) == 260


async def test_hundreds_of_checkpoints_are_held_and_any_of_them_can_be_cloned():
    async with make_engine() as engine:
        root = await (await boot_rogue(engine)).checkpoint()
        saved = []
        for start in range(0, 200, 8):
            clones = await engine.fork(root, 8)
            for number, clone in enumerate(clones, start):
                await run_code(clone, f"memory['number'] = {number}")
                saved.append(await clone.checkpoint())
            await asyncio.gather(*(clone.kill() for clone in clones))
        assert (await engine.ask("stats"))["checkpoints"] == 201
        for number in (0, 99, 199):
            (clone,) = await engine.fork(saved[number])
            assert await run_code(clone, "result = memory['number']") == str(number)


async def test_create_and_destroy_two_hundred_times_leaves_nothing():
    async with make_engine() as engine:
        checkpoint = await (await boot_rogue(engine)).checkpoint()
        processes = len(keepers(engine))
        server_fds = keepers(engine)[0].parent().num_fds()
        for _ in range(25):
            clones = await engine.fork(checkpoint, 8)
            saved = await clones[0].checkpoint()
            await asyncio.gather(*(clone.kill() for clone in clones))
            await engine.discard(saved)
        assert engine.num_sandboxes == 1
        assert (await engine.ask("stats"))["keepers"] == 1
        assert len(keepers(engine)) == processes
        assert keepers(engine)[0].parent().num_fds() == server_fds


async def test_bad_requests():
    async with make_engine(max_sandboxes=2) as engine, make_engine() as other:
        sandbox = await boot_rogue(engine)
        checkpoint = await sandbox.checkpoint()
        with pytest.raises(ValueError, match="0 clones"):
            await engine.fork(checkpoint, 0)
        with pytest.raises(ValueError, match="2 clones with 1"):
            await engine.fork(checkpoint, 2, randomness=[_INHERIT])
        with pytest.raises(CapacityError, match="more than 2"):
            await engine.fork(checkpoint, 2)
        with pytest.raises(CheckpointError, match="another process engine"):
            await other.fork(checkpoint)
        with pytest.raises(CheckpointError, match="inline engine"):
            await engine.fork(replace(checkpoint, engine="inline"))
        with pytest.raises(CheckpointError, match="no checkpoint"):
            await engine.fork(replace(checkpoint, id="altered"))
        await other.discard(checkpoint)
        await engine.discard(checkpoint)
        await engine.discard(checkpoint)
        with pytest.raises(EnvError, match="no environment is registered"):
            await sandbox.call("env.make", env_id="FrozenLak-v1")
        await sandbox.kill()
        await sandbox.kill()
        with pytest.raises(GuestError, match="killed"):
            await sandbox.call("ping")
        with pytest.raises(GuestError, match="killed"):
            await sandbox.checkpoint()


async def test_a_closed_engine_refuses_and_closing_twice_is_fine():
    engine = make_engine()
    await engine.close()
    engine = make_engine()
    sandbox = await boot_rogue(engine)
    checkpoint = await sandbox.checkpoint()
    await asyncio.gather(engine.close(), engine.close())
    with pytest.raises(ForkError, match="closed"):
        await engine.fork(checkpoint)
    with pytest.raises(GuestError):
        await sandbox.call("ping")
    await engine.discard(checkpoint)
    await sandbox.kill()


async def test_calls_at_once_with_a_checkpoint_wait_for_it():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        blob = bytes(range(256)) * (1 << 16)
        await sandbox.write_file("blob", blob)
        reading = asyncio.create_task(sandbox.read_file("blob"))  # several calls
        checkpoint, content, pinged = await asyncio.gather(
            sandbox.checkpoint(), reading, sandbox.call("ping")
        )
        assert content == blob
        assert pinged is None
        (clone,) = await engine.fork(checkpoint)
        assert await clone.read_file("blob") == blob
