"""What a sandbox does with commands and files."""

from __future__ import annotations

import asyncio

from rollout.errors import GuestError
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
