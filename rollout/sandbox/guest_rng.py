"""Random generators of the guest: made from a seed alone, cheaply, and equal in every engine.

A branch that is reseeded gets `numpy.random.Generator(PCG64(...))` whose 256 bits of initial state are a
BLAKE2b digest of the seed and a purpose, instead of numpy's own `SeedSequence`, which costs ten times as much
as everything else a branch does to its generators. Equal seeds give equal streams on every machine.
"""

from __future__ import annotations

import hashlib
import random
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["generator", "seed_from_entropy", "seed_globals"]


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A fresh generator; different purposes give unrelated streams of one seed.

    Args:
        seed: Any integer.
        purpose: What the stream is for.
    """
    make, bits, sequence = _numpy()
    return make(bits(sequence(seed, purpose)))


def seed_from_entropy(entropy: bytes) -> int:
    """A 63-bit seed out of random bytes."""
    return int.from_bytes(hashlib.blake2b(entropy, digest_size=8).digest(), "little") >> 1


def seed_globals(seed: int) -> None:
    """Seeds Python's `random`, and numpy's legacy global generator if numpy is loaded."""
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed & 0xFFFFFFFF)


@cache
def _numpy() -> tuple[Any, Any, Any]:
    """The generator and bit generator of numpy, and a seed sequence over BLAKE2b for them.

    Made on first use: the sequence's base is numpy's, and the guest imports numpy only if it must.
    """
    import numpy as np
    from numpy.random.bit_generator import ISpawnableSeedSequence

    class KeyedSeedSequence(ISpawnableSeedSequence):
        """numpy's interface of seed sequences; spawns unrelated children, as numpy's own does."""

        __slots__ = ("n_children_spawned", "purpose", "seed")

        def __init__(self, seed: int, purpose: str, num_spawned: int = 0) -> None:
            self.seed = seed
            self.purpose = purpose
            self.n_children_spawned = num_spawned

        def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray[Any, Any]:
            size = n_words * np.dtype(dtype).itemsize
            state = b""
            while len(state) < size:
                text = f"{self.seed}:{self.purpose}:{len(state)}".encode()
                state += hashlib.blake2b(text).digest()
            return np.frombuffer(state, dtype, n_words)

        def spawn(self, n_children: int) -> list[ISpawnableSeedSequence]:
            first = self.n_children_spawned
            self.n_children_spawned += n_children
            indices = range(first, self.n_children_spawned)
            return [KeyedSeedSequence(self.seed, f"{self.purpose}/{index}") for index in indices]

        def __reduce__(self) -> tuple[Any, ...]:
            return _rebuild, (self.seed, self.purpose, self.n_children_spawned)

    return np.random.Generator, np.random.PCG64, KeyedSeedSequence


def _rebuild(seed: int, purpose: str, num_spawned: int) -> object:
    _, _, sequence = _numpy()
    return sequence(seed, purpose, num_spawned)
