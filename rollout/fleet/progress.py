"""Where a run is, for a display to look at while it goes on. Counting only: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rollout.trajectory.rows import EpisodeRow
from rollout.types import Failure

__all__ = ["Progress"]


@dataclass(slots=True)
class Progress:
    """Where a run is; the same object all the time, for a display to look at.

    Attributes:
        total: Episodes that are to be played.
        done: Episodes recorded, failed ones included.
        failed: Those that failed.
        first_failure: Of the first one that failed.
        returns: Of the graded ones.
        lengths: Actions of the ones that did not fail.
        branches: Finished so far.
        live_sandboxes: At the last pulse.
        checkpoints: At the last pulse.
        lost_hosts: Hosts that died and were replaced.
        wall: What stands between guests and the machine; empty until the hosts are up.
        hint: How to get a stronger wall, if there is one.
        notes: What a user must know about what was there before a run was resumed.
        waits_for: What is waited for before Ray is started; mostly empty.
        started_s: Monotonic time at which playing began; None before.
        finished_s: When it ended; None before.
    """

    total: int
    done: int = 0
    failed: int = 0
    first_failure: Failure | None = None
    returns: list[float] = field(default_factory=list[float])
    lengths: list[int] = field(default_factory=list[int])
    branches: int = 0
    live_sandboxes: int = 0
    checkpoints: int = 0
    lost_hosts: int = 0
    wall: str = ""
    hint: str | None = None
    notes: list[str] = field(default_factory=list[str])
    waits_for: str = ""
    started_s: float | None = None
    finished_s: float | None = None

    @property
    def mean_return(self) -> float | None:
        """None while no episode was graded."""
        return sum(self.returns) / len(self.returns) if self.returns else None

    def add(self, episode: EpisodeRow) -> None:
        """Counts an episode."""
        self.count(episode.failure, episode.length, episode.return_)

    def count(self, failure: Failure | Mapping[str, Any] | None, length: int, return_: float | None) -> None:
        """Counts an episode of which that is known; a failure may be a row's."""
        self.done += 1
        if failure is not None:
            self.failed += 1
            self.first_failure = self.first_failure or _failure(failure)
            return
        self.lengths.append(length)
        if return_ is not None:
            self.returns.append(return_)


def _failure(failure: Failure | Mapping[str, Any]) -> Failure:
    return failure if isinstance(failure, Failure) else Failure(**failure)
