"""Compares what came out of a replay with the rows of what was played, up to the first difference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rollout.branch import BranchResult
from rollout.env import Env
from rollout.replay.recorded import Row
from rollout.trajectory.columns import values_to_arrow
from rollout.trajectory.digest import value_digest
from rollout.types import Step

__all__ = ["Comparison", "Difference"]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing that came out different.

    Attributes:
        where: "the beginning", "move 3", "node 7 of move 3".
        what: "observation[2]", "reward", "terminated", "a failure", ...
        recorded: As the run has it.
        played: As it came out now.
    """

    where: str
    what: str
    recorded: str
    played: str


class Comparison:
    """Compares with the rows of one run.

    Args:
        env: What was played; known by now what its spaces are.
        max_steps: After how many moves the run cut an episode.
    """

    def __init__(self, env: Env, max_steps: int) -> None:
        self._env = env
        self._max_steps = max_steps

    def of_move(self, t: int, row: Row, after: Row, result: BranchResult) -> Difference | None:
        """Of the move from one step to the next: reward, ending, and the state that it led to."""
        where = f"move {t}"
        if result.failure is not None:
            return _failed(where, result)
        step = result.steps[-1]
        is_cut = t + 1 == self._max_steps and not step.terminated
        step = replace(step, truncated=step.truncated or is_cut)
        return _compare_outcome(where, row, step) or self.of_state(where, after, step)

    def of_state(self, where: str, row: Row, step: Step) -> Difference | None:
        """Of what was observed, cell by cell, and the state's digest where the row has one."""
        [played] = values_to_arrow(self._env.observation_space, [step.observation]).to_pylist()
        for what, recorded, now in _differences(row["observation"], played, "observation"):
            return Difference(where, what, recorded, now)
        return _compare("state_hash", where, row, step.state_hash)

    def of_node(self, t: int, row: Row, result: BranchResult) -> Difference | None:
        """Of a node in the tree of move `t`: rows of nodes hold the digest of what was observed."""
        where = f"node {row['node_id']} of move {t}"
        if result.failure is not None:
            return _failed(where, result)
        step = result.steps[-1]
        return (
            _compare_outcome(where, row, step)
            or _compare("observation_digest", where, row, value_digest(step.observation))
            or _compare("state_hash", where, row, step.state_hash)
        )


def _compare_outcome(where: str, row: Row, step: Step) -> Difference | None:
    for what in ("reward", "terminated", "truncated"):
        for _, recorded, played in _differences(row[what], getattr(step, what), what):
            return Difference(where, what, recorded, played)
    return None


def _compare(what: str, where: str, row: Row, now: object) -> Difference | None:
    """Of a digest, which older rows, or searches that did not ask for it, do not have."""
    if row[what] is None or row[what] == now:
        return None
    return Difference(where, what, str(row[what]), str(now))


def _failed(where: str, result: BranchResult) -> Difference:
    assert result.failure is not None
    return Difference(where, "a failure", "none", f"{result.failure.boundary}: {result.failure.cause}")


def _differences(recorded: Any, played: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """(where, recorded, played) of every place in which two cells differ; NaN equals NaN."""
    if isinstance(recorded, dict) and isinstance(played, dict) and recorded.keys() == played.keys():
        for key, inner in recorded.items():
            yield from _differences(inner, played[key], f"{path}.{key}")
    elif isinstance(recorded, list) and isinstance(played, list) and len(recorded) == len(played):
        for index, (one, other) in enumerate(zip(recorded, played, strict=True)):
            yield from _differences(one, other, f"{path}[{index}]")
    elif recorded != played and not _both_nan(recorded, played):
        yield path, repr(recorded), repr(played)


def _both_nan(one: object, other: object) -> bool:
    return isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
