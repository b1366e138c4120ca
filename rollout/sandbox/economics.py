"""What it costs to reach a child of a node, by the way it was reached, and what that saved.

| way | what is done |
|---|---|
| `clone` | the node's checkpoint is held: fork it |
| `continue` | the sandbox that was saved as it lives: the child goes on there (see `rollout.sandbox.heirs`) |
| `inherit` | so does the last child, and the checkpoint is given up for it |
| `replay` | it was evicted, or never saved: play its branch again from the nearest ancestor that is held |
| `reset` | no ancestor is held: begin the episode again, and replay all of it |
| `defer` | the state is left unsaved until something begins there (see `rollout.sandbox.deferral`) |

A sandbox that hibernates is woken when its child goes on there: waking is a part of `continue`. Where several
sandboxes are made at once, each counts with its share of the time.

Costs are running medians over the last `WINDOW` of each kind. What a way saved is the median time of the
other one: of a clone, a reset and as many steps as lie between; of a child that went on, a clone.

Pure bookkeeping; whoever does the work brings the seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

__all__ = [
    "WINDOW",
    "Economics",
    "RunningMedian",
    "WayCost",
    "WayEstimate",
    "add_ways",
    "choose_way",
    "ways_record",
]

WINDOW = 63
_FRESH = 16
"""A median is computed again after so many new numbers: a branch may take less time than sorting them."""


_NUM_TRIES = 16
"""Of each way, before medians are trusted."""
_TRY_AGAIN_EVERY = 256
"""Costs drift, so the dearer way gets one choice in so many."""


@dataclass(frozen=True, slots=True)
class WayEstimate:
    """What a way is expected to cost.

    Attributes:
        kind: Its name.
        expected_s: Seconds; means nothing before it was tried.
        num_tries: How often it was taken.
    """

    kind: str
    expected_s: float
    num_tries: int


def choose_way(ways: Sequence[WayEstimate]) -> str:
    """The cheapest way, once each was tried `_NUM_TRIES` times; else the first that was not.

    A way that is not the cheapest is tried again when fewer than one in `_TRY_AGAIN_EVERY` choices fell on
    it. Of equals the first is taken.

    Raises:
        ValueError: There is no way at all.
    """
    if not ways:
        raise ValueError("no way to choose from")
    num_choices = sum(way.num_tries for way in ways)
    for way in ways:
        if way.num_tries < _NUM_TRIES or way.num_tries * _TRY_AGAIN_EVERY < num_choices:
            return way.kind
    return min(ways, key=lambda way: way.expected_s).kind


class RunningMedian:
    """The median of the last `WINDOW` numbers, up to `_FRESH` of them late once there are many."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._value = 0.0
        self._num_since = 0

    def add(self, value: float) -> None:
        """Takes in a number."""
        self._last.append(value)
        self._num_since += 1
        if self._num_since >= _FRESH or len(self._last) <= _FRESH:
            self._value = median(self._last)
            self._num_since = 0

    @property
    def value(self) -> float:
        """The median; 0 before the first number."""
        return self._value


@dataclass(frozen=True, slots=True)
class WayCost:
    """One way, so far.

    Attributes:
        count: States that were reached so.
        seconds: What that took.
        saved_s: Seconds that the alternative would have taken beyond that, by its own median; below 0 where
            it would have been cheaper.
        median_s: Running median of one; over several hosts or sessions the mean of theirs, by count; 0 where
            it is not known.
    """

    count: int = 0
    seconds: float = 0.0
    saved_s: float = 0.0
    median_s: float = 0.0

    def plus(self, other: WayCost) -> WayCost:
        """Both together."""
        known = [way for way in (self, other) if way.median_s > 0.0]
        weight = sum(way.count for way in known)
        median_s = sum(way.count * way.median_s for way in known) / weight if weight else 0.0
        return WayCost(
            self.count + other.count, self.seconds + other.seconds, self.saved_s + other.saved_s, median_s
        )


def add_ways(first: Mapping[str, WayCost], second: Mapping[str, WayCost]) -> dict[str, WayCost]:
    """The sums of two accounts."""
    total = dict(first)
    for kind, way in second.items():
        total[kind] = total[kind].plus(way) if kind in total else way
    return total


