"""Checkpoints, clones at any depth, and the lives and ends of sandboxes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Final, cast

from rollout.errors import CapacityError, CheckpointError, GuestError, RolloutError
from rollout.sandbox.base import Checkpoint, Engine
from rollout.sandbox.contract.tools import (
    IMAGE,
    INHERIT,
    ContractViolation,
    error_of,
    future,
    lake,
    play,
    require,
    require_dead,
)
from rollout.types import Randomness, Value

DEPTH: Final = 8
"""How deep forks of forks are checked."""


async def check_checkpoint(engine: Engine) -> None:
    """The original goes on; clones begin where it was; parents are told."""
    original = await lake(engine, seed=5)
    await original.write_file("note", b"before")
    checkpoint = await original.checkpoint()
    require(checkpoint.parent_id is None, "the checkpoint of a booted sandbox has no parent")
    require(checkpoint.engine == engine.capabilities.engine, "a checkpoint names its engine")
    require(checkpoint.private_bytes >= 0, "and what it costs")
    expected = await play(original, [1, 2, 1, 2])
    await original.write_file("note", b"after")
    await original.kill()
    [clone] = await engine.fork(checkpoint, 1, randomness=[INHERIT])
    require(clone.parent_id == checkpoint.id, "a clone names its checkpoint")
    require(await play(clone, [1, 2, 1, 2]) == expected, "a clone continues what was saved")
    require(await clone.read_file("note") == b"before", "with the files of that moment")
    again = await clone.checkpoint()
    require(again.parent_id == checkpoint.id and again.id != checkpoint.id, "checkpoints form a tree")


async def check_rebase(engine: Engine) -> None:
    """A checkpoint that became a base is what it was, for whatever came or comes from it."""
    sandbox = await lake(engine, seed=5)
    await sandbox.write_file("note", b"before")
    checkpoint = await sandbox.checkpoint()
    [early] = await engine.fork(checkpoint, 1, randomness=[INHERIT])
    child = await early.checkpoint()
    expected = await play(sandbox, [1, 2, 1, 2])
    for _ in range(2):
        await engine.rebase(checkpoint)
        [late] = await engine.fork(checkpoint, 1, randomness=[INHERIT])
        require(late.parent_id == checkpoint.id, "it has the name that it had")
        require(await late.read_file("note") == b"before", "and its files")
        require(await play(late, [1, 2]) == expected[:2], "a clone continues what was saved")
        [deep] = await engine.fork(await late.checkpoint(), 1, randomness=[INHERIT])
        require(await play(deep, [1, 2]) == expected[2:], "and so do clones of its clones")
    require(await play(early, [1, 2]) == expected[:2], "a clone that was there before is as it was")
    [of_child] = await engine.fork(child, 1, randomness=[INHERIT])
    require(await play(of_child, [1, 2]) == expected[:2], "and so is its checkpoint")


async def check_checkpoint_again(engine: Engine) -> None:
    """One sandbox is saved again and again, and every one of its checkpoints is whole."""
    sandbox = await lake(engine, seed=5)
    checkpoints = [await sandbox.checkpoint()]
    for _ in range(3):
        await play(sandbox, [1])
        checkpoints.append(await sandbox.checkpoint())
    expected = await play(sandbox, [2, 1])
    [last] = await engine.fork(checkpoints[3], 1, randomness=[INHERIT])
    require(await play(last, [2, 1]) == expected, "the last checkpoint goes on as its sandbox did")
    [first] = await engine.fork(checkpoints[0], 1, randomness=[INHERIT])
    require((await play(first, [1, 1, 1, 2, 1]))[-2:] == expected, "and the first replays what followed it")


async def check_another_life(engine: Engine) -> None:
    """A clone made after another has ended is as one made before: nothing of that life is in it."""
    sandbox = await lake(engine, seed=5)
    checkpoint = await sandbox.checkpoint()
    expected = await play(sandbox, [1, 2])
    for number in range(3):
        [clone] = await engine.fork(checkpoint, 1, randomness=[INHERIT])
        await error_of(clone.read_file("mine"), GuestError)
        require(await play(clone, [1, 2]) == expected, "each clone begins where the checkpoint was")
        await clone.write_file("mine", bytes([number]) * (1 << 20))
        if number % 2:
            await clone.checkpoint()
        await clone.kill()


async def check_depth(engine: Engine) -> None:
    """Forks of forks: each has all of its ancestors' state, and earlier checkpoints stay what they were."""
    sandbox = await lake(engine, seed=9)
    straight = await lake(engine, seed=9)
    expected = [(await play(straight, [level % 4]))[0] for level in range(DEPTH)]
    checkpoints: list[Checkpoint] = []
    for level in range(DEPTH):
        checkpoints.append(await sandbox.checkpoint())
        await sandbox.kill()
        [sandbox] = await engine.fork(checkpoints[-1], 1, randomness=[INHERIT])
        require(await play(sandbox, [level % 4]) == [expected[level]], f"depth {level + 1} goes on")
        await sandbox.write_file(f"level-{level}", str(level).encode())
    for level in range(DEPTH):
        require(await sandbox.read_file(f"level-{level}") == str(level).encode(), "files pile up")
    [early] = await engine.fork(checkpoints[2], 1, randomness=[INHERIT])
    require(await play(early, [2]) == [expected[2]], "an early checkpoint is as it was")
    require(await early.read_file("level-1") == b"1", "and has its files")
    await error_of(early.read_file("level-2"), GuestError)


