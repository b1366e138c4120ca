"""Background commands and folders against a real guest agent: what is lost, refused and left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import CheckpointError, GuestError
from rollout.sandbox import commands
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.process import ProcessEngine
from rollout.sandbox.process.sandbox import ProcessSandbox

_missing = what_is_missing("process", ImageConfig())
pytestmark = [pytest.mark.process, pytest.mark.skipif(_missing is not None, reason=_missing or "")]
DEADLINE_S = 30.0


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[ProcessSandbox]:
    async with ProcessEngine(EngineConfig(kind="process"), tmp_path) as engine:
        made = await engine.boot("default")
        assert isinstance(made, ProcessSandbox)
        yield made


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def test_output_that_is_not_taken_is_bounded_and_said_to_be_cut(
    sandbox: ProcessSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "MAX_UNHEARD_BYTES", 200_000)
    command = await sandbox.spawn(["sh", "-c", "head -c 3000000 /dev/zero; echo end >&2"])
    heard = 0
    async with asyncio.timeout(DEADLINE_S), aclosing(command.output()) as output:
        async for chunk in output:
            heard += len(chunk.data)
            await asyncio.sleep(0.2)
    result = await command.wait()
    assert result.exit_code == 0
    assert 0 < heard < 3_000_000
    assert result.stdout_truncated


async def test_output_can_be_left_and_taken_up_again(sandbox: ProcessSandbox) -> None:
    command = await sandbox.spawn(["sh", "-c", "echo one; read line; echo $line"], keep_stdin_open=True)
    async with aclosing(command.output()) as output:
        assert (await anext(output)).data == b"one\n"
    await command.write(b"two\n")
    assert [chunk.data async for chunk in command.output()] == [b"two\n"]
    assert [chunk async for chunk in command.output()] == []
    assert (await command.wait()).exit_code == 0


async def test_output_kept_for_wait_is_not_streamed(sandbox: ProcessSandbox) -> None:
    command = await sandbox.spawn(["echo", "kept"])
    assert (await command.wait()).stdout == b"kept\n"
    with pytest.raises(GuestError, match="kept for the result"):
        await anext(command.output())


async def test_who_is_cancelled_leaves_the_command_running(sandbox: ProcessSandbox) -> None:
    command = await sandbox.spawn(["sh", "-c", "read line; echo $line"], keep_stdin_open=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await command.wait()
    with pytest.raises(CheckpointError, match="1 commands are running"):
        await sandbox.checkpoint()
    await command.write(b"still here\n")
    assert (await command.wait()).stdout == b"still here\n"


async def test_input_waits_for_who_reads_late(sandbox: ProcessSandbox) -> None:
    size = 48 << 20  # more than the guest queues
    command = await sandbox.spawn(["sh", "-c", "sleep 0.5; wc -c"], keep_stdin_open=True)
    async with asyncio.timeout(DEADLINE_S):
        await command.write(bytes(size), close=True)
        assert int((await command.wait()).stdout) == size


async def test_input_that_is_closed_is_refused(sandbox: ProcessSandbox) -> None:
    command = await sandbox.spawn(["cat"])
    with pytest.raises(GuestError, match="closed"):
        await command.write(b"late")
    assert (await command.wait()).exit_code == 0


async def test_a_killed_sandbox_ends_who_listens(sandbox: ProcessSandbox) -> None:
    command = await sandbox.spawn(["sleep", "600"])
    listening = asyncio.create_task(command.wait())
    await sandbox.call("ping")
    await sandbox.kill()
    async with asyncio.timeout(DEADLINE_S):
        for attempt in (listening, command.wait(), command.kill(), command.write(b""), sandbox.commands()):
            with pytest.raises(GuestError):
                await attempt


async def test_a_cancelled_transfer_leaves_no_command(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(bytes(60 << 20))
    await sandbox.upload(source, "folder")
    for transfer in (sandbox.upload(source, "other"), sandbox.download("folder", tmp_path / "target")):
        going = asyncio.create_task(transfer)
        async with asyncio.timeout(DEADLINE_S):
            while "tar" not in [each.argv[0] for each in await sandbox.commands()]:
                assert not going.done(), "too little to be cancelled in the middle of"
            going.cancel()
            await asyncio.wait([going])
            assert going.cancelled()
            while await sandbox.commands():
                await asyncio.sleep(0.02)
    assert [name for name in names_in(tmp_path) if name.startswith((".", "target"))] == []
    assert await sandbox.call("ping") is None


async def test_errors_of_transfers_name_what_is_wrong(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    await sandbox.upload(tmp_path / "file", "file")
    with pytest.raises(GuestError, match=r"cannot upload to 'file/below'.*(File exists|Not a directory)"):
        await sandbox.upload(tmp_path / "file", "file/below")
    with pytest.raises(GuestError, match=r"cannot download 'none': .*No such file"):
        await sandbox.download("none", tmp_path / "none")
    with pytest.raises(GuestError, match="not a path"):
        await sandbox.download("", tmp_path / "none")
    with pytest.raises(GuestError, match="cannot pack"):
        await sandbox.upload(tmp_path / "missing", "missing")
