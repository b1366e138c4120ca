"""A batch of sandboxed environments, stepped at the same time: what `gymnasium.make_vec` picks.

All sandboxes are clones of one, in one engine. The three autoreset modes behave as those of Gymnasium's own
`SyncVectorEnv`: equal seeds and actions give equal batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from envs.bridge import SharedEngine
from envs.gym import GymEnv
from envs.sandbox import boot_player, engine_settings
from rollout import spaces
from rollout.config import ImageConfig
from rollout.sandbox.base import Engine, Sandbox
from rollout.types import Step, Value

__all__ = ["SandboxVectorEnv"]

T = TypeVar("T")

Array = np.ndarray[Any, Any]


class SandboxVectorEnv(gymnasium.vector.VectorEnv[Any, Any, Array]):
    """See the module.

    Args:
        num_envs: Sandboxes.
        autoreset_mode: When an episode that has ended gives way to the next.
        max_episode_steps: The same as `time_limit`, under the name that `gymnasium.make_vec` uses.
        env_id: As for `envs.sandbox.SandboxEnv`, and so are the others.
        engine: As there.
        kwargs: As there.
        time_limit: As there.
        image: As there.
        engine_config: As there.

    Raises:
        ConfigError: A setting is unknown or out of range.
        BootError: This machine lacks what the engine needs, or the sandbox did not come up.
        ForkError: There is no room for so many sandboxes.
        EnvError: The environment does not exist or cannot be made.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        env_id: str,
        num_envs: int = 1,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        engine: str = "auto",
        kwargs: Mapping[str, Value] | None = None,
        time_limit: int | None = None,
        max_episode_steps: int | None = None,
        image: str = "default",
        engine_config: Mapping[str, object] | None = None,
    ) -> None:
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self._player = GymEnv(env_id, kwargs, time_limit if max_episode_steps is None else max_episode_steps)
        self._shared = SharedEngine(engine_settings(engine, engine_config), ImageConfig(name=image))
        try:
            booting = _boot_many(self._shared.engine, self._shared.image, self._player, num_envs)
            self._sandboxes = self._shared.run(booting)
        except BaseException:
            self._shared.release()
            raise
        self.single_observation_space = self._player.observation_space
        self.single_action_space = self._player.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._observations: list[Any] = [None] * num_envs
        self._has_ended = np.zeros(num_envs, dtype=np.bool_)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begins episodes: in all sandboxes, or in those that `options["reset_mask"]` marks.

        Args:
            seed: One for each sandbox; an integer stands for itself and its successors.
            options: The mask, a boolean array of shape [num_envs]; the rest is for the environments.

        Raises:
            ValueError: Seeds or mask do not fit the number of sandboxes, or the mask marks none.
            TypeError: The mask is not a boolean array.
        """
        seeds = self._seeds(seed)
        options = dict(options or {})
        mask = self._mask(options.pop("reset_mask", None))
        chosen = [int(index) for index in np.flatnonzero(mask)]
        resets = [self._begin(index, seeds[index], options) for index in chosen]
        infos: dict[str, Any] = {}
        for index, step in zip(chosen, self._shared.run(_all(resets)), strict=True):
            self._observations[index] = self._element(step)
            infos = self._add_info(infos, dict(step.info), index)
        self._has_ended[mask] = False
        return self._batch(), infos

    def step(self, actions: Any) -> tuple[Any, Array, Array, Array, dict[str, Any]]:
        """Applies one action in each sandbox.

        Raises:
            gymnasium.error.ResetNeeded: Without autoreset: an episode has ended and not been reset.
            EnvError: An action is outside the space, or an environment raised; the batch is then out of step:
                reset it.
        """
        if self.autoreset_mode is AutoresetMode.DISABLED and self._has_ended.any():
            ended = np.flatnonzero(self._has_ended).tolist()
            raise gymnasium.error.ResetNeeded(f"episodes {ended} have ended: reset them with a reset_mask")
        moves = [
            self._move(index, action) for index, action in enumerate(iterate(self.action_space, actions))
        ]
        rewards = np.zeros(self.num_envs, dtype=np.float64)
        terminations = np.zeros(self.num_envs, dtype=np.bool_)
        truncations = np.zeros(self.num_envs, dtype=np.bool_)
        infos: dict[str, Any] = {}
        for index, (step, next_step) in enumerate(self._shared.run(_all(moves))):
            rewards[index] = step.reward or 0.0
            terminations[index], truncations[index] = step.terminated, step.truncated
            if next_step is not None:
                final = {"final_obs": self._element(step), "final_info": dict(step.info)}
                infos = self._add_info(infos, final, index)
                step = next_step
            self._observations[index] = self._element(step)
            infos = self._add_info(infos, dict(step.info), index)
        self._has_ended = terminations | truncations
        return self._batch(), rewards, terminations, truncations, infos

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the sandboxes and their engine."""
        self._shared.release()

    async def _move(self, index: int, action: Any) -> tuple[Step, Step | None]:
        """One sandbox's part of a step: what came of it, and the first step of an episode that follows."""
        if self._has_ended[index] and self.autoreset_mode is AutoresetMode.NEXT_STEP:
            return await self._begin(index, None, {}), None
        step = await self._player.step(self._sandboxes[index], spaces.plain(action))
        if self.autoreset_mode is AutoresetMode.SAME_STEP and (step.terminated or step.truncated):
            return step, await self._begin(index, None, {})
        return step, None

    async def _begin(self, index: int, seed: int | None, options: dict[str, Any]) -> Step:
        return await self._player.begin(self._sandboxes[index], seed=seed, options=options or None)

    def _element(self, step: Step) -> Any:
        return spaces.element(self.single_observation_space, step.observation)

    def _batch(self) -> Any:
        space = self.single_observation_space
        return concatenate(space, self._observations, create_empty_array(space, self.num_envs, fn=np.zeros))

    def _seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int):
            return [seed + index for index in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"{len(seed)} seeds for {self.num_envs} environments")
        return seed

    def _mask(self, mask: object) -> Array:
        if mask is None:
            return np.ones(self.num_envs, dtype=np.bool_)
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            raise TypeError(f"options['reset_mask'] must be a boolean array, not {mask!r}")
        if mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"options['reset_mask'] must mark at least one of {self.num_envs} environments, not {mask!r}"
            )
        return mask


async def _boot_many(engine: Engine, image: str, player: GymEnv, num_envs: int) -> Sequence[Sandbox]:
    first = await boot_player(engine, image, player)
    async with first:
        return await engine.fork(await first.checkpoint(), num_envs)


async def _all(works: Sequence[Awaitable[T]]) -> list[T]:
    """The results of all; if some fail, the first of their errors, once all have ended."""
    results = await asyncio.gather(*works, return_exceptions=True)
    done: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done
