"""What the checks are written with."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Final, cast

from rollout.errors import GuestError, RolloutError
from rollout.sandbox.base import Engine, Sandbox
from rollout.types import Randomness, RngPolicy, Value

__all__ = [
    "IMAGE",
    "INHERIT",
    "ContractViolation",
    "error_of",
    "future",
    "lake",
    "play",
    "require",
    "require_dead",
]

IMAGE: Final = "default"
"""What is booted; engines without images ignore it."""
INHERIT: Final = Randomness(RngPolicy.INHERIT)


class ContractViolation(AssertionError):
    """An engine broke a promise."""


def require(condition: bool, promise: str) -> None:
    """Raises `ContractViolation` with the promise unless the condition holds."""
    if not condition:
        raise ContractViolation(promise)


async def error_of(attempt: Awaitable[object], kind: type[RolloutError]) -> RolloutError:
    """The error of a kind that an attempt must end in."""
    try:
        result = await attempt
    except kind as error:
        return error
    raise ContractViolation(f"a {kind.__name__} is due, not {result!r}")


async def require_dead(sandbox: Sandbox) -> None:
    """Whatever is asked of the sandbox must be a `GuestError`."""
    for attempt in (
        sandbox.call("ping"),
        sandbox.exec(["true"]),
        sandbox.read_file("note"),
        sandbox.write_file("note", b""),
        sandbox.checkpoint(),
        sandbox.hibernate(),
        sandbox.wake(),
    ):
        await error_of(attempt, GuestError)


async def lake(engine: Engine, seed: int) -> Sandbox:
    """A sandbox at the beginning of an episode on slippery ice."""
    sandbox = await engine.boot(IMAGE)
    await sandbox.call("env.make", env_id="FrozenLake-v1", kwargs={"is_slippery": True})
    await sandbox.call("env.reset", seed=seed)
    return sandbox


async def play(sandbox: Sandbox, actions: Sequence[Value]) -> list[dict[str, Value]]:
    """The steps that actions lead to."""
    return [cast("dict[str, Value]", await sandbox.call("env.step", action=action)) for action in actions]


async def future(sandbox: Sandbox) -> list[Value]:
    """Twelve actions that mostly bump into the lake's corner, where only chance decides what happens."""
    steps = await play(sandbox, [0, 3] * 6)
    return [step["observation"] for step in steps]
