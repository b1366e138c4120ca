"""What crosses between the driver and a host: frozen values that pickle.

A checkpoint crosses as its name, never as its content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Generic, TypeVar

from rollout.sandbox.base import Capabilities, PhaseTimings
from rollout.sandbox.economics import WayCost, add_ways
from rollout.types import Value

__all__ = ["HostInfo", "HostStats", "Reply"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HostInfo:
    """A host that is ready.

    Attributes:
        capabilities: Of its engine.
        hint: Why it is not the strongest wall and how to get that one; None if it is, or was asked for by
            name.
        fingerprint: What a checkpoint of it needs to be restored elsewhere.
        image_digest: The image that its sandboxes boot from.
        node_id: The Ray node that it is on; empty without Ray.
        pid: Its process.
        machine: Facts about the machine, for `run.json`.
        env_description: What `Env.learn` needs on the driver.
    """

    capabilities: Capabilities
    hint: str | None
    fingerprint: str
    image_digest: str
    node_id: str
    pid: int
    machine: Mapping[str, str | int | float]
    env_description: Value = None


@dataclass(frozen=True, slots=True)
class HostStats:
    """A host at one moment; counts since it started."""

    branches: int = 0
    failed_branches: int = 0
    live_sandboxes: int = 0
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    evicted_checkpoints: int = 0
    remade_checkpoints: int = 0
    rss_bytes: int = 0
    timings: PhaseTimings = field(default_factory=PhaseTimings)
    ways: Mapping[str, WayCost] = field(default_factory=dict[str, WayCost])

    def plus(self, other: HostStats) -> HostStats:
        """The sum over two hosts."""
        timings = PhaseTimings(dict(self.timings.seconds), dict(self.timings.calls))
        timings.merge(other.timings)
        numbers = [f.name for f in fields(self) if f.name not in ("timings", "ways")]
        return HostStats(
            **{name: getattr(self, name) + getattr(other, name) for name in numbers},
            timings=timings,
            ways=add_ways(self.ways, other.ways),
        )

    def counts_only(self) -> HostStats:
        """What stays true of a host that is gone: what it did, not what it holds."""
        return replace(self, live_sandboxes=0, checkpoints=0, checkpoint_bytes=0, rss_bytes=0)


@dataclass(frozen=True, slots=True)
class Reply(Generic[T]):
    """An answer, and the seconds that the host spent on it: the rest of the call was Ray."""

    value: T
    duration_s: float
