"""The Gymnasium environment inside the guest: made, reset, stepped, played out, reseeded, digested.

Everything that an episode knows is in this object. The agent serves its methods over the guest channel; the
inline engine calls them directly. Equal seeds give equal observations wherever it runs: every random choice
made here is a function of a seed in the request.

What it cannot reseed: generators that an environment keeps under names of its own, or inside a C library.
They start from `reset(seed=...)` and are part of the state, so they are cloned with it, but a `seeded` or
`unique` clone goes on with them as `inherit` would.
"""

from __future__ import annotations

import difflib
import platform
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from rollout.errors import EnvError
from rollout.sandbox import guest_rng
from rollout.sandbox.guest_hash import UnhashableState, state_digest
from rollout.types import Value

if TYPE_CHECKING:
    import gymnasium
    import numpy as np

__all__ = ["GuestEnv"]

_DRAWS_AT_ONCE = 32


class GuestEnv:
    """One environment, and the legal actions that its last `info` named.

    Args:
        seeds_globals: Whether `reseed` and `reset` seed the process-wide generators too: right in a process
            that is the sandbox's alone.
        state: What `GuestEnv.state` gave: this object then continues that one.
    """

    __slots__ = ("_env", "_mask", "_seeds_globals")

    def __init__(self, *, seeds_globals: bool, state: tuple[Any, Any] = (None, None)) -> None:
        self._seeds_globals = seeds_globals
        self._env: gymnasium.Env[Any, Any] | None
        self._env, self._mask = state

    @property
    def state(self) -> tuple[Any, Any]:
        """Everything that the episode knows, the process-wide generators apart: to be copied, not changed."""
        return self._env, self._mask

    @property
    def env(self) -> gymnasium.Env[Any, Any]:
        """The environment, with its wrappers.

        Raises:
            EnvError: None has been made.
        """
        if self._env is None:
            raise EnvError("no environment has been made in this sandbox: call env.make first")
        return self._env

    @property
    def is_made(self) -> bool:
        """An environment has been made and not closed."""
        return self._env is not None

    def make(
        self, env_id: str, kwargs: Mapping[str, Value] | None = None, max_episode_steps: int | None = None
    ) -> dict[str, Value]:
        """Makes the environment, in place of an earlier one.

        Returns:
            observation_space, action_space: their descriptions (`rollout.spaces.describe`);
            spec_id: the id as registered;
            max_episode_steps: of the time limit, or None;
            versions: of Python, numpy and gymnasium;
            state_hash_error: None, or why the environment's state cannot be digested.

        Raises:
            EnvError: It does not exist (the nearest id is named) or cannot be made.
        """
        self.close()
        env = _make(env_id, kwargs or {}, max_episode_steps)
        spaces = _spaces()
        try:
            reply: dict[str, Value] = {
                "observation_space": spaces.describe(env.observation_space),
                "action_space": spaces.describe(env.action_space),
                **_spec_of(env, max_episode_steps),
                "versions": cast("dict[str, Value]", _versions()),
                "state_hash_error": _digest_error(env),
            }
        except EnvError:
            env.close()
            raise
        self._env = env
        return reply

    def reset(self, seed: int | None = None, options: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """Begins an episode; a seed fixes every generator that `reseed` knows, and Gymnasium's own way too.

        Raises:
            EnvError: The environment raised.
        """
        env = self.env
        if seed is not None:
            self.reseed(seed)
        try:
            observation, info = env.reset(seed=seed, options=None if options is None else dict(options))
        except Exception as error:
            raise EnvError.wrap(error, "the environment raised in reset") from error
        return self._answer(observation, None, False, False, info)

    def step(self, action: Value, state_hash: bool = False) -> dict[str, Value]:
        """Applies one action.

        Raises:
            EnvError: The action is outside the space (nothing has changed), or the environment raised.
        """
        env = self.env
        action_space = env.action_space
        spaces = _spaces()
        native: Any = action if type(action) is int else spaces.element(action_space, action)
        if not spaces.contains(action_space, native):
            raise EnvError(f"the action {_short(action)} is outside the action space {action_space}")
        try:
            observation, reward, terminated, truncated, info = env.step(native)
        except Exception as error:
            raise EnvError.wrap(error, "the environment raised in step") from error
        answer = self._answer(observation, float(reward), bool(terminated), bool(truncated), info)
        if state_hash:
            answer["state_hash"] = self.state_hash()
        return answer

    def playout(self, horizon: int, seed: int, discount: float = 1.0) -> dict[str, Value]:
        """Plays uniformly random legal actions until the episode ends, at most `horizon` of them.

        Returns:
            value: the discounted return; num_steps; terminated; truncated.

        Raises:
            EnvError: The environment raised.
        """
        env = self.env
        choose = self._random_actions(seed)
        value, weight = 0.0, 1.0
        num_steps = 0
        terminated = truncated = False
        try:
            while num_steps < horizon and not (terminated or truncated):
                _, reward, terminated, truncated, info = env.step(choose(self._mask))
                self._mask = info.get("action_mask") if info else None
                value += weight * float(reward)
                weight *= discount
                num_steps += 1
        except EnvError:
            raise
        except Exception as error:
            raise EnvError.wrap(error, "the environment raised in a playout") from error
        ended = {"terminated": bool(terminated), "truncated": bool(truncated)}
        return {"value": value, "num_steps": num_steps, **ended}

    def reseed(self, seed: int) -> None:
        """Replaces the environment's and its spaces' generators by one made from `seed` alone.

        The spaces get one although few environments draw from them: a space that has never drawn would make
        one from fresh entropy when it does. It is the environment's, as one costs less than three.
        """
        if self._seeds_globals:
            guest_rng.seed_globals(seed)
        if self._env is not None:
            base = self._env.unwrapped
            fresh = guest_rng.generator(seed, "env")
            base.np_random = fresh
            vars(base.action_space)["_np_random"] = fresh
            vars(base.observation_space)["_np_random"] = fresh

    def state_hash(self) -> str | None:
        """Digest of the state without its generators; None if the state cannot be digested.

        `make` says at once whether, and why, an environment cannot be.
        """
        try:
            return state_digest(self.env)
        except UnhashableState:
            return None

    def close(self) -> None:
        """Closes the environment. Idempotent.

        Raises:
            EnvError: The environment raised; it is gone all the same.
        """
        env, self._env, self._mask = self._env, None, None
        if env is not None:
            try:
                env.close()
            except Exception as error:
                raise EnvError.wrap(error, "the environment raised in close") from error

    def _answer(
        self, observation: object, reward: float | None, terminated: bool, truncated: bool, info: Any
    ) -> dict[str, Value]:
        spaces = _spaces()
        self._mask = info.get("action_mask") if info else None
        return {
            "observation": spaces.plain(observation),
            "reward": reward,
            "terminated": terminated,
            "truncated": truncated,
            "info": spaces.plain_info(info),
        }

    def _random_actions(self, seed: int) -> Callable[[Any], Any]:
        """A chooser of actions given a mask, whose choices are a function of `seed` alone."""
        from gymnasium.spaces import Discrete

        spaces = _spaces()
        generator = guest_rng.generator(seed, "playout")
        space = self.env.action_space
        if not isinstance(space, Discrete):
            return lambda mask: spaces.sample(space, generator, mask)
        draw = _uniform_draws(generator).__next__
        start, n = int(space.start), int(space.n)

        def choose(mask: Any) -> int:
            if mask is None:
                return start + int(draw() * n)
            legal = spaces.legal_indices(mask, n)
            return start + legal[int(draw() * len(legal))]

        return choose


def _uniform_draws(generator: np.random.Generator) -> Any:
    while True:  # drawn in blocks: a single draw costs as much as a step of a small environment
        yield from cast("list[float]", generator.random(_DRAWS_AT_ONCE).tolist())


@cache
def _spaces() -> types.ModuleType:
    """Imported on first use: the agent serves machines without gymnasium too."""
    from rollout import spaces

    return spaces


def _make(env_id: str, kwargs: Mapping[str, Value], max_episode_steps: int | None) -> gymnasium.Env[Any, Any]:
    try:
        import gymnasium
    except ImportError as error:
        raise EnvError(f"this sandbox has no gymnasium: {error}") from error
    try:
        return gymnasium.make(
            env_id, max_episode_steps=max_episode_steps, disable_env_checker=True, **cast("Any", kwargs)
        )
    except gymnasium.error.UnregisteredEnv as error:
        nearest = difflib.get_close_matches(env_id, gymnasium.registry, n=1, cutoff=0.0)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise EnvError(f"no environment is registered as {env_id!r}{hint}") from error
    except Exception as error:
        raise EnvError.wrap(error, f"the environment {env_id!r} cannot be made") from error


def _spec_of(env: gymnasium.Env[Any, Any], max_episode_steps: int | None) -> dict[str, Value]:
    """Read from the registry: a wrapper's own `spec` builds a copy, and keeps it as part of the state."""
    import gymnasium

    spec = env.unwrapped.spec
    assert spec is not None, "gymnasium.make sets it"
    limit = gymnasium.registry[spec.id].max_episode_steps if max_episode_steps is None else max_episode_steps
    return {"spec_id": spec.id, "max_episode_steps": None if limit is None or limit < 0 else limit}


def _versions() -> dict[str, str]:
    import gymnasium
    import numpy as np

    return {"python": platform.python_version(), "numpy": np.__version__, "gymnasium": gymnasium.__version__}


def _digest_error(env: gymnasium.Env[Any, Any]) -> str | None:
    try:
        state_digest(env)
    except UnhashableState as error:
        return str(error)
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
