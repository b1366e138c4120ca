"""The moves and search trees that a page shows: which, how much of each, and in what form.

A run may hold millions of nodes, a page should not. Episodes are taken in this order: the best, the worst
and the median return, then all others as they began; of each, its moves in order; until a budget is spent
(`Limits`). Of a tree that is larger than its share the most visited nodes are kept. Every cut is counted,
so that the page can say it.

Invariant: in a `DrawnTree` a parent comes before its children, so that it can be drawn in one pass.
"""

# pyarrow has no types, and makes its compute functions when it is imported.
# pyright: reportUnknownParameterType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rollout.report.summary import Episode, RunSummary
from rollout.report.text import value_text
from rollout.trajectory import scan
from rollout.trajectory.storage import Location

__all__ = ["DrawnTree", "EpisodeDetail", "Limits", "Move", "read_details", "read_moves"]

_MOVE_COLUMNS = (
    "episode_id",
    "t",
    "observation",
    "action",
    "reward",
    "terminated",
    "truncated",
    "info",
    "node_id",
    "visits",
    "value",
    "legal_actions",
    "action_visits",
    "policy_target",
    "duration_s",
)
_NODE_COLUMNS = (
    "tree_id",
    "t",
    "node_id",
    "parent_id",
    "depth",
    "action",
    "visits",
    "value",
    "prior",
    "reward",
    "terminated",
    "truncated",
    "failure",
)
_MAX_ACTION_CHARS = 60
_MAX_OBSERVATION_CHARS = 600


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a run a page holds.

    Attributes:
        max_episodes: Episodes whose moves are on the page.
        max_moves: Moves on the page, over all episodes.
        max_nodes: Nodes on the page, over all trees.
        max_tree_nodes: Nodes of one tree on the page.
        max_nodes_read: Nodes that are read to choose from.
    """

    max_episodes: int = 200
    max_moves: int = 10_000
    max_nodes: int = 120_000
    max_tree_nodes: int = 2_000
    max_nodes_read: int = 1_000_000


@dataclass(frozen=True, slots=True)
class DrawnTree:
    """A search tree as columns, one entry per node; entry 0 is the root.

    Attributes:
        num_nodes: Nodes of the whole tree, those that are left out included.
        node_id: Ids of the nodes.
        parent: Position of the parent in these columns, -1 for the root.
        action: What led here, as text.
        visits: Visits.
        value: Value of the state, None where it was never evaluated.
        prior: Prior probability of the action, or None.
        reward: Reward of the action, or None.
        mark: "terminated", "truncated", "failed: why", or empty.
    """

    num_nodes: int
    node_id: list[int]
    parent: list[int]
    action: list[str]
    visits: list[int]
    value: list[float | None]
    prior: list[float | None]
    reward: list[float | None]
    mark: list[str]


@dataclass(frozen=True, slots=True)
class Move:
    """One step of an episode, ready to be shown; the last one of an episode has no action.

    Attributes:
        t: Time step.
        observation: What was seen before the action, as text, in lines if it has them.
        action: What was played, as text; None in the last row.
        reward: What it brought, or None.
        ending: "terminated" or "truncated" when the episode ended here, otherwise empty.
        info: What the environment said beside the observation, as JSON text.
        node_id: The node of this move's tree that the action led to, or None.
        visits: Visits of the root, or None without a search.
        value: Value of the root after the search, or None.
        choices: (action as text, visits, target probability or None) for each legal action.
        played: Position in `choices` of the action that was played, or None.
        duration_s: Seconds that the move took, or None.
        tree: The tree, or None when there is none or it is left out.
    """

    t: int
    observation: str
    action: str | None
    reward: float | None
    ending: str
    info: str
    node_id: int | None
    visits: int | None
    value: float | None
    choices: tuple[tuple[str, int, float | None], ...]
    played: int | None
    duration_s: float | None
    tree: DrawnTree | None = None


@dataclass(frozen=True, slots=True)
class EpisodeDetail:
    """An episode with its moves."""

    episode: Episode
    moves: tuple[Move, ...]


def read_details(summary: RunSummary, limits: Limits | None = None) -> list[EpisodeDetail]:
    """The episodes, moves and trees for a page, by episode number.

    Raises:
        SinkError: A committed file cannot be read.
    """
    limits = limits or Limits()
    chosen = _choose_episodes(summary, limits)
    moves = read_moves(summary.files.folder, [episode.episode_id for episode in chosen])
    wanted = _choose_trees(chosen, moves, limits)
    trees = _read_trees(summary.files.folder, wanted, limits)
    details = [
        EpisodeDetail(
            episode,
            tuple(
                _with_tree(move, trees.get((episode.episode_id, move.t)))
                for move in moves.get(episode.episode_id, ())
            ),
        )
        for episode in chosen
    ]
    return sorted(details, key=lambda detail: detail.episode.number)


def read_moves(folder: Location, episode_ids: Sequence[str]) -> dict[str, list[Move]]:
    """The moves of episodes in order, without trees; episodes that have none are left out.

    Raises:
        SinkError: A committed file cannot be read.
    """
    if not episode_ids:
        return {}
    wanted = pc.field("episode_id").isin(list(episode_ids))
    table = scan(folder, "steps", columns=list(_MOVE_COLUMNS), filter=wanted).to_table()
    moves: dict[str, list[Move]] = {}
    for row in table.sort_by([("episode_id", "ascending"), ("t", "ascending")]).to_pylist():
        moves.setdefault(row["episode_id"], []).append(_move(row))
    return moves


def _choose_episodes(summary: RunSummary, limits: Limits) -> list[Episode]:
    """By the order in the module's docstring, while their moves are within the limits."""
    episodes = summary.episodes(0, 50 * limits.max_episodes)  # beyond these, not even the best one is sought
    by_return = sorted(
        (episode for episode in episodes if episode.return_ is not None),
        key=lambda episode: (-cast("float", episode.return_), episode.number),
    )
    telling = [by_return[0], by_return[-1], by_return[len(by_return) // 2]] if by_return else []
    chosen: dict[str, Episode] = {}
    num_moves = 0
    for episode in (*telling, *episodes):
        if episode.episode_id in chosen:
            continue
        if len(chosen) == limits.max_episodes or (chosen and num_moves + episode.length > limits.max_moves):
            break
        chosen[episode.episode_id] = episode
        num_moves += episode.length
    return list(chosen.values())


def _choose_trees(
    episodes: Iterable[Episode], moves: Mapping[str, Sequence[Move]], limits: Limits
) -> list[tuple[str, int]]:
    """(episode id, t) of the trees to read; a tree has about as many nodes as its root has visits."""
    wanted: list[tuple[str, int]] = []
    num_drawn = num_read = 0
    for episode in episodes:
        for move in moves.get(episode.episode_id, ()):
            if not move.visits:
                continue
            num_drawn += min(move.visits, limits.max_tree_nodes)
            num_read += move.visits
            if wanted and (num_drawn > limits.max_nodes or num_read > limits.max_nodes_read):
                return wanted
            wanted.append((episode.episode_id, move.t))
    return wanted


def _read_trees(
    folder: Location, wanted: Sequence[tuple[str, int]], limits: Limits
) -> dict[tuple[str, int], DrawnTree]:
    if not wanted:
        return {}
    keys = {f"{episode_id}/{t}": (episode_id, t) for episode_id, t in wanted}
    is_wanted = pc.field("tree_id").isin(list(keys))
    table = scan(folder, "nodes", columns=list(_NODE_COLUMNS), filter=is_wanted).to_table()
    table = table.sort_by([("tree_id", "ascending"), ("node_id", "ascending")]).combine_chunks()
    tree_ids = np.asarray(table.column("tree_id").to_pylist(), dtype=object)
    starts = [i for i in range(len(tree_ids)) if i == 0 or tree_ids[i] != tree_ids[i - 1]]
    trees: dict[tuple[str, int], DrawnTree] = {}
    for start, end in zip(starts, [*starts[1:], len(tree_ids)], strict=True):
        trees[keys[tree_ids[start]]] = draw_tree(table.slice(start, end - start), limits.max_tree_nodes)
    return trees


def draw_tree(nodes: pa.Table, max_nodes: int) -> DrawnTree:
    """The columns of one tree, cut to its most visited nodes.

    Args:
        nodes: Rows of the `nodes` table, all of one tree.
        max_nodes: How many to keep.
    """
    ids = _integers(nodes, "node_id")
    parent_ids = _integers(nodes, "parent_id")
    order = np.lexsort((ids, _integers(nodes, "depth"), -_integers(nodes, "visits")))
    position: dict[int, int] = {}
    kept: list[int] = []
    parent: list[int] = []
    for row in order.tolist():
        parent_id = int(parent_ids[row])
        if len(kept) == max_nodes:
            break
        if parent_id not in position and (parent_id != -1 or position):
            continue  # its parent is left out, or this is no tree: a second root, a child above its parent
        position[int(ids[row])] = len(kept)
        parent.append(-1 if parent_id == -1 else position[parent_id])
        kept.append(row)
    rows = nodes.take(pa.array(kept, pa.int64())).to_pylist()
    return DrawnTree(
        num_nodes=nodes.num_rows,
        node_id=[row["node_id"] for row in rows],
        parent=parent,
        action=[value_text(row["action"], _MAX_ACTION_CHARS) for row in rows],
        visits=[row["visits"] for row in rows],
        value=[_finite(row["value"]) for row in rows],
        prior=[_finite(row["prior"]) for row in rows],
        reward=[_finite(row["reward"]) for row in rows],
        mark=[_mark(row) for row in rows],
    )


def _integers(table: pa.Table, column: str) -> npt.NDArray[np.int64]:
    """A column as numbers, with -1 where it is null."""
    filled = pc.fill_null(table.column(column), -1)
    return np.asarray(filled.to_numpy(), dtype=np.int64)


def _mark(row: Mapping[str, Any]) -> str:
    failure = cast("Mapping[str, Any] | None", row["failure"])
    if failure is not None:
        return value_text(f"failed: {failure['boundary']}: {failure['cause']}")
    return "terminated" if row["terminated"] else "truncated" if row["truncated"] else ""


def _move(row: Mapping[str, Any]) -> Move:
    is_last = row["terminated"] is None  # the final observation, which no action follows
    legal = cast("Sequence[object] | None", row["legal_actions"]) or ()
    visits = cast("Sequence[int] | None", row["action_visits"]) or ()
    target = cast("Sequence[float] | None", row["policy_target"])
    return Move(
        t=row["t"],
        observation=value_text(row["observation"], _MAX_OBSERVATION_CHARS, multiline=True),
        action=None if is_last else value_text(row["action"], _MAX_ACTION_CHARS),
        reward=_finite(row["reward"]),
        ending="terminated" if row["terminated"] else "truncated" if row["truncated"] else "",
        info=value_text(row["info"], _MAX_OBSERVATION_CHARS),
        node_id=row["node_id"],
        visits=row["visits"],
        value=_finite(row["value"]),
        choices=tuple(
            (value_text(action, _MAX_ACTION_CHARS), count, _finite(target[i]) if target else None)
            for i, (action, count) in enumerate(zip(legal, visits, strict=False))
        ),
        played=None if is_last or row["action"] not in legal else legal.index(row["action"]),
        duration_s=_finite(row["duration_s"]),
    )


def _with_tree(move: Move, tree: DrawnTree | None) -> Move:
    return move if tree is None else replace(move, tree=tree)


def _finite(value: float | None) -> float | None:
    """Numbers that JSON knows; a damaged row may hold others."""
    return value if value is not None and math.isfinite(value) else None
