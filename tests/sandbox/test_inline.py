"""The inline engine beyond the contract: which copies it trusts, the host's generators, folders, commands."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import resource
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil
import pytest

from rollout.config import EngineConfig
from rollout.errors import CapacityError, CheckpointError, EnvError, GuestError
from rollout.sandbox import inline_copy
from rollout.sandbox.base import Checkpoint, Sandbox
from rollout.sandbox.inline import InlineEngine, InlineSandbox
from rollout.sandbox.inline_fidelity import Recipe, examine
from rollout.types import Randomness, RngPolicy

INHERIT = Randomness(RngPolicy.INHERIT)


@pytest.fixture
async def engine() -> AsyncIterator[InlineEngine]:
    async with InlineEngine(EngineConfig(kind="inline")) as made:
        yield made


async def prepared(engine: InlineEngine, name: str, seed: int = 1) -> InlineSandbox:
    sandbox = await engine.boot("")
    await sandbox.call("env.make", env_id=name if ":" in name or "-" in name else f"awkward_envs:{name}-v0")
    await sandbox.call("env.reset", seed=seed)
    return sandbox


async def play(sandbox: Sandbox, num_steps: int = 5) -> list[Any]:
    steps: list[Any] = [await sandbox.call("env.step", action=n % 2) for n in range(num_steps)]
    return [np.asarray(step["observation"]).tolist() for step in steps]


@pytest.mark.parametrize(
    "env_id",
    [
        "CartPole-v1",
        "Acrobot-v1",
        "MountainCar-v0",
        "Pendulum-v1",
        "Blackjack-v1",
        "CliffWalking-v1",
        "Taxi-v4",
    ],
)
async def test_common_environments_are_trusted_and_pickled(engine: InlineEngine, env_id: str) -> None:
    if env_id not in gymnasium.registry:
        pytest.skip("another version of gymnasium")
    trust = examine(Recipe.of({"env_id": env_id}))
    assert trust.copier.name == "pickling"
    assert not trust.uses_globals


@pytest.mark.parametrize(
    ("name", "copier"), [("Walk", "pickling"), ("Lambda", "copy.deepcopy"), ("OnlyDeepCopy", "copy.deepcopy")]
)
async def test_the_first_faithful_way_of_copying_is_taken(
    engine: InlineEngine, name: str, copier: str
) -> None:
    assert examine(Recipe.of({"env_id": f"awkward_envs:{name}-v0"})).copier.name == copier
    sandbox = await prepared(engine, name)
    await play(sandbox, 3)
    checkpoint = await sandbox.checkpoint()
    assert checkpoint.private_bytes > 100
    clones = await engine.fork(checkpoint, 2, randomness=[INHERIT] * 2)
    futures = [await play(each) for each in (sandbox, *clones)]
    assert futures[0] == futures[1] == futures[2]


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("Shared", "observation"),
        ("Idempotent", "observation"),
        ("Reborn", "observation"),
        ("Restless", "observation"),
        ("Locked", "cannot be copied"),
    ],
)
async def test_an_environment_whose_copies_misbehave_is_refused_at_its_first_checkpoint(
    engine: InlineEngine, name: str, difference: str
) -> None:
    sandbox = await prepared(engine, name)
    for attempt in (sandbox.checkpoint, sandbox.hibernate, lambda: engine.self_check(sandbox)):
        with pytest.raises(CheckpointError, match=difference):
            await attempt()
    await sandbox.call("env.step", action=1)  # it can still be played, just not forked
    assert engine.num_sandboxes == 1


async def test_the_first_difference_is_named(engine: InlineEngine) -> None:
    sandbox = await prepared(engine, "Shared")
    with pytest.raises(
        CheckpointError,
        match=r"made by copy.deepcopy.* at step \d+, observation is array.* instead of array",
    ):
        await engine.self_check(sandbox)


async def test_the_test_is_made_once_for_each_way_of_making(engine: InlineEngine) -> None:
    sandbox = await prepared(engine, "Walk")
    for _ in range(3):
        await sandbox.checkpoint()
    other = await prepared(engine, "Walk")
    await other.checkpoint()
    assert engine.timings.calls["fidelity"] == 1
    await other.call("env.make", env_id="awkward_envs:Walk-v0", kwargs={"limit": 9})
    await other.checkpoint()
    assert engine.timings.calls["fidelity"] == 2
    await other.call("env.make", env_id="awkward_envs:Shared-v0")
    with pytest.raises(CheckpointError):
        await other.checkpoint()


async def test_the_test_does_not_disturb_the_sandbox(engine: InlineEngine) -> None:
    one, two = await prepared(engine, "Walk"), await prepared(engine, "Walk")
    await one.checkpoint()
    assert await play(one) == await play(two)


async def test_global_generators_are_the_sandboxes_own(engine: InlineEngine) -> None:
    random.seed(5)
    np.random.seed(5)
    expected_host = [random.random(), np.random.random()]
    random.seed(5)
    np.random.seed(5)
    sandbox = await prepared(engine, "GlobalDice")
    checkpoint = await sandbox.checkpoint()
    seeded = [Randomness.seeded(1), Randomness.seeded(1), Randomness.seeded(2)]
    clones = await engine.fork(checkpoint, 3, randomness=seeded)
    inherited = await engine.fork(checkpoint, 2, randomness=[INHERIT] * 2)
    interleaved: list[list[Any]] = [[], [], []]
    for _ in range(4):
        for future, clone in zip(interleaved, clones, strict=True):
            future += await play(clone, 1)
    assert interleaved[0] == interleaved[1] != interleaved[2]
    futures = [await play(each) for each in (*inherited, sandbox)]
    assert futures[0] == futures[1] == futures[2]
    unique = [await play((await each)[0]) for each in (engine.fork(checkpoint), engine.fork(checkpoint))]
    assert unique[0] != unique[1]
    assert [random.random(), np.random.random()] == expected_host


async def test_an_environment_that_leaves_the_global_generators_alone_pays_nothing_for_them(
    engine: InlineEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = await prepared(engine, "Walk")
    checkpoint = await sandbox.checkpoint()

    def explode(self: object) -> None:
        raise AssertionError("the global generators were put in place")

    monkeypatch.setattr("rollout.sandbox.global_rng.GlobalState.install", explode)
    for each in (sandbox, *await engine.fork(checkpoint, 2)):
        await play(each)


async def test_masks_hold_in_playouts_and_in_the_fidelity_test(engine: InlineEngine) -> None:
    sandbox = await prepared(engine, "Masked")
    [clone] = await engine.fork(await sandbox.checkpoint(), 1)
    result: Any = await clone.call("env.playout", horizon=10, seed=1)
    assert result["num_steps"] == 10
    assert 10 <= result["value"] <= 30
    with pytest.raises(EnvError, match="masked"):
        await sandbox.call("env.step", action=0)


async def test_a_search_stops_at_the_episodes_end(engine: InlineEngine) -> None:
    sandbox = await engine.boot("")
    await sandbox.call("env.make", env_id="awkward_envs:Walk-v0", kwargs={"limit": 5}, max_episode_steps=7)
    await sandbox.call("env.reset", seed=1, options={"start": 4})
    checkpoint = await sandbox.checkpoint()
    results: list[Any] = []
    for seed in range(20):
        [clone] = await engine.fork(checkpoint, 1)
        results.append(await clone.call("env.playout", horizon=100, seed=seed, discount=0.5))
    assert {result["terminated"] for result in results} == {True}
    for result in results:
        last = result["value"] / 0.5 ** (result["num_steps"] - 1)
        assert last in (1, 2, 3)  # zeros, and then the first action that is none


async def test_state_of_the_host_is_as_before(engine: InlineEngine) -> None:
    before = Path.cwd(), dict(os.environ)
    sandbox = await prepared(engine, "FrozenLake-v1")
    await sandbox.exec(["sh", "-c", "cd /; export X=1"])
    assert (Path.cwd(), dict(os.environ)) == before


async def test_paths_stay_in_the_folder(engine: InlineEngine, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    sandbox = await engine.boot("")
    await sandbox.exec(["ln", "-s", str(tmp_path), "link"])
    for path in ("../x", "a/../../x", "/../x", "link/secret", "link"):
        with pytest.raises(GuestError):
            await sandbox.read_file(path)
        with pytest.raises(GuestError):
            await sandbox.write_file(path, b"overwritten")
    assert secret.read_text() == "secret"
    await sandbox.write_file("/absolute/path", b"inside")
    assert (await sandbox.exec(["cat", "absolute/path"])).stdout == b"inside"


async def test_folders_are_copied_only_when_they_must_be(engine: InlineEngine) -> None:
    sandbox = await prepared(engine, "Walk")
    checkpoint = await sandbox.checkpoint()
    [clone] = await engine.fork(checkpoint, 1)
    assert engine.scratch._path is None
    await clone.write_file("f", bytes(1000))
    with_file = await clone.checkpoint()
    assert with_file.private_bytes > checkpoint.private_bytes + 900
    scratch = engine.scratch._path
    assert scratch is not None
    clones = await engine.fork(with_file, 50)
    assert len(list(scratch.iterdir())) == 2  # the clone's, and the checkpoint's
    again = await clones[0].checkpoint()
    assert len(list(scratch.iterdir())) == 2
    for checkpoint in (with_file, again):
        await engine.discard(checkpoint)
    for each in clones:
        await each.kill()
    await clone.kill()
    assert list(scratch.iterdir()) == []


async def test_a_disk_that_takes_no_more_is_a_typed_error_and_nothing_is_left(engine: InlineEngine) -> None:
    sandbox = await engine.boot("")
    await sandbox.write_file("f", bytes(100_000))
    before = await sandbox.checkpoint()
    [lazy] = await engine.fork(before, 1)
    scratch = engine.scratch._path
    assert scratch is not None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be saved"):
            await sandbox.checkpoint()
        with pytest.raises(GuestError, match="folder cannot be made"):
            await lazy.read_file("f")
        with pytest.raises(GuestError, match="cannot write"):
            await sandbox.write_file("g", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(list(scratch.iterdir())) == 2
    assert await sandbox.read_file("f") == await lazy.read_file("f") == bytes(100_000)


async def test_a_cancelled_command_and_a_killed_one_leave_no_process(engine: InlineEngine) -> None:
    sandbox = await engine.boot("")
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    running = asyncio.ensure_future(sandbox.exec(["sh", "-c", "sleep 600 & sleep 600"]))
    while not {child.pid for child in psutil.Process().children(recursive=True)} - before:
        await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    await sandbox.exec(["sh", "-c", "sleep 600 &"])
    # that nothing is left is checked after every test


async def test_a_sandbox_killed_during_a_command_ends_it_and_gives_no_result(engine: InlineEngine) -> None:
    sandbox = await engine.boot("")
    running = asyncio.ensure_future(sandbox.exec(["sleep", "600"]))
    await asyncio.sleep(0.1)
    await sandbox.kill()
    living = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    assert "sleep" not in [child.name() for child in living]
    with pytest.raises(GuestError, match="killed"):
        await running


async def test_another_environment_in_a_clone_is_as_unknown_as_the_first(engine: InlineEngine) -> None:
    random.seed(5)
    expected_host = random.random()
    random.seed(5)
    sandbox = await prepared(engine, "Walk")
    [clone] = await engine.fork(await sandbox.checkpoint())
    await clone.call("env.make", env_id="awkward_envs:GlobalDice-v0")
    await clone.call("env.reset", seed=3)
    checkpoint = await clone.checkpoint()
    clones = await engine.fork(checkpoint, 2, randomness=[INHERIT] * 2)
    assert await play(clones[0]) == await play(clones[1]) == await play(clone)
    with pytest.raises(EnvError):
        await clone.call("env.make", env_id="NoSuch-v0")
    await clone.checkpoint()  # of a sandbox without an environment
    assert random.random() == expected_host


async def test_capacity_is_heeded() -> None:
    async with InlineEngine(EngineConfig(kind="inline", max_sandboxes=3)) as engine:
        sandbox = await prepared(engine, "Walk")
        checkpoint = await sandbox.checkpoint()
        with pytest.raises(CapacityError):
            await engine.fork(checkpoint, 3)
        await engine.fork(checkpoint, 2)
        with pytest.raises(CapacityError):
            await engine.boot("")
        await sandbox.kill()
        await engine.boot("")


async def test_a_checkpoint_of_another_inline_engine_is_refused(engine: InlineEngine) -> None:
    async with InlineEngine(EngineConfig(kind="inline")) as other:
        checkpoint = await (await prepared(other, "Walk")).checkpoint()
        with pytest.raises(CheckpointError, match="another"):
            await engine.fork(checkpoint)


async def test_an_environment_that_raises_at_its_end_does_not_hold_up_a_kill(engine: InlineEngine) -> None:
    sandbox = await prepared(engine, "Grumpy")
    with pytest.raises(EnvError, match="I will not go"):
        await sandbox.call("env.close")
    again = await prepared(engine, "Grumpy")
    await again.kill()
    assert engine.num_sandboxes == 1


async def test_a_thousand_branches_leave_nothing(engine: InlineEngine) -> None:
    sandbox = await prepared(engine, "FrozenLake-v1")
    checkpoint = await sandbox.checkpoint()

    async def branch(seed: int) -> Checkpoint:
        [clone] = await engine.fork(checkpoint, 1, randomness=[Randomness.seeded(seed)])
        async with clone:
            await clone.call("env.step", action=seed % 4)
            return await clone.checkpoint()

    for seed in range(20):
        await engine.discard(await branch(seed))
    gc.collect()
    before = len(gc.get_objects())
    for seed in range(1000):
        await engine.discard(await branch(seed))
    gc.collect()
    assert len(gc.get_objects()) - before < 200
    assert engine.num_sandboxes == 1
    assert len(engine._records) == 1


def test_copied_generators_go_on_and_spawn_as_the_original() -> None:
    for original in (
        np.random.default_rng(3),
        np.random.Generator(np.random.MT19937(3)),
        np.random.RandomState(3),
    ):
        original.random(3)
        if isinstance(original, np.random.Generator):
            original.integers(10, dtype=np.uint32)  # leaves half a word in store
            original.spawn(1)
        copies = [copier.save(original).load() for copier in inline_copy.COPIERS]
        copies.append(inline_copy.COPIERS[0].save(copies[0]).load())
        expected = original.random(4).tolist()
        for copy in copies:
            assert copy.random(4).tolist() == expected
        if isinstance(original, np.random.Generator):
            number = original.integers(1 << 20, dtype=np.uint32)  # begins with the stored half
            assert [copy.integers(1 << 20, dtype=np.uint32) for copy in copies] == [number] * 3
            child = original.spawn(1)[0].random()
            assert [copy.spawn(1)[0].random() for copy in copies] == [child] * 3


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(10)[::3],
        np.array([b"ab", b"c"]),
        np.array("text"),
        np.zeros((0, 3)),
        np.float32(1.5),
        np.uint8(3),
        np.dtype("f4"),
        np.array([1, None], dtype=object),
        np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
        np.array(["2020-01-01"], dtype="M8[D]"),
        gymnasium.spaces.Discrete(3, start=2, seed=4),
        gymnasium.spaces.Dict(a=gymnasium.spaces.Discrete(2), b=gymnasium.spaces.Box(0, 1)),
    ],
    ids=repr,
)
def test_pickled_copies_are_equal_and_of_the_same_type(value: Any) -> None:
    copy = inline_copy.COPIERS[0].save(value).load()
    assert type(copy) is type(value)
    if isinstance(value, np.ndarray):
        assert copy.dtype == value.dtype
        assert copy.flags.writeable == value.flags.writeable
        assert np.array_equal(copy, value)
        assert not np.shares_memory(copy, value)
    else:
        assert copy == value
    if isinstance(value, gymnasium.spaces.Discrete):
        assert [copy.sample() for _ in range(9)] == [value.sample() for _ in range(9)]


def test_what_two_attributes_share_they_share_in_the_copy() -> None:
    array = np.zeros(3)
    generator = np.random.default_rng(1)
    copy = inline_copy.COPIERS[0].save({"a": array, "b": array, "c": generator, "d": generator}).load()
    assert copy["a"] is copy["b"]
    assert copy["c"] is copy["d"]
    read_only = np.zeros(3)
    read_only.flags.writeable = False
    assert not inline_copy.COPIERS[0].save(read_only).load().flags.writeable