def ways_record(
    ways: Mapping[str, WayCost], earlier: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """An account as JSON, with that of earlier sessions added."""
    before = {
        kind: WayCost(int(way["count"]), way["seconds"], way["saved_s"], way.get("median_s", 0.0))
        for kind, way in earlier.items()
    }
    return {
        kind: {
            "count": way.count,
            "seconds": round(way.seconds, 6),
            "saved_s": round(way.saved_s, 6),
            "median_s": round(way.median_s, 9),
        }
        for kind, way in sorted(add_ways(before, ways).items())
    }


class Economics:
    """Counts and costs of one engine."""

    def __init__(self) -> None:
        self._medians: dict[str, RunningMedian] = {}
        self._counts: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._saved_s: dict[str, float] = {}

    def add(self, kind: str, duration_s: float, count: int = 1) -> None:
        """Takes in that `count` things of a kind took so long together."""
        self._medians.setdefault(kind, RunningMedian()).add(duration_s / count)
        self._counts[kind] = self._counts.get(kind, 0) + count
        self._seconds[kind] = self._seconds.get(kind, 0.0) + duration_s

    def cost_s(self, kind: str) -> float:
        """The running median of a kind; 0 before the first."""
        running = self._medians.get(kind)
        return 0.0 if running is None else running.value

    def estimate(self, kind: str) -> WayEstimate:
        """What a way is expected to cost."""
        return WayEstimate(kind, self.cost_s(kind), self._counts.get(kind, 0))

    def rebuild_s(self, *, from_reset: bool) -> float:
        """What making a state again would take: an opening, or one branch of a state that is held."""
        if from_reset:
            return self.cost_s("open")
        return self.cost_s("replay") or self.cost_s("clone") + self.cost_s("step")

    def cloned(self, duration_s: float, count: int, num_steps: int) -> None:
        """Takes in a fork of `count` children of a state that lies `num_steps` after its episode's reset.

        Without the checkpoint each would have taken a reset and these steps.
        """
        self.add("clone", duration_s, count)
        other_s = self.cost_s("open") + num_steps * self.cost_s("step")
        self._save("clone", count * other_s - duration_s)

    def continued(self, duration_s: float, num_steps: int, *, is_held: bool, gives_up: bool) -> None:
        """Takes in that a child went on in its parent's sandbox, which lies `num_steps` after the reset.

        Else it would have been cloned, and the checkpoint first made again, if it is not held.
        """
        kind = "inherit" if gives_up else "continue"
        self.add(kind, duration_s)
        clone_s = self.cost_s("clone") or self.cost_s("open") + num_steps * self.cost_s("step")
        remake_s = 0.0 if is_held else self.rebuild_s(from_reset=num_steps == 0)
        self._save(kind, clone_s + remake_s - duration_s)

    def replayed(self, duration_s: float, num_steps: int, *, from_reset: bool) -> None:
        """Takes in that a state was made again by playing `num_steps`, perhaps from the reset on."""
        kind = "reset" if from_reset else "replay"
        self.add(kind, duration_s)
        if not from_reset:
            self._save(kind, self.cost_s("open") + num_steps * self.cost_s("step") - duration_s)

    def deferred(self, duration_s: float, saved_s: float) -> None:
        """Takes in a branch whose state was left unsaved, which saved so much against one that is saved.

        What making it later costs is under `replay`.
        """
        self.add("defer", duration_s)
        self._save("defer", saved_s)

    @property
    def ways(self) -> Mapping[str, WayCost]:
        """What each way cost and saved so far; only those that were taken."""
        return {
            kind: WayCost(
                self._counts[kind], self._seconds[kind], self._saved_s.get(kind, 0.0), self.cost_s(kind)
            )
            for kind in ("clone", "continue", "inherit", "replay", "reset", "defer")
            if kind in self._counts
        }

    def _save(self, kind: str, seconds: float) -> None:
        self._saved_s[kind] = self._saved_s.get(kind, 0.0) + seconds
