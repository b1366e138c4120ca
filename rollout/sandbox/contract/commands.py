"""What a sandbox does with commands and files."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from contextlib import aclosing
from pathlib import Path

from rollout.errors import CheckpointError, GuestError
from rollout.sandbox.base import Engine
from rollout.sandbox.contract.tools import (
    IMAGE,
    error_of,
    require,
)


async def check_boot(engine: Engine) -> None:
    """Fresh sandboxes answer, have no parent, unique ids, and are counted."""
    first, second = await engine.boot(IMAGE), await engine.boot(IMAGE)
    require(first.id != second.id, "ids are unique")
    require(first.parent_id is None, "a booted sandbox has no parent")
    require(engine.num_sandboxes == 2, "live sandboxes are counted")
    require(await first.call("ping") is None and await second.call("ping") is None, "both answer")


async def check_exec(engine: Engine) -> None:
    """Standard input, both outputs, exit codes, signals, environment and folder of a command."""
    sandbox = await engine.boot(IMAGE)
    echo = await sandbox.exec(["sh", "-c", "cat; echo oops >&2; exit 3"], stdin=b"\x00line\n" * 50_000)
    require(echo.stdout == b"\x00line\n" * 50_000, "standard input arrives whole, at any size")
    require(echo.stderr == b"oops\n", "standard error is kept apart")
    require(echo.exit_code == 3, "a non-zero exit is data")
    require(not (echo.timed_out or echo.stdout_truncated or echo.stderr_truncated), "and nothing else")
    killed = await sandbox.exec(["sh", "-c", "kill -TERM $$"])
    require(killed.exit_code == -15, "the end by signal N is exit code -N")
    greeting = await sandbox.exec(["sh", "-c", 'printf "$GREETING"'], env={"GREETING": "hello"})
    require(greeting.stdout == b"hello", "variables are added to the environment")
    await sandbox.write_file("folder/file", b"inside")
    inside = await sandbox.exec(["cat", "file"], cwd="folder")
    require(inside.stdout == b"inside", "a command starts in the folder that it is given")


async def check_exec_that_cannot_start(engine: Engine) -> None:
    """A command that does not exist is a `GuestError`, and the sandbox stays usable."""
    sandbox = await engine.boot(IMAGE)
    error = await error_of(sandbox.exec(["no-such-program"]), GuestError)
    require(not error.retryable, "the same command cannot start later either")
    await error_of(sandbox.exec(["true"], cwd="no/such/folder"), GuestError)
    require((await sandbox.exec(["true"])).exit_code == 0, "the sandbox stays usable")


async def check_exec_time_limit(engine: Engine) -> None:
    """The time limit kills a command's whole process group, and keeps what it wrote."""
    sandbox = await engine.boot(IMAGE)
    script = "echo begun; (sleep 600; echo late) & wait"
    late = await sandbox.exec(["sh", "-c", script], timeout_s=2.0)
    require(late.timed_out and late.exit_code == -9, "a time-out is data: flagged, and ended by SIGKILL")
    require(late.stdout == b"begun\n", "what was written before is kept")
    left = await sandbox.exec(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep 600'"])
    if engine.capabilities.isolates_files:  # where commands see the host's processes, others may sleep too
        require(int(left.stdout) <= 1, "its children are killed with it")  # the shell's own line counts


async def check_exec_output_limit(engine: Engine) -> None:
    """Output beyond the limit is cut and flagged, for each stream on its own, and the command goes on."""
    sandbox = await engine.boot(IMAGE)
    script = "i=0; while [ $i -lt 3000 ]; do echo 0123456789; i=$((i+1)); done; echo end >&2"
    cut = await sandbox.exec(["sh", "-c", script], max_output_bytes=100)
    require(cut.stdout == (b"0123456789\n" * 10)[:100], "the beginning is kept")
    require(cut.stdout_truncated and not cut.stderr_truncated, "each stream has its own flag")
    require(cut.stderr == b"end\n" and cut.exit_code == 0, "the command ran to its end")


async def check_cancelled_exec(engine: Engine) -> None:
    """A caller that goes away leaves a usable sandbox."""
    sandbox = await engine.boot(IMAGE)
    running = asyncio.ensure_future(sandbox.exec(["sleep", "2"]))
    await asyncio.sleep(0.2)
    running.cancel()
    await asyncio.wait([running])
    require((await sandbox.exec(["echo", "fine"])).stdout == b"fine\n", "the next call is answered")


async def check_files(engine: Engine) -> None:
    """Files of any content and size, their folders and modes; a missing one is an error and no more."""
    sandbox = await engine.boot(IMAGE)
    content = bytes(range(256)) * 80_000  # 20 MB: more than one part
    await sandbox.write_file("deep/er/data.bin", content)
    require(await sandbox.read_file("deep/er/data.bin") == content, "a file comes back as it was written")
    await sandbox.write_file("deep/er/data.bin", b"")
    require(await sandbox.read_file("deep/er/data.bin") == b"", "writing replaces the whole file")
    await sandbox.write_file("run.sh", b"#!/bin/sh\necho ran\n", mode=0o755)
    require((await sandbox.exec(["./run.sh"])).stdout == b"ran\n", "modes hold, and commands see the files")
    await error_of(sandbox.read_file("no/such/file"), GuestError)
    await error_of(sandbox.read_file("deep"), GuestError)
    await error_of(sandbox.write_file("run.sh/below", b""), GuestError)
    require(await sandbox.call("ping") is None, "the sandbox stays usable")


async def check_background_commands(engine: Engine) -> None:
    """A spawned command is heard while it runs, fed, signalled and waited for, where there are such."""
    sandbox = await engine.boot(IMAGE)
    if not engine.capabilities.background_commands:
        await error_of(sandbox.spawn(["true"]), GuestError)
        require(await sandbox.commands() == [], "who has no background commands has none to tell of")
        return
    script = 'echo "$WHO"; pwd >&2; while read line; do echo "got $line"; done; exit 7'
    await sandbox.write_file("folder/file", b"")
    echo = await sandbox.spawn(["sh", "-c", script], cwd="folder", env={"WHO": "me"}, keep_stdin_open=True)
    heard = {"stdout": b"", "stderr": b""}
    async with aclosing(echo.output()) as output:
        async for chunk in output:
            heard[chunk.stream] += chunk.data
            if chunk.stream == "stderr":
                continue
            if heard["stdout"] == b"me\n":
                require((await sandbox.exec(["echo", "meanwhile"])).exit_code == 0, "others run beside it")
                await echo.write(b"one\n")
            elif heard["stdout"] == b"me\ngot one\n":
                await echo.write(b"two\n", close=True)
    require(heard["stdout"] == b"me\ngot one\ngot two\n", "output comes while it runs, in answer to input")
    require(heard["stderr"].endswith(b"folder\n"), "each output by its name, from the folder given")
    result = await echo.wait()
    require(result.exit_code == 7 and result.stdout == b"", "the result tells what was not heard before")
    await error_of(echo.write(b"late"), GuestError)
    require(await sandbox.commands() == [], "what has been waited for is forgotten")
    await error_of(sandbox.spawn(["no-such-program"]), GuestError)
    await error_of(sandbox.spawn(["true"], cwd="no/such/folder"), GuestError)


async def check_signals(engine: Engine) -> None:
    """A signal reaches the whole process group; so does the end at the time limit, whoever ignores what."""
    if not engine.capabilities.background_commands:
        return
    sandbox = await engine.boot(IMAGE)
    script = 'trap "echo caught; exit 3" TERM; echo ready; while true; do sleep 0.1; done'
    polite = await sandbox.spawn(["sh", "-c", script])
    async for chunk in polite.output():
        if b"ready" in chunk.data:
            await polite.signal(signal.SIGTERM)
    require((await polite.wait()).exit_code == 3, "a signal is the command's to handle")
    await polite.signal(signal.SIGTERM)
    await error_of(sandbox.call("signal", command=polite.number, signal=15), GuestError)
    for end in ("kill", "limit"):
        script = f"trap '' TERM; (trap '' TERM; while true; do echo x >> {end}; sleep 0.1; done) & wait"
        stubborn = await sandbox.spawn(["sh", "-c", script], timeout_s=3.0 if end == "limit" else None)
        while (await sandbox.exec(["test", "-s", end])).exit_code != 0:
            require([each.pid for each in await sandbox.commands()] == [stubborn.pid], "it is told of")
        if end == "kill":
            await stubborn.signal(signal.SIGTERM)
            size = len(await sandbox.read_file(end))
            while len(await sandbox.read_file(end)) == size:
                require(len(await sandbox.commands()) == 1, "what ignores a signal goes on")
            await stubborn.kill()
        result = await stubborn.wait()
        require(result.exit_code == -9 and result.timed_out == (end == "limit"), "it is killed")
        size = len(await sandbox.read_file(end))
        await asyncio.sleep(0.5)
        require(len(await sandbox.read_file(end)) == size, "its children are killed with it")


async def check_saved_commands(engine: Engine) -> None:
    """A clone goes on with the commands of its checkpoint, or the checkpoint is refused; never half."""
    if not engine.capabilities.background_commands:
        return
    sandbox = await engine.boot(IMAGE)
    command = await sandbox.spawn(["sh", "-c", "echo begun; read line; echo $line"], keep_stdin_open=True)
    if not engine.capabilities.forks_background_processes:
        await error_of(sandbox.checkpoint(), CheckpointError)
    else:
        [clone] = await engine.fork(await sandbox.checkpoint())
        [inherited] = await clone.commands()
        await inherited.write(b"clone\n")
        require((await inherited.wait()).stdout == b"begun\nclone\n", "it goes on in the clone")
    waiting = asyncio.ensure_future(command.wait())
    await sandbox.call("ping")
    await error_of(sandbox.checkpoint(), CheckpointError)
    await command.write(b"original\n")
    require((await waiting).stdout == b"begun\noriginal\n", "and in the original, on its own")
    await sandbox.checkpoint()


async def check_folders(engine: Engine) -> None:
    """Folders and files go in and come out as they were; what is not there is an error and no more."""
    sandbox = await engine.boot(IMAGE)
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "new" / "target"
        (source / "deep" / "er").mkdir(parents=True)
        (source / "empty").mkdir(mode=0o750)
        (source / "deep" / "er" / "data").write_bytes(bytes(range(256)) * 40_000)
        (source / "run.sh").write_bytes(b"#!/bin/sh\necho ran\n")
        (source / "run.sh").chmod(0o751)
        (source / "link").symlink_to("deep/er/data")
        await sandbox.upload(source, "in/folder")
        ran = await sandbox.exec(["./run.sh"], cwd="in/folder")
        require(ran.stdout == b"ran\n", "modes are kept on the way in")
        await sandbox.write_file("in/folder/more", b"more")
        await sandbox.upload(source / "run.sh", "in/folder/deep/copy")
        await sandbox.download("in/folder", target)
        same = (target / "deep" / "er" / "data").read_bytes() == bytes(range(256)) * 40_000
        require(same and (target / "more").read_bytes() == b"more", "contents come back")
        require((target / "link").readlink() == Path("deep/er/data"), "links stay links")
        modes = [(target / name).stat().st_mode & 0o777 for name in ("run.sh", "empty", "deep/copy")]
        require(modes == [0o751, 0o750, 0o751], "modes are kept on the way out")
        await error_of(sandbox.download("in/folder", target), GuestError)
        await error_of(sandbox.download("no/such/folder", target.parent / "none"), GuestError)
        await error_of(sandbox.upload(source / "missing", "in/missing"), GuestError)
        await error_of(sandbox.download("in/folder", target.parent / "long", max_bytes=1 << 20), GuestError)
        await error_of(sandbox.download("in/folder", target.parent / "many", max_entries=3), GuestError)
        await sandbox.exec(["ln", "-s", "../../..", "in/folder/out"])
        await error_of(sandbox.download("in/folder", target.parent / "out"), GuestError)
        await sandbox.download("in/folder/run.sh", target.parent / "file")
        require((target.parent / "file").read_bytes().endswith(b"ran\n"), "a single file comes, too")
        require(sorted(path.name for path in target.parent.iterdir()) == ["file", "target"], "nothing else")
    require(await sandbox.call("ping") is None, "the sandbox stays usable")
