"""Gymnasium spaces as plain values, so that they and their elements cross the guest channel.

A space becomes a `Value` by `describe` and a space again by `build`; an element becomes a `Value` by `plain`
and an element again by `element`. The guest describes what it plays; the host, which need not have the
environment, builds equal spaces from that.

It does not carry a space's random generator, nor what a subclass of Gymnasium's spaces adds: a subclass is
described as the nearest class that Gymnasium itself defines.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import gymnasium
import numpy as np
from gymnasium import spaces

from rollout.errors import EnvError
from rollout.types import Value

__all__ = [
    "build",
    "contains",
    "describe",
    "element",
    "enumerate_actions",
    "legal_indices",
    "plain",
    "plain_info",
    "sample",
    "share_generator",
]

MAX_ENUMERATED_ACTIONS: Final = 4096
"""A composite action space with more elements is not enumerated."""
_MAX_DEPTH = 32
_MIN_INT, _MAX_INT = -(1 << 63), (1 << 64) - 1  # what the guest channel carries
_ATOMS = frozenset({type(None), bool, float, str, bytes})

Space = gymnasium.Space[Any]


def describe(space: Space) -> Value:
    """The plain description of a space.

    Raises:
        EnvError: The space is of a kind that cannot be described, or has keys that are not text.
    """
    match space:
        case spaces.Discrete():
            return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": _dtype(space)}
        case spaces.MultiDiscrete():
            start = np.asarray(space.start)
            return {"type": "MultiDiscrete", "nvec": space.nvec, "start": start, "dtype": _dtype(space)}
        case spaces.MultiBinary():
            return {"type": "MultiBinary", "n": [int(size) for size in space.shape]}
        case spaces.Box():
            return {"type": "Box", "low": space.low, "high": space.high, "dtype": _dtype(space)}
        case spaces.Text():
            limits: dict[str, Value] = {"min_length": space.min_length, "max_length": space.max_length}
            return {"type": "Text", **limits, "characters": "".join(sorted(space.character_set))}
        case spaces.Dict():
            if not all(isinstance(cast("object", key), str) for key in space.spaces):
                raise EnvError("a Dict space with keys that are not text cannot leave the sandbox")
            return {"type": "Dict", "spaces": [[key, describe(inner)] for key, inner in space.spaces.items()]}
        case spaces.Tuple() | spaces.OneOf():
            kind = "Tuple" if isinstance(space, spaces.Tuple) else "OneOf"
            return {"type": kind, "spaces": [describe(inner) for inner in space.spaces]}
        case spaces.Sequence():
            return {"type": "Sequence", "feature": describe(space.feature_space), "stack": space.stack}
        case spaces.Graph():
            edge = None if space.edge_space is None else describe(space.edge_space)
            return {"type": "Graph", "node": describe(space.node_space), "edge": edge}
        case _:
            raise EnvError(f"spaces of type {type(space).__qualname__} cannot leave the sandbox")


def build(description: Value) -> Space:
    """The space that a description names; the description may come from a hostile guest.

    Raises:
        EnvError: It describes no valid space.
    """
    try:
        return _build(description, _MAX_DEPTH)
    except (KeyError, TypeError, ValueError, AssertionError, OverflowError, AttributeError) as error:
        raise EnvError(f"a malformed space description: {type(error).__name__}: {error}") from error


def _build(description: Value, depth: int) -> Space:
    if not isinstance(description, dict) or depth == 0:
        raise EnvError("a malformed space description: not a map, or nested too deeply")
    about = cast("dict[str, Any]", description)
    match about["type"]:
        case "Discrete":
            dtype = np.dtype(about["dtype"])
            return spaces.Discrete(int(about["n"]), start=int(about["start"]), dtype=cast("Any", dtype.type))
        case "MultiDiscrete":
            dtype = np.dtype(about["dtype"])
            return spaces.MultiDiscrete(about["nvec"], dtype=cast("Any", dtype.type), start=about["start"])
        case "MultiBinary":
            sizes = [int(size) for size in about["n"]]
            return spaces.MultiBinary(sizes[0] if len(sizes) == 1 else sizes)
        case "Box":
            dtype = np.dtype(about["dtype"])
            return spaces.Box(about["low"], about["high"], dtype=cast("Any", dtype.type))
        case "Text":
            limits = {"min_length": int(about["min_length"]), "max_length": int(about["max_length"])}
            return spaces.Text(**limits, charset=str(about["characters"]))
        case "Dict":
            return spaces.Dict({str(key): _build(inner, depth - 1) for key, inner in about["spaces"]})
        case "Tuple":
            return spaces.Tuple([_build(inner, depth - 1) for inner in about["spaces"]])
        case "OneOf":
            return spaces.OneOf([_build(inner, depth - 1) for inner in about["spaces"]])
        case "Sequence":
            return spaces.Sequence(_build(about["feature"], depth - 1), stack=bool(about["stack"]))
        case "Graph":
            edge = None if about["edge"] is None else _build(about["edge"], depth - 1)
            return spaces.Graph(cast("Any", _build(about["node"], depth - 1)), cast("Any", edge))
        case unknown:
            raise EnvError(f"a malformed space description: unknown type {unknown!r}")


def element(space: Space, value: Value) -> Any:
    """The element of a space that a plain value stands for: arrays of the space's type, tuples, and so on.

    It converts but does not check bounds: that is `space.contains`.

    Raises:
        EnvError: The value has another structure, or loses digits in the space's type.
    """
    match space:
        case spaces.MultiDiscrete() | spaces.MultiBinary() | spaces.Box():
            return _array(space, value)
        case spaces.Dict() if isinstance(value, dict) and value.keys() == space.spaces.keys():
            return {key: element(inner, value[key]) for key, inner in space.spaces.items()}
        case spaces.Tuple() if isinstance(value, list | tuple) and len(value) == len(space.spaces):
            return tuple(element(inner, part) for inner, part in zip(space.spaces, value, strict=True))
        case spaces.OneOf() if isinstance(value, list | tuple) and len(value) == 2:
            index = _index(value[0], len(space.spaces))
            return np.int64(index), element(space.spaces[index], value[1])
        case spaces.Sequence() if space.stack:
            return element(space.stacked_feature_space, value)
        case spaces.Sequence() if isinstance(value, list | tuple):
            return tuple(element(space.feature_space, part) for part in value)
        case spaces.Graph() if isinstance(value, list | tuple) and len(value) == 3:
            return spaces.GraphInstance(*(None if part is None else np.asarray(part) for part in value))  # pyright: ignore
        case spaces.Discrete() if isinstance(value, np.integer):
            return int(value)  # one form, so that who acts with 3 or with int64(3) reaches the same state
        case spaces.Discrete() | spaces.Text():
            return value
        case _:
            raise EnvError(f"{_short(value)} has not the structure of {space}")


def contains(space: Space, value: Any) -> bool:
    """`space.contains`, but at once for the most common case, which Gymnasium takes microseconds for."""
    if type(value) is int and type(space) is spaces.Discrete:
        start = int(space.start)
        return start <= value < start + int(space.n)
    return space.contains(value)


def plain(value: object) -> Value:
    """A space's element as a `Value`: tuples as lists, array-likes as arrays, and copies of all arrays.

    Raises:
        EnvError: It holds an object that has no plain form.
    """
    kind = type(value)
    if kind in _ATOMS or (kind is int and _MIN_INT <= cast("int", value) <= _MAX_INT):
        return cast("Value", value)
    if isinstance(value, np.ndarray):
        return plain(value.tolist()) if value.dtype.hasobject else np.array(value)
    if isinstance(value, float | str | bytes):  # subclasses, such as numpy's float64
        return _base(value)
    if isinstance(value, int):
        if _MIN_INT <= value <= _MAX_INT:
            return int(value)
        raise EnvError("an integer beyond 64 bits cannot leave the sandbox")
    if isinstance(value, np.generic):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in cast("Mapping[object, object]", value).items()}
    if isinstance(value, Sequence):
        return [plain(inner) for inner in cast("Sequence[object]", value)]
    if hasattr(value, "__array__"):
        return plain(np.asarray(value))
    raise EnvError(f"an object of type {kind.__module__}.{kind.__qualname__} cannot leave the sandbox")


def plain_info(info: Mapping[str, object]) -> dict[str, Value]:
    """An `info` dictionary as plain values; an object without a plain form becomes the text `<its type>`."""
    result: dict[str, Value] = {}
    for key, value in info.items():
        if type(value) in _ATOMS:
            result[str(key)] = cast("Value", value)
            continue
        try:
            result[str(key)] = plain(value)
        except EnvError:
            result[str(key)] = f"<{type(value).__module__}.{type(value).__qualname__}>"
    return result


def enumerate_actions(space: Space, mask: Value = None) -> list[Value]:
    """All elements of a finite space, or those that a mask allows, in a fixed order.

    Args:
        space: Discrete, MultiDiscrete, MultiBinary, or a Tuple of such.
        mask: Gymnasium's `info["action_mask"]` for a Discrete space: one 0 or 1 per element. None allows all.

    Raises:
        EnvError: The space is infinite or has more than 4096 elements, or the mask does not fit it.
    """
    if mask is not None:
        if not isinstance(space, spaces.Discrete):
            raise EnvError(f"an action mask for {space} cannot be enumerated")
        return [int(space.start) + index for index in legal_indices(mask, int(space.n))]
    if _num_elements(space) > MAX_ENUMERATED_ACTIONS:
        raise EnvError(f"{space} has too many actions to enumerate")
    match space:
        case spaces.Discrete():
            return list(range(int(space.start), int(space.start) + int(space.n)))
        case spaces.MultiDiscrete() | spaces.MultiBinary():
            points = itertools.product(*(range(size) for size in _sizes(space).flat))
            start = space.start if isinstance(space, spaces.MultiDiscrete) else np.zeros(space.shape)
            return [(np.reshape(point, space.shape) + start).astype(space.dtype) for point in points]
        case _:
            inner = [enumerate_actions(part) for part in cast("spaces.Tuple[Any]", space).spaces]
            return [list(point) for point in itertools.product(*inner)]


def legal_indices(mask: Value, n: int) -> list[int]:
    """The indices that a mask of length n allows; all of them when it allows none.

    An environment that masks every action (some do so in a terminal state) says nothing about which to take.

    Raises:
        EnvError: The mask has not n elements.
    """
    allowed = np.asarray(mask)
    if allowed.shape != (n,):
        raise EnvError(f"an action mask of shape {allowed.shape} does not fit {n} actions")
    return np.flatnonzero(allowed).tolist() or list(range(n))


def share_generator(space: Space, generator: np.random.Generator) -> None:
    """Makes a space and all spaces inside it draw from one generator."""
    # `Space.seed` would build a generator for each; the attribute is what its `np_random` property reads
    vars(space)["_np_random"] = generator
    for inner in _inner_spaces(space):
        share_generator(inner, generator)


def sample(space: Space, generator: np.random.Generator, mask: Value = None) -> Any:
    """A uniformly random element (as Gymnasium defines it for the space), drawn from `generator` alone.

    Raises:
        EnvError: The mask does not fit the space.
    """
    share_generator(space, generator)
    if mask is None:
        return space.sample()
    if isinstance(space, spaces.Discrete):
        legal = legal_indices(mask, int(space.n))
        return int(space.start) + legal[int(generator.random() * len(legal))]
    try:
        return space.sample(mask=cast("Any", mask))
    except (AssertionError, TypeError, ValueError, IndexError) as error:
        raise EnvError(f"an action mask does not fit {space}: {error}") from error


def _inner_spaces(space: Space) -> list[Space]:
    match space:
        case spaces.Dict():
            return list(space.spaces.values())
        case spaces.Tuple() | spaces.OneOf():
            return list(space.spaces)
        case spaces.Sequence():
            return [space.feature_space]
        case spaces.Graph():
            return [inner for inner in (space.node_space, space.edge_space) if inner is not None]
        case _:
            return []


def _num_elements(space: Space) -> int:
    match space:
        case spaces.Discrete():
            return int(space.n)
        case spaces.MultiDiscrete() | spaces.MultiBinary():
            return math.prod(_sizes(space).flat)
        case spaces.Tuple():
            return math.prod(_num_elements(inner) for inner in space.spaces)
        case _:
            raise EnvError(f"the actions of {space} cannot be enumerated: use a policy that proposes actions")


def _sizes(space: spaces.MultiDiscrete | spaces.MultiBinary) -> np.ndarray[Any, Any]:
    """How many values each component has, as Python integers (their product may be large)."""
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec.astype(object)
    return np.full(space.shape, 2, dtype=object)


def _array(space: Space, value: Value) -> np.ndarray[Any, Any]:
    if type(value) is np.ndarray and value.dtype == space.dtype:
        return value
    try:
        given = np.asarray(value)
        if given.dtype.kind not in "biuf":
            raise TypeError("not numbers")
        array = given.astype(space.dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise EnvError(f"{_short(value)} is no array of {space.dtype}: {error}") from error
    if array.dtype.kind != "f" and not np.array_equal(array, given):
        raise EnvError(f"{_short(value)} does not fit an array of {space.dtype}")
    return array


def _index(value: Value, size: int) -> int:
    if not isinstance(value, int | np.integer) or not 0 <= value < size:
        raise EnvError(f"{_short(value)} does not choose one of {size} spaces")
    return int(value)


def _base(value: float | str | bytes) -> Value:
    if isinstance(value, str):
        return str(value)
    return bytes(value) if isinstance(value, bytes) else float(value)


def _dtype(space: Space) -> str:
    return np.dtype(cast("Any", space.dtype)).str


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
