"""What an export was asked for, and what its writers know of the run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from rollout.errors import ConfigError, SinkError
from rollout.trajectory.export.source import Selection
from rollout.trajectory.reader import OpenRun

__all__ = ["Context", "ExportOptions", "make_context"]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What is exported, and how.

    Attributes:
        selection: Which episodes.
        min_visits: Nodes with fewer visits are left out.
        max_depth: Nodes deeper than this are left out; None for no limit.
        margin: Least gap between the values of a preference pair.
        test_fraction: Share of the tasks that go to the test split.
        split_seed: Which ones.
        system: What the system says at the beginning of a conversation.
        history: Moves before the current one that a prompt shows; None for all.

    Raises:
        ConfigError: On making one that is out of range.
    """

    selection: Selection = field(default_factory=Selection)
    min_visits: int = 1
    max_depth: int | None = None
    margin: float = 0.0
    test_fraction: float = 0.0
    split_seed: int = 0
    system: str | None = None
    history: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.test_fraction <= 1:
            raise ConfigError(f"the test fraction must lie between 0 and 1, not at {self.test_fraction}")
        for name, value, least in (
            ("min-visits", self.min_visits, 0),
            ("max-depth", self.max_depth, 1),
            ("margin", self.margin, 0),
            ("history", self.history, 0),
        ):
            if value is not None and not value >= least:
                raise ConfigError(f"{name} must be at least {least}, not {value}")


@dataclass(frozen=True, slots=True)
class Context:
    """What a writer knows.

    Attributes:
        run: The run.
        options: What was asked for.
        split: "train" or "test".
        discount: Of the run's search.
    """

    run: OpenRun
    options: ExportOptions
    split: str
    discount: float


def make_context(run: OpenRun, options: ExportOptions, split: str) -> Context:
    """The context of one split of an export; the discount is 1 where the run does not say."""
    discount = 1.0
    if run.storage.size("run.json") is not None:
        try:
            description = json.loads(run.storage.read("run.json"))
            discount = float(description["config"]["search"]["discount"])
        except (ValueError, KeyError, TypeError) as error:
            raise SinkError.wrap(error, "run.json does not say the discount of the search") from error
    return Context(run, options, split, discount)
