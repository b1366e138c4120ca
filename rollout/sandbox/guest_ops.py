"""The operations on an environment, as requests with checked arguments; the same for the agent and inline.

| operation | arguments | answer |
|---|---|---|
| `env.make` | env_id, kwargs, max_episode_steps | see `GuestEnv.make` |
| `env.reset` | seed, options | observation, reward (null), terminated, truncated, info |
| `env.step` | action, state_hash = false | as reset; state_hash if asked for |
| `env.playout` | horizon, seed, discount = 1.0 | value, num_steps, terminated, truncated |
| `env.state_hash` | | text, or null |
| `env.close` | | null |

All but env_id, action, horizon and the seed of a playout may be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, cast

from rollout.sandbox.agent_args import argument, argument_or, optional_argument
from rollout.sandbox.guest_env import GuestEnv
from rollout.types import Value

__all__ = ["ENV_OPERATIONS"]

Args = dict[str, Value]


def _make(env: GuestEnv, args: Args) -> Value:
    kwargs = cast("Mapping[str, Value] | None", optional_argument(args, "kwargs", dict))
    limit = optional_argument(args, "max_episode_steps", int)
    return cast("Value", env.make(argument(args, "env_id", str), kwargs, limit))


def _reset(env: GuestEnv, args: Args) -> Value:
    options = cast("Mapping[str, Value] | None", optional_argument(args, "options", dict))
    return cast("Value", env.reset(optional_argument(args, "seed", int), options))


def _step(env: GuestEnv, args: Args) -> Value:
    return cast("Value", env.step(args.get("action"), argument_or(args, "state_hash", bool, False)))


def _playout(env: GuestEnv, args: Args) -> Value:
    horizon, seed = argument(args, "horizon", int), argument(args, "seed", int)
    return cast("Value", env.playout(horizon, seed, argument_or(args, "discount", float, 1.0)))


def _state_hash(env: GuestEnv, args: Args) -> Value:
    return env.state_hash()


def _close(env: GuestEnv, args: Args) -> Value:
    env.close()
    return None


ENV_OPERATIONS: Final[Mapping[str, Callable[[GuestEnv, Args], Value]]] = {
    "env.make": _make,
    "env.reset": _reset,
    "env.step": _step,
    "env.playout": _playout,
    "env.state_hash": _state_hash,
    "env.close": _close,
}
