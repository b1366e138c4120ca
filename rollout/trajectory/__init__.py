"""Trajectories: crash-safe Parquet tables of episodes, steps and search nodes.

Names are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rollout.trajectory.reader import Scan, scan
    from rollout.trajectory.rows import EpisodeRow, NodeRow, StepRow, Trajectory, make_episode_id
    from rollout.trajectory.sink import TrajectorySink

__all__ = [
    "EpisodeRow",
    "NodeRow",
    "Scan",
    "StepRow",
    "Trajectory",
    "TrajectorySink",
    "make_episode_id",
    "scan",
]

_HOMES = {"Scan": "reader", "scan": "reader", "TrajectorySink": "sink"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'rows')}"), name)
