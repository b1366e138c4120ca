"""Any Gymnasium environment in a sandbox, as a Gymnasium environment that can be saved, restored and forked.

    import envs, gymnasium
    env = gymnasium.make("rollout/Sandbox-v0", env_id="FrozenLake-v1", engine="process")
    env.reset(seed=0)
    saved = env.checkpoint()
    ...
    env.restore(saved)
    four = env.fork(4)

Invariants:

- All state of an episode is in the sandbox: the wrappers that `gymnasium.make` puts around the environment
  (time limit, order) are inside, and none is outside.
- Clones share one engine, which is closed with the last of them. A checkpoint lives until it is discarded or
  the engine is closed.

Not guaranteed: rendering; and a `max_episode_steps` given to `gymnasium.make` itself puts a wrapper outside,
which a checkpoint does not hold: give `time_limit` instead.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import gymnasium

from envs.bridge import SharedEngine
from envs.gym import GymEnv
from rollout import spaces
from rollout.config import EngineConfig, ImageConfig, check_config
from rollout.sandbox.base import Checkpoint, Engine, Sandbox
from rollout.types import Randomness, RngPolicy, Value

__all__ = ["SandboxEnv", "boot_player", "engine_settings"]

_INHERIT = Randomness(RngPolicy.INHERIT)


class SandboxEnv(gymnasium.Env[Any, Any]):
    """See the module.

    Args:
        env_id: The environment that is played in the sandbox.
        engine: `process`, `inline`, `microvm`, or `auto` for the strongest wall that this machine has.
        kwargs: Of that environment.
        time_limit: Steps after which its episodes are truncated; None is its registered limit, -1 is none.
        image: The guest image, for microVMs.
        engine_config: Further settings of the engine, as in the section `engine` of a run's configuration.

    Raises:
        ConfigError: A setting is unknown or out of range.
        BootError: This machine lacks what the engine needs, or the sandbox did not come up.
        EnvError: The environment does not exist or cannot be made.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (as Gymnasium declares it)

    def __init__(
        self,
        env_id: str,
        engine: str = "auto",
        kwargs: Mapping[str, Value] | None = None,
        time_limit: int | None = None,
        image: str = "default",
        engine_config: Mapping[str, object] | None = None,
    ) -> None:
        player = GymEnv(env_id, kwargs, time_limit)
        shared = SharedEngine(engine_settings(engine, engine_config), ImageConfig(name=image))
        try:
            sandbox = shared.run(boot_player(shared.engine, shared.image, player))
        except BaseException:
            shared.release()
            raise
        self._attach(shared, player, sandbox)

    def _attach(self, shared: SharedEngine, player: GymEnv, sandbox: Sandbox) -> None:
        self._shared = shared
        self._player = player
        self._sandbox: Sandbox | None = sandbox
        self.observation_space = copy.deepcopy(player.observation_space)
        self.action_space = copy.deepcopy(player.action_space)

    @property
    def sandbox(self) -> Sandbox:
        """The sandbox, whose methods are for the engine's own event loop.

        Raises:
            gymnasium.error.ClosedEnvironmentError: The environment is closed.
        """
        if self._sandbox is None:
            raise gymnasium.error.ClosedEnvironmentError("this sandboxed environment is closed")
        return self._sandbox

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begins an episode; see `gymnasium.Env.reset`."""
        super().reset(seed=seed)
        step = self._shared.run(self._player.begin(self.sandbox, seed=seed, options=options))
        return spaces.element(self.observation_space, step.observation), dict(step.info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Applies an action; see `gymnasium.Env.step`.

        Raises:
            EnvError: It is outside the space, or the environment raised.
        """
        step = self._shared.run(self._player.step(self.sandbox, spaces.plain(action)))
        observation = spaces.element(self.observation_space, step.observation)
        return observation, step.reward or 0.0, step.terminated, step.truncated, dict(step.info)

    def checkpoint(self) -> Checkpoint:
        """Saves the sandbox: the environment, its wrappers, its generators and whatever else is in it.

        Raises:
            CheckpointError: It cannot be saved.
        """
        return self._shared.run(self.sandbox.checkpoint())

    def restore(self, checkpoint: Checkpoint, *, randomness: Randomness = _INHERIT) -> None:
        """Goes back (or over) to a checkpoint of this environment or of one that it was forked from.

        Args:
            checkpoint: What to restore; it stays valid.
            randomness: By default an exact continuation, with the generators as they were saved.

        Raises:
            CheckpointError: It is unknown, discarded, or of another engine; the environment is as before.
            ForkError: It could not be restored; the environment is as before.
        """
        before = self.sandbox
        (clone,) = self._shared.run(self._shared.engine.fork(checkpoint, 1, randomness=[randomness]))
        self._sandbox = clone
        self._shared.run(before.kill())

    def discard(self, checkpoint: Checkpoint) -> None:
        """Frees a checkpoint. Idempotent."""
        self._shared.run(self._shared.engine.discard(checkpoint))

    def fork(self, n: int = 1, *, randomness: Sequence[Randomness] | None = None) -> list[Self]:
        """Makes n environments that go on from here, each for itself.

        Args:
            n: How many.
            randomness: One for each clone; by default every clone's generators are fresh.

        Raises:
            CheckpointError: The sandbox cannot be saved.
            ForkError: There is none of them.
        """
        clones = self._shared.run(_fork(self._shared.engine, self.sandbox, n, randomness))
        return [self._copy_onto(clone) for clone in clones]

    def close(self) -> None:
        """Ends the sandbox, and with the last clone the engine. Idempotent."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            try:
                self._shared.run(sandbox.kill())
            finally:
                self._shared.release()

    def _copy_onto(self, sandbox: Sandbox) -> Self:
        clone = type(self).__new__(type(self))
        self._shared.retain()
        clone._attach(self._shared, self._player, sandbox)
        clone.spec = self.spec
        clone._np_random = copy.deepcopy(self._np_random)
        clone._np_random_seed = self._np_random_seed
        return clone


def engine_settings(kind: str, further: Mapping[str, object] | None) -> EngineConfig:
    """The engine's configuration.

    Raises:
        ConfigError: A setting is unknown or out of range.
    """
    return check_config({"engine": {**(further or {}), "kind": kind}}).engine


async def boot_player(engine: Engine, image: str, player: GymEnv) -> Sandbox:
    """A fresh sandbox with the environment made in it."""
    sandbox = await engine.boot(image)
    try:
        await player.prepare(sandbox)
    except BaseException:
        await sandbox.kill()
        raise
    return sandbox


async def _fork(
    engine: Engine, sandbox: Sandbox, n: int, randomness: Sequence[Randomness] | None
) -> Sequence[Sandbox]:
    checkpoint = await sandbox.checkpoint()
    try:
        return await engine.fork(checkpoint, n, randomness=randomness)
    finally:
        await engine.discard(checkpoint)
