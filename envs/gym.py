"""Any Gymnasium environment, played inside a sandbox.

The environment lives in the guest alone: the host neither has it nor runs its code, and learns its spaces
from the first sandbox that is prepared.

Not guaranteed: that an environment which draws from generators of its own (outside `np_random`, Python's
`random` and numpy's legacy one) repeats with its seeds; see `rollout.sandbox.guest_env`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import gymnasium

from rollout import spaces
from rollout.env import Task
from rollout.errors import ConfigError, EnvError, GuestError
from rollout.sandbox.base import Sandbox
from rollout.sandbox.wire import shown
from rollout.types import PlayoutRequest, PlayoutResult, Step, Value

__all__ = ["GymEnv"]

_MAKE_TIMEOUT_S: Final = 120.0
"""For importing and constructing an environment, which a cold guest takes long for."""
_STEP_TIMEOUT_S: Final = 60.0
_LEARNT: Final = ("observation_space", "action_space", "spec_id", "max_episode_steps")
"""What of `env.make`'s answer must be equal in all sandboxes."""


class GymEnv:
    """Plays `gymnasium.make(env_id, **kwargs)`; an `Env`.

    Args:
        env_id: As registered with Gymnasium in the guest; `module:id` imports the module first.
        kwargs: Of the environment.
        max_episode_steps: Of its time limit; None is the registered one, -1 is none.
        unknown: Refused.

    Raises:
        ConfigError: An argument is unknown, missing or mistyped.
    """

    def __init__(
        self,
        env_id: str = "",
        kwargs: Mapping[str, Value] | None = None,
        max_episode_steps: int | None = None,
        **unknown: object,
    ) -> None:
        _check_arguments(env_id, kwargs, max_episode_steps, unknown)
        self._env_id = env_id
        self._kwargs = dict(kwargs or {})
        self._max_episode_steps = max_episode_steps
        self._description: dict[str, Value] | None = None
        self._spaces: tuple[gymnasium.Space[Any], gymnasium.Space[Any]] | None = None

    @property
    def id(self) -> str:
        """The environment's id as given."""
        return self._env_id

    @property
    def description(self) -> Value:
        """Spaces, registered id and time limit; None before the first `prepare` or `learn`."""
        return cast("Value", self._description)

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        """Built from the guest's description.

        Raises:
            EnvError: Nothing has been prepared or learnt.
        """
        return self._known_spaces()[0]

    @property
    def action_space(self) -> gymnasium.Space[Any]:
        """Built from the guest's description.

        Raises:
            EnvError: Nothing has been prepared or learnt.
        """
        return self._known_spaces()[1]

    @property
    def max_episode_steps(self) -> int | None:
        """Of the time limit; None if there is none, or nothing has been prepared or learnt."""
        return (
            None if self._description is None else cast("int | None", self._description["max_episode_steps"])
        )

    def learn(self, description: Value) -> None:
        """Takes in the description of an equal environment.

        Raises:
            EnvError: It is malformed, or differs from what is known.
        """
        if not isinstance(description, dict) or not all(key in description for key in _LEARNT):
            raise EnvError(f"the description of {self._env_id!r} is malformed")
        observation_space = spaces.build(description["observation_space"])
        action_space = spaces.build(description["action_space"])
        if self._spaces is None:
            self._description = {key: description[key] for key in _LEARNT}
            self._spaces = observation_space, action_space
        elif self._spaces != (observation_space, action_space):
            raise EnvError(
                f"two sandboxes made different environments of {self._env_id!r}: "
                f"spaces {self._spaces} and {(observation_space, action_space)}"
            )

    def tasks(self) -> Sequence[Task]:
        """One task: the environment as it is configured."""
        return (Task(self._env_id),)

    def actions(self, step: Step) -> Sequence[Value]:
        """The legal actions: all of the space, or those that `info["action_mask"]` allows.

        Raises:
            EnvError: The space is infinite or has more than 4096 actions, or the mask does not fit.
        """
        return spaces.enumerate_actions(self.action_space, step.info.get("action_mask"))

    async def prepare(self, sandbox: Sandbox) -> None:
        """Makes the environment in the sandbox, and learns its spaces.

        Raises:
            EnvError: It does not exist (the nearest id is named), cannot be made, or is another than in the
                sandbox before.
        """
        description = await sandbox.call(
            "env.make",
            timeout_s=_MAKE_TIMEOUT_S,
            env_id=self._env_id,
            kwargs=cast("Value", self._kwargs),
            max_episode_steps=self._max_episode_steps,
        )
        self.learn(description)

    async def reset(self, sandbox: Sandbox, task: Task, seed: int) -> Step:
        """Begins an episode; the task's args are the environment's reset options.

        Raises:
            EnvError: The environment raised.
        """
        return await self.begin(sandbox, seed=seed, options=task.args or None)

    async def begin(
        self, sandbox: Sandbox, *, seed: int | None, options: Mapping[str, Value] | None = None
    ) -> Step:
        """Begins an episode as Gymnasium's `reset` does: without a seed the generators go on.

        Raises:
            EnvError: The environment raised.
        """
        given = None if options is None else cast("Value", dict(options))
        return _step(await sandbox.call("env.reset", timeout_s=_MAKE_TIMEOUT_S, seed=seed, options=given))

    async def step(self, sandbox: Sandbox, action: Value, *, state_hash: bool = False) -> Step:
        """Applies one action; the guest checks it against the space.

        Raises:
            EnvError: It is outside the space (nothing has changed), or the environment raised.
        """
        answer = await sandbox.call(
            "env.step", timeout_s=_STEP_TIMEOUT_S, action=action, state_hash=state_hash
        )
        return _step(answer)

    async def playout(self, sandbox: Sandbox, request: PlayoutRequest) -> PlayoutResult:
        """Plays random actions in the guest, one call for all of them.

        Raises:
            EnvError: The environment raised.
        """
        answer = await sandbox.call(
            "env.playout",
            timeout_s=_STEP_TIMEOUT_S,
            horizon=request.horizon,
            seed=request.seed,
            discount=request.discount,
        )
        match answer:
            case {
                "value": float(value),
                "num_steps": int(num_steps),
                "terminated": bool(terminated),
                "truncated": bool(truncated),
            } if 0 <= num_steps <= request.horizon:
                return PlayoutResult(value, num_steps, terminated, truncated)
            case _:
                raise GuestError(f"the guest answered a playout with garbage: {shown(answer)}")

    def _known_spaces(self) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any]]:
        if self._spaces is None:
            raise EnvError(f"the spaces of {self._env_id!r} are known once a sandbox has been prepared")
        return self._spaces


