"""A digest of an environment's state: equal states give equal digests, in every process and engine.

It covers the whole chain of wrappers (the elapsed steps of a time limit too) and everything that an object's
attributes reach. It leaves out what is not state of the task: random generators and their seeds, render
surfaces, spaces, specifications, functions, classes and modules.

It does not see state that is kept outside Python's reach (inside a C library without pickling support): such
an environment has no digest, and `state_digest` says so. Distinct states may only collide as BLAKE2b does;
equal states that differ in the order of their dictionaries have different digests.
"""

from __future__ import annotations

import marshal
import random
import sys
import types
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any, cast

__all__ = ["UnhashableState", "state_digest"]

_SEED_ATTRIBUTE = "_np_random_seed"  # what Gymnasium remembers of the last seed
_SKIPPED_MODULES = ("gymnasium.spaces", "gymnasium.envs.registration", "pygame", "OpenGL", "pyglet")
_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))
_CONTAINERS = frozenset((list, tuple, dict, set, frozenset))
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
_MAX_DEPTH = 200
_DIGEST_BYTES = 16
_MARSHAL_VERSION = 2  # the last one whose output does not depend on which equal objects are the same object


class UnhashableState(Exception):
    """The state holds an object whose content cannot be read; the message names it."""


def state_digest(root: object) -> str:
    """The digest of an object's state, as 32 hexadecimal digits.

    Raises:
        UnhashableState: Some object that it reaches cannot be read.
    """
    walker = _Walker()
    walker.walk(root, 0)
    return walker.digest.hexdigest()


class _Walker:
    """Feeds a canonical form of everything reachable into one digest."""

    def __init__(self) -> None:
        self.digest = blake2b(digest_size=_DIGEST_BYTES)
        self._seen: dict[int, int] = {}  # of objects that may be shared or cyclic, by the order met
        self._kept: list[object] = []  # keeps temporary states alive, so that no id is used twice

    def walk(self, value: object, depth: int) -> None:
        """Adds one value."""
        kind = type(value)
        if kind in _ATOMS:
            self._add(b"a", marshal.dumps(cast("Any", value), _MARSHAL_VERSION))
        elif (number := _as_number(value)) is not value:
            self.walk(number, depth)
        elif kind in _CONTAINERS and self._add_plain(value):
            pass
        elif kind.__module__.startswith(_SKIPPED_MODULES) or isinstance(value, random.Random):
            self._add(b"-", b"")
        elif isinstance(value, _CODE):
            self._add(b"c", getattr(value, "__qualname__", kind.__qualname__).encode())
        elif not self._is_numpy(value):
            self._walk_object(value, depth)

    def _add(self, tag: bytes, content: bytes) -> None:
        self.digest.update(tag + len(content).to_bytes(8, "little"))
        self.digest.update(content)

    def _add_plain(self, value: object) -> bool:
        """Adds a container of plain values at C speed; False, and nothing added, if it holds others.

        Not all that can be marshalled is plain: an array inside would be its bytes, without type and shape.
        """
        try:
            content = marshal.dumps(cast("Any", value), _MARSHAL_VERSION)
            if marshal.loads(content) != value:
                return False
        except (ValueError, RecursionError):  # no marshalling, no comparing, or too deep a nesting
            return False
        self._add(b"p", content)
        return True

    def _is_numpy(self, value: object) -> bool:
        """Adds what numpy defines; False, and nothing added, for anything else."""
        numpy: Any = sys.modules.get("numpy")
        if numpy is None:
            return False
        if isinstance(value, numpy.random.Generator | numpy.random.RandomState | numpy.random.BitGenerator):
            self._add(b"-", b"")
        elif isinstance(value, numpy.ndarray | numpy.generic) and not cast("Any", value).dtype.hasobject:
            array = numpy.asarray(value)
            self._add(b"n", f"{array.dtype.str}{array.shape}".encode())
            self._add(b"b", array.tobytes())
        else:
            return False
        return True

    def _walk_object(self, value: object, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise UnhashableState("the state is nested too deeply")
        number = self._seen.get(id(value))
        if number is not None:
            self._add(b"r", number.to_bytes(8, "little"))
            return
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        self._add(b"o", type(value).__qualname__.encode())
        if isinstance(value, list | tuple):
            items = cast("list[object]", value)
            self._add_length(items)
            for item in items:
                self.walk(item, depth + 1)
        elif isinstance(value, set | frozenset):
            digests = sorted(self._apart(item, depth) for item in cast("set[object]", value))
            self._add(b"s", b"".join(digests))
        elif isinstance(value, dict):
            self._walk_items(cast("dict[object, object]", value), depth)
        if type(value) not in _CONTAINERS:
            self._walk_state(value, depth)

    def _walk_items(self, items: dict[object, object], depth: int) -> None:
        """Adds a dictionary's items: the plain ones together, because most are, then each of the others."""
        plain: list[object] = []
        others: list[object] = []
        for key, item in items.items():
            number = _as_number(item)
            if type(key) is str and type(number) in _ATOMS:
                plain += (key, number)
            else:
                others += (key, item)
        self._add_plain(plain)
        self._add_length(others)
        for each in others:
            self.walk(each, depth + 1)

    def _add_length(self, items: list[object]) -> None:
        self._add(b"l", len(items).to_bytes(8, "little"))

    def _walk_state(self, value: object, depth: int) -> None:
        kind = type(value)
        if kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__:
            attributes = _attributes(value)
            if attributes is not None:  # read as they are: a `__getstate__` may leave out what is state here
                self._walk_items(attributes, depth)
                return
        try:
            reduced: object = value.__reduce_ex__(4)
        except Exception as error:  # whatever an extension type raises to say that it cannot be read
            raise UnhashableState(f"{kind.__module__}.{kind.__qualname__}: {error}") from error
        if isinstance(reduced, tuple):
            for part in reduced[1:]:
                items = list(part) if isinstance(part, Iterator) else part  # of a subclassed list or dict
                self.walk(cast("object", items), depth + 1)

    def _apart(self, value: object, depth: int) -> bytes:
        inner = _Walker()
        inner.walk(value, depth + 1)
        return inner.digest.digest()


def _as_number(value: object) -> object:
    """One of numpy's numbers as Python's: who acts with 3 or with int64(3) reaches the same state."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.bool_ | numpy.integer | numpy.floating):
        number: object = cast("Any", value).item()
        return number if type(number) in _ATOMS else value  # a long double stays what it is
    return value


def _attributes(value: object) -> dict[object, object] | None:
    """Attributes in the instance's dictionary and slots; None if it has neither."""
    attributes = cast("dict[object, object] | None", getattr(value, "__dict__", None))
    slots: dict[object, object] = {
        name: getattr(value, name)
        for cls in type(value).__mro__
        for name in _names(vars(cls).get("__slots__", ()))
        if name not in ("__dict__", "__weakref__") and hasattr(value, name)
    }
    if slots or (attributes and _SEED_ATTRIBUTE in attributes):
        attributes = {**(attributes or {}), **slots}
        attributes.pop(_SEED_ATTRIBUTE, None)
    return attributes


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots
