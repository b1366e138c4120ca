"""What a sandbox does with an environment: calls, playouts, randomness, digests."""

from __future__ import annotations

from typing import Any, cast

from rollout.errors import EnvError, GuestError
from rollout.sandbox.base import Engine
from rollout.sandbox.contract.tools import (
    IMAGE,
    INHERIT,
    error_of,
    future,
    lake,
    play,
    require,
)
from rollout.types import Randomness, Value


async def check_calls(engine: Engine) -> None:
    """Environment calls, and refusals that change nothing."""
    sandbox = await engine.boot(IMAGE)
    await error_of(sandbox.call("no.such.operation"), GuestError)
    await error_of(sandbox.call("env.step", action=0), EnvError)
    error = await error_of(sandbox.call("env.make", env_id="FrozenLak-v1"), EnvError)
    require("FrozenLake-v1" in error.message, "an unknown environment's nearest name is told")
    await error_of(sandbox.call("env.make", env_id=7), GuestError)
    await sandbox.call("env.make", env_id="FrozenLake-v1", kwargs={"is_slippery": True})
    await error_of(sandbox.call("env.make", env_id="FrozenLake-v1", kwargs={"no_such": 1}), EnvError)
    sandbox = await lake(engine, seed=5)
    before = await sandbox.call("env.state_hash")
    for action in (4, -1, 1.5, "left", None, [0]):
        await error_of(sandbox.call("env.step", action=cast("Value", action)), EnvError)
    require(await sandbox.call("env.state_hash") == before, "a refused action changes nothing")
    step = await sandbox.call("env.step", action=1)
    keys = {"observation", "reward", "terminated", "truncated", "info"}
    require(isinstance(step, dict) and step.keys() == keys, "a step is Gymnasium's five values")


async def check_arrays(engine: Engine) -> None:
    """Observations that are arrays arrive as such."""
    sandbox = await engine.boot(IMAGE)
    await sandbox.call("env.make", env_id="CartPole-v1")
    first = cast("dict[str, Any]", await sandbox.call("env.reset", seed=1))["observation"]
    second = cast("dict[str, Any]", await sandbox.call("env.step", action=1))["observation"]
    require(first.shape == second.shape == (4,) and first.dtype.str == "<f4", "with shape and type")
    require(bool((first != second).any()), "and a later step does not change an earlier observation")


async def check_seeded(engine: Engine) -> None:
    """Equal seeds give equal futures, other seeds others."""
    sandbox = await lake(engine, seed=5)
    checkpoint = await sandbox.checkpoint()
    policies = [Randomness.seeded(seed) for seed in (1, 1, 2, 3, 4)]
    futures = [await future(clone) for clone in await engine.fork(checkpoint, 5, randomness=policies)]
    require(futures[0] == futures[1], "equal seeds, equal futures")
    require(len({str(future) for future in futures}) > 2, "other seeds, other futures")
    [later] = await engine.fork(checkpoint, 1, randomness=[policies[0]])
    require(await future(later) == futures[0], "whenever the clone is made")


async def check_unique(engine: Engine) -> None:
    """Clones differ unless told otherwise."""
    sandbox = await lake(engine, seed=5)
    clones = await engine.fork(await sandbox.checkpoint(), 6)
    futures = [await future(clone) for clone in clones]
    require(len({str(future) for future in futures}) > 2, "unique clones have different futures")


async def check_inherit(engine: Engine) -> None:
    """`inherit` is an exact continuation: of the generators too."""
    sandbox = await lake(engine, seed=5)
    await play(sandbox, [1])
    checkpoint = await sandbox.checkpoint()
    clones = await engine.fork(checkpoint, 2, randomness=[INHERIT] * 2)
    expected = await future(sandbox)
    require([await future(clone) for clone in clones] == [expected] * 2, "clones and original agree")


async def check_playout(engine: Engine) -> None:
    """Random playouts are functions of their seeds and leave the checkpoint alone."""
    sandbox = await lake(engine, seed=5)
    checkpoint = await sandbox.checkpoint()
    policies = [Randomness.seeded(1)] * 3
    first, second, third = await engine.fork(checkpoint, 3, randomness=policies)
    played = await first.call("env.playout", horizon=20, seed=7, discount=0.9)
    require(played == await second.call("env.playout", horizon=20, seed=7, discount=0.9), "equal seeds agree")
    none = await third.call("env.playout", horizon=0, seed=7)
    expected = {"value": 0.0, "num_steps": 0, "terminated": False, "truncated": False}
    require(none == expected, "a playout of no steps is nothing")
    [fresh] = await engine.fork(checkpoint, 1, randomness=[Randomness.seeded(1)])
    require(await future(fresh) == await future(third), "the checkpoint is as it was")


async def check_state_hash(engine: Engine) -> None:
    """Equal states have equal digests whatever their generators, other states others."""
    sandbox = await lake(engine, seed=5)
    before = await sandbox.call("env.state_hash")
    policies = [Randomness.seeded(1), Randomness.seeded(2)]
    clones = await engine.fork(await sandbox.checkpoint(), 2, randomness=policies)
    for clone in clones:
        require(await clone.call("env.state_hash") == before, "generators are no part of the state")
    await clones[0].call("env.step", action=0)
    require(await clones[0].call("env.state_hash") != before, "the elapsed steps are")


async def seeded_trace(engine: Engine) -> list[Value]:
    """What seeds alone decide, of several environments: to be equal on all engines."""
    trace: list[Value] = []
    first = await lake(engine, seed=11)
    trace += [await first.call("env.state_hash"), *(await play(first, [0, 1, 2, 3]))]
    checkpoint = await first.checkpoint()
    for seed in range(4):
        [clone] = await engine.fork(checkpoint, 1, randomness=[Randomness.seeded(seed)])
        trace += [await clone.call("env.step", action=1, state_hash=True)]
        trace += [await clone.call("env.playout", horizon=30, seed=seed, discount=0.99)]
        await clone.kill()
    for env_id in ("CartPole-v1", "Acrobot-v1", "Blackjack-v1", "Pendulum-v1"):
        sandbox = await engine.boot(IMAGE)
        made = cast("dict[str, Value]", await sandbox.call("env.make", env_id=env_id))
        trace += [made["observation_space"], made["action_space"]]
        trace += [await sandbox.call("env.reset", seed=3)]
        checkpoint = await sandbox.checkpoint()
        [clone] = await engine.fork(checkpoint, 1, randomness=[Randomness.seeded(8)])
        trace += [await clone.call("env.playout", horizon=8, seed=5), await clone.call("env.state_hash")]
        await sandbox.kill()
        await clone.kill()
    return trace