async def check_siblings(engine: Engine) -> None:
    """Siblings and their parent do not see each other's files, episodes or ends."""
    parent = await lake(engine, seed=5)
    await parent.write_file("shared", b"parent")
    checkpoint = await parent.checkpoint()
    first, second = await engine.fork(checkpoint, 2, randomness=[INHERIT] * 2)
    await first.write_file("shared", b"first")
    await first.write_file("own", b"first")
    await first.exec(["sh", "-c", "echo more >> shared"])
    while not (await play(first, [2]))[0]["terminated"]:
        pass
    require(await second.read_file("shared") == b"parent", "a sibling's file is as it was")
    require(await parent.read_file("shared") == b"parent", "and the parent's")
    await error_of(second.read_file("own"), GuestError)
    actions: list[Value] = [0, 1, 2, 1]
    expected = await play(parent, actions)
    require(await play(second, actions) == expected, "a sibling's episode is untouched")
    await first.kill()
    require(await second.call("ping") is None, "a sibling's end is its own")


async def check_exactly_n(engine: Engine) -> None:
    """A fork gives what was asked for, or nothing."""
    sandbox = await lake(engine, seed=5)
    checkpoint = await sandbox.checkpoint()
    clones = await engine.fork(checkpoint, 5)
    require(len(clones) == 5 == len({clone.id for clone in clones}), "n clones with ids of their own")
    require(engine.num_sandboxes == 6, "all are counted")
    await error_of(engine.fork(checkpoint, 10_000_000), CapacityError)
    require(engine.num_sandboxes == 6, "a fork that fails leaves none")
    require(await clones[4].call("ping") is None, "and harms none")
    for n, randomness in ((0, None), (2, [INHERIT])):
        try:
            await engine.fork(checkpoint, n, randomness=randomness)
        except ValueError:
            continue
        raise ContractViolation("a fork of none, or with a policy too few, is a ValueError")


