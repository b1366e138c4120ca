"""Copies of environments inside one process, by pickling or by `copy.deepcopy`.

Pickling at protocol 5 is a deep copy at C speed; what environments are full of and pickles slowly (numpy's
generators, arrays, scalars and types, Discrete spaces) goes through reducers of its own here, which keep
every bit of state.

Neither way sees state outside the object: in modules and classes, in closures, in C libraries. Whether a copy
behaves as the original is what `rollout.sandbox.fidelity` finds out.
"""

from __future__ import annotations

import copy
import copyreg
import gc
import io
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from gymnasium.spaces import Discrete
from numpy.random.bit_generator import ISpawnableSeedSequence

__all__ = ["COPIERS", "Copier", "Saved"]


class Saved(Protocol):
    """A saved object, from which any number of equal ones are made."""

    @property
    def private_bytes(self) -> int:
        """What holding it costs."""
        ...

    def load(self) -> Any:
        """An equal object that shares nothing with the saved one."""
        ...


@dataclass(frozen=True, slots=True)
class Copier:
    """One way to copy.

    Attributes:
        name: How messages call it.
        save: Saves an object; raises whatever such an object raises that cannot be copied that way.
    """

    name: str
    save: Callable[[Any], Saved]


@dataclass(frozen=True, slots=True)
class _Pickled:
    data: bytes

    @property
    def private_bytes(self) -> int:
        return len(self.data)

    def load(self) -> Any:
        return pickle.loads(self.data)


@dataclass(frozen=True, slots=True)
class _DeepCopied:
    original: Any
    private_bytes: int

    def load(self) -> Any:
        return copy.deepcopy(self.original)


def _save_pickled(value: Any) -> Saved:
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return _Pickled(buffer.getvalue())


def _save_deep_copied(value: Any) -> Saved:
    return _DeepCopied(copy.deepcopy(value), _approximate_size_bytes(value))


COPIERS = (Copier("pickling", _save_pickled), Copier("copy.deepcopy", _save_deep_copied))
"""In the order of preference, which is that of speed."""


def _approximate_size_bytes(root: object) -> int:
    """Size of everything that is reachable and not code: roughly what a deep copy takes."""
    seen: set[int] = set()
    waiting = [root]
    total = 0
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, type | types.ModuleType | types.FunctionType):
            continue
        seen.add(id(value))
        total += sys.getsizeof(value)
        waiting += gc.get_referents(value)
    return total


class _RememberedSequence(ISpawnableSeedSequence):
    """The seed sequence of a copied bit generator: spawns what the original would have spawned.

    The copy's own state is put in place after it has been made, so what this answers to the making does not
    matter, and the real sequence, which is slow to make, is only made if it is needed.
    """

    _WORDS: ClassVar = np.arange(4, dtype=np.uint64)

    def __init__(self, origin: Any) -> None:
        self.origin = origin
        self._is_new = True

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray[Any, Any]:
        if self._is_new:
            self._is_new = False
            return self._WORDS
        return self._real().generate_state(n_words, dtype)

    def spawn(self, n_children: int) -> list[ISpawnableSeedSequence]:
        return self._real().spawn(n_children)

    def _real(self) -> ISpawnableSeedSequence:
        if isinstance(self.origin, dict):
            self.origin = np.random.SeedSequence(**self.origin)
        return self.origin


def _reduce_generator(generator: np.random.Generator) -> tuple[Any, ...]:
    return np.random.Generator, (generator.bit_generator,)


def _reduce_pcg64(bits: np.random.PCG64) -> tuple[Any, ...]:
    sequence: Any = bits.seed_seq
    if type(sequence) is _RememberedSequence:
        sequence = sequence.origin
    if type(sequence) is np.random.SeedSequence:
        sequence = sequence.state
    state = bits.state
    numbers = state["state"]
    return _make_pcg64, (numbers["state"], numbers["inc"], state["has_uint32"], state["uinteger"], sequence)


def _make_pcg64(state: int, inc: int, has_uint32: int, uinteger: int, sequence: Any) -> np.random.PCG64:
    bits: Any = np.random.PCG64(_RememberedSequence(sequence))  # pyright: ignore[reportArgumentType]
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": state, "inc": inc},
        "has_uint32": has_uint32,
        "uinteger": uinteger,
    }
    return bits


def _reduce_array(array: np.ndarray[Any, Any]) -> Any:
    if array.dtype.kind in "OV" or not array.flags.c_contiguous:
        return array.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    return _make_array, (array.tobytes(), array.dtype, array.shape, array.flags.writeable)


def _make_array(
    data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], writeable: bool
) -> np.ndarray[Any, Any]:
    array = np.ndarray(shape, dtype, data).copy()
    array.flags.writeable = writeable
    return array


def _reduce_dtype(dtype: np.dtype[Any]) -> Any:
    if dtype.metadata is not None:
        return dtype.__reduce__()
    return np.dtype, (dtype.str,)


def _reduce_integer(number: np.integer[Any]) -> tuple[Any, ...]:
    return type(number), (int(number),)


def _reduce_discrete(space: Discrete) -> Any:
    if vars(space).keys() != _DISCRETE_ATTRIBUTES:
        return space.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    generator = vars(space)["_np_random"]
    return _make_discrete, (space.dtype, int(space.n), int(space.start), generator)


def _make_discrete(dtype: Any, n: int, start: int, generator: Any) -> Discrete:
    space = Discrete.__new__(Discrete)
    scalar = dtype.type
    attributes = {
        "dtype": dtype,
        "n": scalar(n),
        "start": scalar(start),
        "_shape": (),
        "_np_random": generator,
    }
    vars(space).update(attributes)
    return space


_DISCRETE_ATTRIBUTES = vars(Discrete(1)).keys()
_INTEGERS = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)


class _Pickler(pickle.Pickler):
    dispatch_table: ClassVar[Any] = {
        **copyreg.dispatch_table,
        np.random.Generator: _reduce_generator,
        np.random.PCG64: _reduce_pcg64,
        np.ndarray: _reduce_array,
        Discrete: _reduce_discrete,
        **dict.fromkeys(_INTEGERS, _reduce_integer),
        **dict.fromkeys((type(np.dtype(number)) for number in (*_INTEGERS, np.float64)), _reduce_dtype),
        **dict.fromkeys(
            (type(np.dtype(number)) for number in (np.float32, np.bool_, np.bytes_, np.str_)), _reduce_dtype
        ),
    }
