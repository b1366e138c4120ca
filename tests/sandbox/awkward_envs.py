"""Environments that are awkward to copy, each in one way. Gymnasium finds `awkward_envs:NAME-v0` itself."""

from __future__ import annotations

import random
import threading
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import EzPickle


class Walk(gymnasium.Env[Any, Any]):
    """Counts what it is told to add. Behaves well; the others are like it but for one thing."""

    def __init__(self, limit: int = 50) -> None:
        self.action_space = spaces.Discrete(4)
        self.observation_space = spaces.Box(-1000, 1000, (2,), np.float64)
        self.limit = limit
        self.total = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.set_total((options or {}).get("start", 0))
        return self.look(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.set_total(self.get_total() + int(action))
        return self.look(), float(action), self.get_total() >= self.limit, False, {}

    def look(self) -> Any:
        return np.array([self.get_total(), self.np_random.random()])

    def get_total(self) -> int:
        return self.total

    def set_total(self, total: int) -> None:
        self.total = total


_SHARED = {"total": 0}


class Shared(Walk):
    """Keeps its state in the module."""

    def get_total(self) -> int:
        return _SHARED["total"]

    def set_total(self, total: int) -> None:
        _SHARED["total"] = total


class Idempotent(Walk):
    """Shares a set that its copies all write the same to: only playing them in turn shows it."""

    seen: set[int] = set()  # noqa: RUF012 - that it is shared is the point

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        self.seen.clear()
        return super().reset(seed=seed, options=options)

    def look(self) -> Any:
        before = len(self.seen)
        self.seen.add(self.get_total())
        return np.array([self.get_total(), float(len(self.seen) - before)])


class Reborn(Walk, EzPickle):
    """Is copied by being made anew, as many of Gymnasium's environments are."""

    def __init__(self, limit: int = 50) -> None:
        EzPickle.__init__(self, limit)
        Walk.__init__(self, limit)


class OnlyDeepCopy(Reborn):
    """Loses its state when it is pickled, and not when it is deep-copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OnlyDeepCopy:
        twin = OnlyDeepCopy(self.limit)
        twin.total = self.total
        twin.spec = self.spec
        twin.np_random = np.random.Generator(np.random.PCG64(0))
        twin.np_random.bit_generator.state = self.np_random.bit_generator.state
        return twin


class Lambda(Walk):
    """Cannot be pickled, but deep-copied."""

    def __init__(self) -> None:
        super().__init__()
        self.double = lambda number: 2 * number


class Locked(Walk):
    """Cannot be copied at all."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class GlobalDice(Walk):
    """Draws from the generators that the whole process shares."""

    def look(self) -> Any:
        return np.array([random.random(), np.random.random()])


class Masked(Walk):
    """Allows only actions 1 and 3, and raises at others."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        observation, _ = super().reset(seed=seed, options=options)
        return observation, self.info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if action not in (1, 3):
            raise ValueError(f"action {action} is masked")
        return (*super().step(action)[:4], self.info())

    def info(self) -> dict[str, Any]:
        return {"action_mask": np.array([0, 1, 0, 1], dtype=np.int8)}


class Restless(Walk):
    """Is never twice the same."""

    def look(self) -> Any:
        return np.array([self.get_total(), random.SystemRandom().random()])


class Grumpy(Walk):
    """Raises when it is closed."""

    def close(self) -> None:
        raise RuntimeError("I will not go")


class Growing(Walk):
    """Has as many actions as the process has made of it: two are never alike."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).made += 1
        self.action_space = spaces.Discrete(2 + self.made)


for _kind in (
    Walk,
    Shared,
    Idempotent,
    Reborn,
    OnlyDeepCopy,
    Lambda,
    Locked,
    GlobalDice,
    Masked,
    Restless,
    Grumpy,
    Growing,
):
    gymnasium.register(f"{_kind.__name__}-v0", entry_point=_kind, max_episode_steps=200)
