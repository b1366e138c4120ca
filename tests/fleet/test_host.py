"""A host by itself: epochs, keys, the queue, and what is left when it closes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from in_process import run_config

from rollout.branch import BranchJob
from rollout.env import Task
from rollout.errors import BootError, CapacityError, ConfigError, EnvError
from rollout.fleet import host as host_module
from rollout.fleet.host import Host
from rollout.fleet.reaper import OWNER_MARK
from rollout.types import Randomness

TASK = Task("FrozenLake-v1")


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    made = Host(run_config())
    await made.start(1)
    yield made
    await made.close()
    await made.close()


def scratch_folders() -> set[str]:
    return {path.name for parent in ("/dev/shm", "/tmp") for path in Path(parent).glob("rollout-*")}


async def test_starting_twice_is_starting_once(host: Host) -> None:
    first = await host.start(1)
    assert await host.start(1) is first
    assert first.capabilities.engine == "inline"


async def test_an_old_epoch_is_refused_and_a_new_one_ends_the_old(host: Host) -> None:
    opening = (await host.open(1, "key", TASK, 0)).value
    await host.start(2)
    with pytest.raises(CapacityError, match="serves epoch 2, not 1") as caught:
        await host.open(1, "other", TASK, 0)
    assert caught.value.retryable
    with pytest.raises(CapacityError):
        await host.renew(1)
    with pytest.raises(CapacityError):
        await host.start(1)
    job = BranchJob(opening.checkpoint, (0,), Randomness.seeded(0))
    [result] = (await host.run(2, "key", [job])).value
    assert result.failure is not None
    assert result.failure.boundary == "checkpoint", "what the old epoch held is gone"


async def test_a_known_key_gives_the_first_answer(host: Host) -> None:
    opening = await host.open(1, "a", TASK, 0)
    assert await host.open(1, "a", TASK, 99) is opening
    job = BranchJob(opening.value.checkpoint, (0,), Randomness.seeded(0))
    both = await asyncio.gather(host.run(1, "b", [job]), host.run(1, "b", [job]))
    assert both[0] is both[1]
    assert (await host.renew(1)).branches == 1


async def test_a_caller_that_goes_away_does_not_end_the_call(host: Host) -> None:
    opening = (await host.open(1, "a", TASK, 0)).value
    job = BranchJob(opening.checkpoint, (0,), Randomness.seeded(0))
    call = asyncio.create_task(host.run(1, "b", [job]))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    reply = await host.run(1, "b", [job])
    assert reply.value[0].failure is None
    assert (await host.renew(1)).branches == 1


async def test_a_full_queue_refuses(host: Host) -> None:
    opening = (await host.open(1, "a", TASK, 0)).value
    jobs = [BranchJob(opening.checkpoint, (0,), Randomness.seeded(i)) for i in range(host.max_queued + 1)]
    with pytest.raises(CapacityError, match="do not fit the host's queue") as caught:
        await host.run(1, "b", jobs)
    assert caught.value.retryable
    assert len((await host.run(1, "c", jobs[1:])).value) == host.max_queued


async def test_it_says_how_it_is(host: Host) -> None:
    opening = (await host.open(1, "a", TASK, 0)).value
    stats = await host.renew(1)
    assert (stats.checkpoints, stats.live_sandboxes, stats.branches) == (1, 1, 0), "the opening's heir"
    assert stats.checkpoint_bytes == opening.checkpoint.private_bytes
    assert stats.rss_bytes > 1 << 20
    assert stats.timings.calls["reset"] == 1
    await host.release(1, [opening.checkpoint])
    assert (await host.renew(1)).checkpoints == 0


async def test_closing_removes_the_scratch_folder() -> None:
    host = Host(run_config())
    try:
        await host.start(1)
        own = {name for name in scratch_folders() if os.environ[OWNER_MARK] in name}
    finally:
        await host.close()
    assert len(own) == 1
    assert not own & scratch_folders()
    with pytest.raises(CapacityError):
        await host.open(1, "a", TASK, 0)


@pytest.mark.parametrize(
    ("env", "error", "message"),
    [
        ({"args": {"env_id": "FrozenLak-v1"}}, EnvError, "FrozenLak"),
        ({"entry_point": "envs.nowhere:GymEnv"}, ConfigError, "cannot import 'envs.nowhere'"),
        ({"entry_point": "envs.gym:Nothing"}, ConfigError, "has no 'Nothing'"),
        ({"args": {"env_id": "FrozenLake-v1", "knob": 1}}, ConfigError, "knob"),
    ],
)
async def test_what_cannot_start_says_why_and_leaves_nothing(
    env: dict[str, object],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_module, "scratch_parent", lambda: tmp_path)
    config = run_config().model_dump() | {"env": env}
    host = Host(type(run_config()).model_validate(config))
    with pytest.raises(error, match=message):
        await host.start(1)
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - a path's own way blocks, says another rule


async def test_an_engine_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for kind, command in (("process", "apt-get install bubblewrap"), ("microvm", "apt-get install qemu")):
        config = run_config().model_dump() | {"engine": {"kind": kind}}
        with pytest.raises(BootError, match=command):
            await Host(type(run_config()).model_validate(config)).start(1)
