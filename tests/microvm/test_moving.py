"""A sandbox that moves to another host: it goes on there as it was, and lives nowhere else."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import CheckpointError, ForkError, GuestError
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.export import export_checkpoints
from rollout.sandbox.microvm.moving import move_in, move_out
from rollout.sandbox.microvm.sandbox import MicroVMSandbox
from rollout.sandbox.microvm.transfer import Depot

_missing = what_is_missing("microvm", ImageConfig())
pytestmark = [
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
]
DEADLINE_S = 120
COUNT = "i=0; while true; do i=$((i+1)); echo $i > /tmp/counter; sleep 0.05; done"

OTHER_HOST = """
import asyncio, json, sys
from rollout.config import EngineConfig, ImageConfig
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.export import export_checkpoints
from rollout.sandbox.microvm.moving import move_in

async def main(location, name):
    async with MicroVMEngine(EngineConfig(kind="microvm"), ImageConfig()) as engine:
        sandbox = await move_in(engine, location, name)
        states = [sandbox.state]
        found = {
            "id": sandbox.id,
            "parent_id": sandbox.parent_id,
            "note": (await sandbox.read_file("/tmp/note")).decode(),
            "host": (await sandbox.exec(["hostname"])).stdout.decode().strip(),
            "step": (await sandbox.call("env.step", action=1))["observation"],
            "hash": await sandbox.call("env.state_hash"),
        }
        await asyncio.sleep(1)
        found["counters"] = [int(await sandbox.read_file("/tmp/counter"))]
        await asyncio.sleep(1)
        found["counters"].append(int(await sandbox.read_file("/tmp/counter")))
        found["states"] = [*states, sandbox.state]
        print(json.dumps(found))