def _step(answer: Value) -> Step:
    match answer:
        case {
            "observation": observation,
            "reward": None | float() as reward,
            "terminated": bool(terminated),
            "truncated": bool(truncated),
            "info": dict(info),
            **rest,
        }:
            state_hash = rest.get("state_hash")
            if state_hash is None or isinstance(state_hash, str):
                return Step(observation, reward, terminated, truncated, cast("Any", info), state_hash)
        case _:
            pass
    raise GuestError(f"the guest answered a step with garbage: {shown(answer)}")


def _check_arguments(
    env_id: object, kwargs: object, max_episode_steps: object, unknown: Mapping[str, object]
) -> None:
    if unknown:
        names = ", ".join(repr(name) for name in unknown)
        raise ConfigError(f"GymEnv has no argument {names}; it takes env_id, kwargs and max_episode_steps")
    if not isinstance(env_id, str) or not env_id:
        raise ConfigError(f"GymEnv needs env_id, the name of a Gymnasium environment, not {env_id!r}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ConfigError(f"GymEnv: kwargs must be a table, not {kwargs!r}")
    is_limit = type(max_episode_steps) is int and (max_episode_steps > 0 or max_episode_steps == -1)
    if max_episode_steps is not None and not is_limit:
        raise ConfigError(
            f"GymEnv: max_episode_steps must be at least 1 (or -1: none), not {max_episode_steps!r}"
        )
