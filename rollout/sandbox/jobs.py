"""What is pure about branch jobs: which of them share a clone, and what of their results can be recorded."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from rollout.branch import BranchJob
from rollout.errors import EnvError
from rollout.types import PlayoutResult, Step

__all__ = ["by_checkpoint", "with_finite_reward", "with_finite_value"]


def with_finite_reward(step: Step) -> Step:
    """A step as it may be recorded; every reward comes by here.

    Raises:
        EnvError: Its reward is no finite number.
    """
    if step.reward is not None and not isfinite(step.reward):
        raise EnvError(f"the environment gave a reward of {step.reward}, which is no finite number")
    return step


def with_finite_value(played: PlayoutResult) -> PlayoutResult:
    """A playout as it may be told to a search.

    Raises:
        EnvError: Its value is no finite number.
    """
    if not isfinite(played.value):
        raise EnvError(f"the rewards of a playout add up to {played.value}, which is no finite number")
    return played


def by_checkpoint(jobs: Sequence[BranchJob], *, most: int) -> list[list[int]]:
    """Indices of jobs that share a checkpoint, at most `most` in a group, in order of their first job."""
    groups: list[list[int]] = []
    open_groups: dict[str, list[int]] = {}
    for index, job in enumerate(jobs):
        group = open_groups.get(job.checkpoint.id, [])
        if not group or len(group) == most:
            group = list[int]()
            groups.append(group)
            open_groups[job.checkpoint.id] = group
        group.append(index)
    return groups
