"""A child that goes on in its parent's sandbox: as a clone would, if the sandbox is as it was saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from rollout.errors import CheckpointError, GuestError
from rollout.sandbox.base import Engine, Sandbox
from rollout.sandbox.contract.tools import INHERIT, error_of, future, lake, play, require
from rollout.types import Randomness, Value


async def _facts(sandbox: Sandbox) -> Sequence[Value]:
    """What generators and state decide: steps by chance, a playout, a digest."""
    steps = await future(sandbox)
    return [
        steps,
        await sandbox.call("env.playout", horizon=20, seed=7),
        await sandbox.call("env.state_hash"),
    ]


async def check_take_over_seeded(engine: Engine) -> None:
    """With a seed it gives the very same steps as a clone with that seed, whatever other seeds give."""
    found: list[str] = []
    for seed in range(3):
        sandbox = await lake(engine, seed=5)
        checkpoint = await sandbox.checkpoint()
        [clone] = await engine.fork(checkpoint, 1, randomness=[Randomness.seeded(seed)])
        await sandbox.take_over(Randomness.seeded(seed))
        found.append(str(await _facts(sandbox)))
        require(found[-1] == str(await _facts(clone)), "equal seeds, equal futures, cloned or continued")
        await sandbox.kill()
    require(len(set(found)) > 1, "other seeds, other futures")


async def check_take_over_unique(engine: Engine) -> None:
    """Unless told otherwise no two go on alike."""
    futures: list[str] = []
    for _ in range(5):
        sandbox = await lake(engine, seed=5)
        await sandbox.checkpoint()
        await sandbox.take_over(Randomness())
        futures.append(str(await future(sandbox)))
        await sandbox.kill()
    require(len(set(futures)) > 2, "unique continuations have different futures")


async def check_take_over_inherit(engine: Engine) -> None:
    """`inherit` is an exact continuation, as in a clone."""
    sandbox = await lake(engine, seed=5)
    await play(sandbox, [1])
    checkpoint = await sandbox.checkpoint()
    [clone] = await engine.fork(checkpoint, 1, randomness=[INHERIT])
    await sandbox.take_over(INHERIT)
    require(await future(sandbox) == await future(clone), "clone and continuation agree")


async def check_take_over_again(engine: Engine) -> None:
    """A chain of children in one sandbox is as a chain of clones; parents are told, and id and files stay."""
    sandbox = await lake(engine, seed=5)
    sandbox_id = sandbox.id
    await sandbox.write_file("note", b"kept")
    checkpoint = await sandbox.checkpoint()
    for depth in range(4):
        how = Randomness.seeded(depth)
        [clone] = await engine.fork(checkpoint, 1, randomness=[how])
        await sandbox.take_over(how)
        require(sandbox.parent_id == checkpoint.id, "its parent is the checkpoint, as a clone's is")
        require(sandbox.id == sandbox_id, "its id stays")
        expected = await play(clone, [2, 0])
        require(await play(sandbox, [2, 0]) == expected, f"the child at depth {depth + 1} is a clone's equal")
        checkpoint = await sandbox.checkpoint()
        require(checkpoint.parent_id == clone.parent_id, "and so is its checkpoint's parent")
        await clone.kill()
    [last] = await engine.fork(checkpoint)
    require(await last.read_file("note") == b"kept", "files go along")


async def check_take_over_spoilt(engine: Engine) -> None:
    """Whoever has gone on since, or was never saved, is refused, and goes on as if nobody had asked."""
    sandbox, twin = await lake(engine, seed=5), await lake(engine, seed=5)
    await error_of(sandbox.take_over(INHERIT), CheckpointError)
    await sandbox.write_file("note", b"x")
    checkpoint = await sandbox.checkpoint()
    await play(sandbox, [1])
    await error_of(sandbox.take_over(Randomness.seeded(1)), CheckpointError)
    require(sandbox.parent_id is None, "it is still the child of nobody")
    await play(twin, [1])
    require(await play(sandbox, [0, 2]) == await play(twin, [0, 2]), "a refusal changes nothing")
    for spoil in (
        lambda: sandbox.read_file("note"),
        lambda: sandbox.write_file("note", b"y"),
        lambda: sandbox.exec(["true"]),
        lambda: sandbox.call("env.state_hash"),
    ):
        await sandbox.checkpoint()
        await spoil()
        await error_of(sandbox.take_over(INHERIT), CheckpointError)
    await sandbox.hibernate()
    await error_of(sandbox.take_over(INHERIT), CheckpointError)
    await sandbox.checkpoint()
    await sandbox.take_over(INHERIT)
    await error_of(sandbox.take_over(INHERIT), CheckpointError)
    require(len(await engine.fork(checkpoint)) == 1, "the checkpoint is as it was")


async def check_take_over_siblings(engine: Engine) -> None:
    """What goes on in the parent's sandbox is hidden from clones, made before and after, as a clone's is."""
    sandbox = await lake(engine, seed=5)
    await sandbox.write_file("shared", b"parent")
    checkpoint = await sandbox.checkpoint()
    [before] = await engine.fork(checkpoint, 1, randomness=[INHERIT])
    await sandbox.take_over(Randomness.seeded(3))
    await sandbox.write_file("shared", b"child")
    await sandbox.exec(["sh", "-c", "echo more >> shared"])
    while not (await play(sandbox, [2]))[0]["terminated"]:
        pass
    [after] = await engine.fork(checkpoint, 1, randomness=[INHERIT])
    actions: list[Value] = [0, 1, 2, 1]
    steps = [cast("Value", await play(each, actions)) for each in (before, after)]
    require(steps[0] == steps[1], "siblings go on from the checkpoint, whenever they were made")
    for each in (before, after):
        require(await each.read_file("shared") == b"parent", "with its files")
    await sandbox.kill()
    require(await before.call("ping") is None, "the end of the child is its own")


async def check_take_over_without_checkpoint(engine: Engine) -> None:
    """The checkpoint may have been discarded, and the sandbox may have hibernated; a dead one is dead."""
    for hibernates in (False, True):
        sandbox = await lake(engine, seed=5)
        checkpoint = await sandbox.checkpoint()
        [clone] = await engine.fork(checkpoint, 1, randomness=[Randomness.seeded(4)])
        await engine.discard(checkpoint)
        if hibernates:
            await sandbox.hibernate()
        await sandbox.take_over(Randomness.seeded(4))
        require(await _facts(sandbox) == await _facts(clone), "it goes on as the clone does")
        await sandbox.checkpoint()
        await sandbox.kill()
        await error_of(sandbox.take_over(INHERIT), GuestError)