asyncio.run(main(*sys.argv[1:]))
"""


def on_another_host(location: Path, name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", OTHER_HOST, str(location), name],
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        timeout=DEADLINE_S,
        check=True,
    )
    return json.loads(done.stdout)


async def test_it_goes_on_as_it_was(engine: MicroVMEngine, lake: MicroVMSandbox, tmp_path: Path) -> None:
    [sandbox] = await engine.fork(await lake.checkpoint())
    assert isinstance(sandbox, MicroVMSandbox)
    await sandbox.write_file("/tmp/note", b"mine")
    await sandbox.spawn(["sh", "-c", COUNT])
    [twin] = await engine.fork(await sandbox.checkpoint())
    expected = await twin.call("env.step", action=1)
    assert isinstance(expected, dict)
    counted = int(await sandbox.read_file("/tmp/counter"))
    num_here = engine.num_sandboxes
    await move_out(engine, sandbox, str(tmp_path))
    assert sandbox.state == "dead"
    assert engine.num_sandboxes == num_here - 1
    with pytest.raises(GuestError):
        await sandbox.call("ping")
    found = await asyncio.to_thread(on_another_host, tmp_path, sandbox.id)
    assert found["states"] == ["hibernated", "running"]
    assert (found["id"], found["host"]) == (sandbox.id, sandbox.id)
    assert found["parent_id"] == sandbox.parent_id
    assert found["note"] == "mine"
    assert found["step"] == expected["observation"]
    assert found["hash"] == await twin.call("env.state_hash")
    first, second = found["counters"]
    assert counted < first < second, "its commands go on"


async def test_only_one_takes_it(engine: MicroVMEngine, machine: MicroVMSandbox, tmp_path: Path) -> None:
    await move_out(engine, machine, str(tmp_path))
    async with MicroVMEngine(EngineConfig(kind="microvm"), ImageConfig()) as other:
        both = [move_in(host, str(tmp_path), machine.id) for host in (engine, other)]
        done = await asyncio.gather(*both, return_exceptions=True)
        [taken] = [each for each in done if isinstance(each, MicroVMSandbox)]
        [refused] = [each for each in done if isinstance(each, BaseException)]
        assert isinstance(refused, CheckpointError)
        assert engine.num_sandboxes + other.num_sandboxes == 1
        assert (await taken.exec(["echo", "here"])).stdout == b"here\n"
        with pytest.raises(CheckpointError, match="has no sandboxes/"):
            await move_in(engine, str(tmp_path), machine.id)


async def test_what_cannot_be_written_stays(
    engine: MicroVMEngine, machine: MicroVMSandbox, tmp_path: Path
) -> None:
    await machine.write_file("/tmp/note", b"mine")
    in_the_way = tmp_path / "file"
    in_the_way.write_text("no folder")
    with pytest.raises(CheckpointError, match="cannot"):
        await move_out(engine, machine, str(in_the_way / "there"))
    assert machine.state == "hibernated"
    assert await machine.read_file("/tmp/note") == b"mine"


async def test_who_lives_here_does_not_come_again(
    engine: MicroVMEngine, machine: MicroVMSandbox, tmp_path: Path
) -> None:
    await move_out(engine, machine, str(tmp_path))
    record = tmp_path / "sandboxes" / f"{machine.id}.json"
    kept = record.read_bytes()
    again = await move_in(engine, str(tmp_path), machine.id)
    assert again.state == "hibernated"
    assert not record.exists()
    record.write_bytes(kept)
    with pytest.raises(ForkError, match="lives here already"):
        await move_in(engine, str(tmp_path), machine.id)
    assert record.exists(), "it is still there for whoever may take it"
    assert (await again.exec(["echo", "here"])).stdout == b"here\n"


async def test_a_damaged_one_is_refused(
    engine: MicroVMEngine, machine: MicroVMSandbox, tmp_path: Path
) -> None:
    await move_out(engine, machine, str(tmp_path))
    record = tmp_path / "sandboxes" / f"{machine.id}.json"
    record.write_bytes(record.read_bytes().replace(b"parent_id", b"parent_ix"))
    with pytest.raises(CheckpointError, match="damaged"):
        await move_in(engine, str(tmp_path), machine.id)
    assert engine.num_sandboxes == 0


async def test_a_move_does_not_take_the_checkpoints_of_others(
    engine: MicroVMEngine, machine: MicroVMSandbox, tmp_path: Path
) -> None:
    checkpoint = await machine.checkpoint()
    [child] = await engine.fork(checkpoint)
    assert isinstance(child, MicroVMSandbox)
    await export_checkpoints(engine, [checkpoint], str(tmp_path))
    await move_out(engine, child, str(tmp_path))
    again = await move_in(engine, str(tmp_path), child.id)
    assert (await again.exec(["echo", "here"])).stdout == b"here\n"
    [other] = await engine.fork(checkpoint)
    assert (await other.exec(["echo", "here"])).stdout == b"here\n"


@pytest.mark.parametrize("leaves", [True, False])
async def test_a_move_that_is_cancelled_leaves_one(
    engine: MicroVMEngine,
    machine: MicroVMSandbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    leaves: bool,
) -> None:
    if not leaves:
        await move_out(engine, machine, str(tmp_path))
    name = "put_record" if leaves else "take"
    real, moving = getattr(Depot, name), []

    def cancelled(depot: Depot, name: str, *args: Any, **options: Any) -> None:
        real(depot, name, *args, **options)
        if options.get("kind") == "sandboxes" or not leaves:
            monkeypatch.undo()
            moving[0].get_loop().call_soon_threadsafe(moving[0].cancel)
            time.sleep(0.5)  # the step is in its thread when the cancellation comes

    monkeypatch.setattr(Depot, name, cancelled)
    move = move_out(engine, machine, str(tmp_path)) if leaves else move_in(engine, str(tmp_path), machine.id)
    moving.append(asyncio.create_task(move))
    with pytest.raises(asyncio.CancelledError):
        await moving[0]
    record = tmp_path / "sandboxes" / f"{machine.id}.json"
    assert record.exists() != leaves
    assert engine.num_sandboxes == int(leaves)
    left = machine if leaves else await move_in(engine, str(tmp_path), machine.id)
    assert (await left.exec(["echo", "here"])).stdout == b"here\n"