async def check_hibernate(engine: Engine) -> None:
    """A hibernated sandbox comes back as it was, by `wake` or by the next call."""
    sandbox, other = await lake(engine, seed=5), await lake(engine, seed=5)
    await sandbox.write_file("note", b"kept")
    sandbox_id = sandbox.id
    actions: list[Value] = [1, 2]
    await sandbox.hibernate()
    await sandbox.hibernate()
    require(await play(sandbox, actions) == await play(other, actions), "a call wakes it")
    await sandbox.hibernate()
    await sandbox.wake()
    await sandbox.wake()
    require(await play(sandbox, actions) == await play(other, actions), "its generators go on")
    require(await sandbox.read_file("note") == b"kept" and sandbox.id == sandbox_id, "files and id stay")
    await sandbox.hibernate()
    [clone] = await engine.fork(await sandbox.checkpoint(), 1, randomness=[INHERIT])
    require(await play(clone, actions) == await play(other, actions), "it can be saved, too")
    await sandbox.hibernate()
    await sandbox.kill()
    await error_of(sandbox.wake(), GuestError)


async def check_kill(engine: Engine) -> None:
    """`kill` is idempotent; whatever is asked afterwards is a `GuestError`."""
    sandbox = await lake(engine, seed=5)
    checkpoint = await sandbox.checkpoint()
    await sandbox.kill()
    await sandbox.kill()
    require(engine.num_sandboxes == 0, "it is no longer counted")
    await require_dead(sandbox)
    async with (await engine.fork(checkpoint))[0] as clone:
        require(await clone.call("ping") is None, "its checkpoint outlives it")
    await require_dead(clone)


async def check_discard(engine: Engine) -> None:
    """A discarded checkpoint is gone; its clones, and their checkpoints, are not."""
    sandbox = await lake(engine, seed=5)
    await sandbox.write_file("note", b"old")
    checkpoint = await sandbox.checkpoint()
    [clone, lazy] = await engine.fork(checkpoint, 2)
    child = await clone.checkpoint()
    await engine.discard(checkpoint)
    await engine.discard(checkpoint)
    await error_of(engine.fork(checkpoint), CheckpointError)
    require(await lazy.read_file("note") == b"old", "a live clone stays whole")
    [grandchild] = await engine.fork(child)
    require(await grandchild.read_file("note") == b"old", "as does a checkpoint below")
    await play(grandchild, [1])


async def check_foreign_checkpoints(engine: Engine) -> None:
    """A checkpoint that this engine did not make, or made otherwise, is refused."""
    sandbox = await engine.boot(IMAGE)
    checkpoint = await sandbox.checkpoint()
    foreign = (
        replace(checkpoint, id=f"{checkpoint.id}0"),
        replace(checkpoint, id="../../etc/passwd"),
        replace(checkpoint, engine="another", fingerprint="another"),
        replace(checkpoint, fingerprint=f"{checkpoint.fingerprint}x"),
    )
    for each in foreign:
        await error_of(engine.fork(each), CheckpointError)
        require(engine.num_sandboxes == 1, "none is left of the attempt")
    await engine.discard(foreign[0])
    require(len(await engine.fork(checkpoint)) == 1, "the real one still works")


async def check_many_at_once(engine: Engine) -> None:
    """Concurrent forks, calls and checkpoints do not disturb each other."""
    sandbox = await lake(engine, seed=5)
    checkpoint = await sandbox.checkpoint()

    async def branch(seed: int) -> tuple[int, Value]:
        [clone] = await engine.fork(checkpoint, 1, randomness=[Randomness.seeded(seed)])
        async with clone:
            reached = await future(clone)
            await engine.discard(await clone.checkpoint())
            return seed, cast("Value", reached)

    once = dict(await asyncio.gather(*(branch(seed) for seed in range(6))))
    again = dict([await branch(seed) for seed in reversed(range(6))])
    require(once == again, "in parallel and in turn, seeds give the same")


async def check_close(engine: Engine) -> None:
    """`close` ends everything, twice if need be."""
    sandbox = await lake(engine, seed=5)
    checkpoint = await sandbox.checkpoint()
    clones = await engine.fork(checkpoint, 2)
    await engine.close()
    await engine.close()
    require(engine.num_sandboxes == 0, "no sandbox is left")
    for each in (sandbox, *clones):
        await require_dead(each)
        await each.kill()
    for attempt in (engine.fork(checkpoint), engine.boot(IMAGE)):
        await error_of(attempt, RolloutError)
