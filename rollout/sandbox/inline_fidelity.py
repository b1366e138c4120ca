"""Decides how the inline engine copies an environment, by testing copies of an instance made for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

from rollout import spaces
from rollout.errors import CheckpointError, EnvError
from rollout.sandbox import guest_rng, wire
from rollout.sandbox.fidelity import check_fidelity
from rollout.sandbox.global_rng import GlobalState, OwnGenerators
from rollout.sandbox.guest_env import GuestEnv
from rollout.sandbox.guest_ops import ENV_OPERATIONS
from rollout.sandbox.inline_copy import COPIERS, Copier
from rollout.types import Value, derive_seed

__all__ = ["NUM_STEPS", "Recipe", "Trust", "examine"]

NUM_STEPS: Final = 30
"""Actions that original and copies are given."""
_WARM_UP_STEPS = 3  # the copies are taken in the middle of an episode, where there is state to lose


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an environment was made: the arguments of `env.make`, encoded so that they compare and hash."""

    packed: bytes

    @classmethod
    def of(cls, args: dict[str, Value]) -> Recipe:
        """The recipe of a successful `env.make`."""
        return cls(wire.pack(args))

    def make(self) -> GuestEnv:
        """A fresh environment of the same kind.

        Raises:
            EnvError: It cannot be made again.
        """
        env = GuestEnv(seeds_globals=False)
        ENV_OPERATIONS["env.make"](env, cast("dict[str, Value]", wire.unpack(self.packed)))
        return env


@dataclass(frozen=True, slots=True)
class Trust:
    """What the examination of an environment found.

    Attributes:
        copier: The first way of copying that is faithful.
        uses_globals: It draws from the generators that the whole process shares.
    """

    copier: Copier
    uses_globals: bool


def examine(recipe: Recipe) -> Trust:
    """Finds a way of copying whose copies behave as the original.

    Raises:
        CheckpointError: There is none; the message names the first difference that the last one showed.
        EnvError: The environment cannot be made a second time.
    """
    failures: list[CheckpointError] = []
    for copier in COPIERS:
        with OwnGenerators(GlobalState.capture()).installed():  # what happens here stays here
            env = recipe.make()
            try:
                return _examine(env, copier)
            except CheckpointError as error:
                failures.append(error)
            finally:
                env.close()
    raise failures[-1]


def _examine(env: GuestEnv, copier: Copier) -> Trust:
    notes = _Notes()
    player = _Player(env, copier, GlobalState.capture(), notes)
    player.begin()
    for index in range(_WARM_UP_STEPS):
        player.act(index)
    check_fidelity(player, NUM_STEPS, copier.name)
    return Trust(copier, notes.used_globals)


@dataclass(slots=True)
class _Notes:
    """What is seen of an environment and all its copies."""

    used_globals: bool = False


class _Player:
    """An episode whose actions are a function of the state and the index of the action."""

    def __init__(self, env: GuestEnv, copier: Copier, generators: GlobalState, notes: _Notes) -> None:
        self._env = env
        self._copier = copier
        self._generators = generators
        self._notes = notes
        self._num_episodes = 0

    def begin(self) -> Value:
        """Begins an episode; both its seeds are a function of its number."""
        seed = derive_seed("fidelity", self._num_episodes)
        self._num_episodes += 1
        guest_rng.seed_globals(seed)
        self._generators = GlobalState.capture()
        return self._watched(lambda: cast("Value", self._env.reset(seed)))

    def act(self, index: int) -> Value:
        """Plays the index-th action; a new episode begins where one has ended."""
        answer = self._watched(lambda: self._step(index))
        if not isinstance(answer, dict) or answer["terminated"] or answer["truncated"]:
            return [answer, self.begin()]
        return answer

    def copy(self) -> _Player:
        """An independent player in the same state.

        Raises:
            CheckpointError: The environment cannot be copied this way.
        """
        try:
            state = self._copier.save(self._env.state).load()
        except Exception as error:  # environments and what they hold raise anything when they are copied
            raise CheckpointError.wrap(
                error, f"this environment cannot be copied by {self._copier.name}"
            ) from error
        env = GuestEnv(seeds_globals=False, state=state)
        player = _Player(env, self._copier, self._generators, self._notes)
        player._num_episodes = self._num_episodes
        return player

    def _step(self, index: int) -> Value:
        generator = guest_rng.generator(index, "fidelity")
        env, mask = self._env.state
        action = spaces.plain(spaces.sample(env.action_space, generator, mask))
        try:
            return cast("Value", self._env.step(action, state_hash=True))
        except EnvError as error:  # an environment that refuses an action must refuse it in the copy too
            return error.message

    def _watched(self, call: Callable[[], Value]) -> Value:
        """Makes a call with this player's states of the process-wide generators."""
        self._generators.install()
        result = call()
        after = GlobalState.capture()
        self._notes.used_globals = self._notes.used_globals or not after.equals(self._generators)
        self._generators = after
        return result
