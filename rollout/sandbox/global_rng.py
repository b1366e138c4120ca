"""The generators that all code in one process shares, kept apart for the sandboxes of the inline engine.

Python's `random` and numpy's legacy global generator are state of the process. An environment that draws from
them would see its siblings' draws, and the host's. So each sandbox of such an environment has states of its
own, put in place for the time of a call.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollout.sandbox import guest_rng

__all__ = ["GlobalState", "OwnGenerators"]


@dataclass(frozen=True, slots=True, eq=False)
class GlobalState:
    """The states of both generators at one moment."""

    python: tuple[Any, ...]
    legacy_numpy: Mapping[str, Any]

    @classmethod
    def capture(cls) -> GlobalState:
        """The states as they are."""
        return cls(random.getstate(), np.random.get_state(legacy=False))

    @classmethod
    def seeded(cls, seed: int) -> GlobalState:
        """The states that `guest_rng.seed_globals` gives; the process's own stay as they are."""
        outside = cls.capture()
        try:
            guest_rng.seed_globals(seed)
            return cls.capture()
        finally:
            outside.install()

    def install(self) -> None:
        """Puts these states in place."""
        random.setstate(self.python)
        np.random.set_state(dict(self.legacy_numpy))

    def equals(self, other: GlobalState) -> bool:
        """Both give the same numbers."""
        mine, theirs = self.legacy_numpy, other.legacy_numpy
        same_gauss = (mine["has_gauss"], mine["gauss"]) == (theirs["has_gauss"], theirs["gauss"])
        same_position = mine["state"]["pos"] == theirs["state"]["pos"]
        same_key = np.array_equal(mine["state"]["key"], theirs["state"]["key"])
        return self.python == other.python and same_gauss and same_position and same_key


class OwnGenerators:
    """One sandbox's states of the process-wide generators, as they are between its calls."""

    __slots__ = ("state",)

    def __init__(self, state: GlobalState) -> None:
        self.state = state

    @contextmanager
    def installed(self) -> Generator[None]:
        """In the block these states are in place, and go on; after it, the process's own are back."""
        outside = GlobalState.capture()
        self.state.install()
        try:
            yield
        finally:
            self.state = GlobalState.capture()
            outside.install()
