"""What a run recorded, as a replay needs it: an episode with its steps, a tree, the order of its nodes."""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from rollout.errors import ConfigError
from rollout.trajectory.reader import scan
from rollout.trajectory.storage import Location

__all__ = ["RecordedEpisode", "Row", "nodes_below", "path_to", "read_episode", "read_tree", "waves"]

_WAVE = 16
"""Branches of a tree that are played again in one call."""

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RecordedEpisode:
    """An episode as a run recorded it.

    Attributes:
        episode: Its row.
        steps: Its steps by ascending t.
    """

    episode: Row
    steps: Sequence[Row]


def read_episode(run_dir: Location, episode_id: str) -> RecordedEpisode:
    """Reads an episode.

    Raises:
        SinkError: The run has no such episode, or cannot be read.
        ConfigError: No step of it is recorded: it failed before it began.
    """
    is_wanted = pc.field("episode_id") == episode_id
    episodes = scan(run_dir, "episodes", filter=is_wanted).to_table().to_pylist()
    steps = scan(run_dir, "steps", filter=is_wanted).to_table().sort_by("t").to_pylist()
    if not episodes or not steps:
        raise ConfigError(f"no step of the episode {episode_id} is recorded: there is nothing to play again")
    return RecordedEpisode(episodes[0], steps)


def read_tree(run_dir: Location, episode_id: str, t: int) -> list[Row]:
    """The nodes of the tree of move `t`, by ascending id.

    Raises:
        SinkError: The run cannot be read.
        ConfigError: There is no such tree.
    """
    is_wanted = (pc.field("episode_id") == episode_id) & (pc.field("t") == t)
    rows = scan(run_dir, "nodes", filter=is_wanted).to_table().sort_by("node_id").to_pylist()
    if not rows:
        raise ConfigError(
            f"no tree of move {t} is recorded: the episode has no such move, was played without a search, or "
            "sink.record_nodes was off"
        )
    return rows


def path_to(by_id: Mapping[int, Row], node_id: int) -> list[Row]:
    """The nodes from the root, which is left out, to a node."""
    path: list[Row] = []
    while (row := by_id[node_id])["parent_id"] is not None:
        path.append(row)
        node_id = row["parent_id"]
    return path[::-1]


def nodes_below(by_id: Mapping[int, Row], node_id: int) -> tuple[list[Row], int]:
    """The nodes below a node, parents before their children; how many branches below it had failed.

    Raises:
        ConfigError: There is no such node, or its branch failed.
    """
    row = by_id.get(node_id)
    if row is None:
        raise ConfigError(f"the tree has no node {node_id}: its nodes are 0 to {max(by_id)}")
    if row["failure"] is not None:
        raise ConfigError(f"the branch of node {node_id} failed: it led to no state")
    found, num_failed = {node_id}, 0
    below: list[Row] = []
    for each in sorted(by_id.values(), key=lambda one: (one["depth"], one["node_id"])):
        if each["parent_id"] not in found:
            continue
        if each["failure"] is not None:
            num_failed += 1
            continue
        found.add(each["node_id"])
        below.append(each)
    return below, num_failed


def waves(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of one depth, at most so many at a time."""
    wave: list[Row] = []
    for row in rows:
        if wave and (row["depth"] != wave[0]["depth"] or len(wave) == _WAVE):
            yield wave
            wave = []
        wave.append(row)
    if wave:
        yield wave
