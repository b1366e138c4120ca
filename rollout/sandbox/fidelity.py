"""Finds out whether copies of an environment behave as the original: before a search trusts them.

Of twelve common Gymnasium environments, six no longer behave like the original after `copy.deepcopy`: what
they keep in a C library or a module is not copied, or their own way of copying makes a fresh one. A search
over such copies would be silently wrong.

The test plays an original, then two copies taken before it moved (one after the other, so that shared state
shows), a copy of a copy, and two copies in step with each other; all get the same actions and must give the
same steps, bit for bit. It cannot prove that copies are faithful: what shows only after more steps, or in
states that random actions do not reach, stays unseen.
"""

from __future__ import annotations

from typing import Protocol

from rollout.errors import CheckpointError
from rollout.sandbox import wire
from rollout.types import Value

__all__ = ["Player", "check_fidelity"]


class Player(Protocol):
    """An episode in progress that can be copied."""

    def act(self, index: int) -> Value:
        """Plays an action that is a function of `index` and of its state; all that it answers is compared."""
        ...

    def copy(self) -> Player:
        """An independent player in the same state."""
        ...


def check_fidelity(original: Player, num_steps: int, method: str) -> None:
    """Plays equal actions on the original and on copies of it.

    Args:
        original: Spoilt by the test.
        num_steps: How many.
        method: How the copies are made, for the message.

    Raises:
        CheckpointError: A copy's step differs from the original's; the first difference is named.
    """
    first, second = original.copy(), original.copy()
    grandchild = first.copy()
    in_step = [original.copy(), original.copy()]
    expected = [original.act(index) for index in range(num_steps)]
    for name, copy in (("a copy", first), ("a second copy", second), ("a copy of a copy", grandchild)):
        for index in range(num_steps):
            _compare(expected[index], copy.act(index), f"{name} made by {method}, at step {index + 1}")
    for index in range(num_steps):
        for copy in in_step:
            where = f"one of two copies made by {method} and played in step, at step {index + 1}"
            _compare(expected[index], copy.act(index), where)


def _compare(expected: Value, actual: Value, where: str) -> None:
    if wire.pack(expected) == wire.pack(actual):
        return
    path, wanted, got = _first_difference(expected, actual, "")
    raise CheckpointError(
        f"copies of this environment do not behave as the original: {where}, {path or 'the answer'} is "
        f"{_short(got)} instead of {_short(wanted)}; use the process or microvm engine, which fork it whole"
    )


def _first_difference(expected: Value, actual: Value, path: str) -> tuple[str, Value, Value]:
    if isinstance(expected, dict) and isinstance(actual, dict) and expected.keys() == actual.keys():
        pairs = [(f"{path}.{key}".lstrip("."), expected[key], actual[key]) for key in expected]
    elif isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        pairs = [(f"{path}[{i}]", *both) for i, both in enumerate(zip(expected, actual, strict=True))]
    else:
        return path, expected, actual
    for inner_path, wanted, got in pairs:
        if wire.pack(wanted) != wire.pack(got):
            return _first_difference(wanted, got, inner_path)
    return path, expected, actual


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else text[:97] + "..."
