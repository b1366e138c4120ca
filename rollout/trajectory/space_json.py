"""Spaces as JSON, in the form that Minari datasets use, so that a run says what its columns mean.

The manifest holds the text; exports that need bounds, or the number of actions, read it there and need no
environment. It differs from Minari's form in one thing: bounds that are the same everywhere are one number,
for an image has a hundred thousand of them; `expand_bounds` undoes that. A space of a kind that the form does
not know becomes `{"type": "Unknown", "repr": ...}`. Bounds may be infinite, as in Minari.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from gymnasium import spaces

__all__ = ["expand_bounds", "space_to_json"]


def space_to_json(space: spaces.Space[Any]) -> str:
    """The description of a space, as text."""
    return json.dumps(_describe(space))


def expand_bounds(description: dict[str, Any]) -> dict[str, Any]:
    """A description in Minari's own form: a bound for every element."""
    match description:
        case {"type": "Box", "shape": shape, "low": low, "high": high}:
            full = {
                key: np.broadcast_to(value, shape).tolist() for key, value in (("low", low), ("high", high))
            }
            return {**description, **full}
        case {"type": "Dict", "subspaces": subspaces}:
            return {**description, "subspaces": {key: expand_bounds(s) for key, s in subspaces.items()}}
        case {"type": "Tuple", "subspaces": subspaces}:
            return {**description, "subspaces": [expand_bounds(s) for s in subspaces]}
        case _:
            return description


def _describe(space: spaces.Space[Any]) -> dict[str, object]:
    match space:
        case spaces.Discrete():
            return {"type": "Discrete", "dtype": "int64", "start": int(space.start), "n": int(space.n)}
        case spaces.Box():
            bounds = {"low": _compact(space.low), "high": _compact(space.high)}
            return {"type": "Box", "dtype": str(space.dtype), "shape": list(space.shape), **bounds}
        case spaces.MultiDiscrete():
            nvec, start = np.asarray(space.nvec).tolist(), np.asarray(space.start).tolist()
            return {"type": "MultiDiscrete", "dtype": str(space.dtype), "nvec": nvec, "start": start}
        case spaces.MultiBinary():
            return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.shape)}
        case spaces.Text():
            lengths = {"max_length": space.max_length, "min_length": space.min_length}
            return {"type": "Text", **lengths, "charset": space.characters}
        case spaces.Dict():
            return {"type": "Dict", "subspaces": {key: _describe(s) for key, s in space.spaces.items()}}
        case spaces.Tuple():
            return {"type": "Tuple", "subspaces": [_describe(s) for s in space.spaces]}
        case _:
            return {"type": "Unknown", "repr": repr(space)}


def _compact(bound: np.ndarray[Any, Any]) -> object:
    if bound.size and math.prod(bound.shape) > 1 and (bound == bound.flat[0]).all():
        return bound.flat[0].item()
    return bound.tolist()
