"""The trees of a chunk, as far as an export wants them."""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false
# The functions of pyarrow.compute are made when it is imported.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rollout.trajectory.export.source import Chunk
from rollout.trajectory.export.targets import Node, Tree
from rollout.trajectory.export.text import to_texts
from rollout.trajectory.schema import ACTION

__all__ = ["NODE_COLUMNS", "MoveTree", "move_trees"]

NODE_COLUMNS = ("t", "node_id", "parent_id", "depth", ACTION, "visits", "value", "reward")
"""What is read of `nodes`."""


@dataclass(frozen=True, slots=True)
class MoveTree:
    """The tree of one move.

    Attributes:
        episode: Index of the episode in its chunk.
        t: The move.
        tree: The nodes by id.
    """

    episode: int
    t: int
    tree: Tree

    @property
    def root_value(self) -> float | None:
        """Value of the root; None where it has none or is not there."""
        root = self.tree.get(0)
        return None if root is None else root.value


def move_trees(chunk: Chunk, max_depth: int | None) -> Iterator[MoveTree]:
    """The trees of a chunk, by episode and move, without what is deeper than `max_depth`."""
    nodes = chunk.nodes
    owners = np.repeat(np.arange(chunk.episodes.num_rows), np.diff(chunk.node_offsets))
    if max_depth is not None:
        keep = nodes["depth"].to_numpy() <= max_depth
        nodes, owners = nodes.filter(pa.array(keep)), owners[keep]
    if not nodes.num_rows:
        return
    moves = nodes["t"].to_numpy()
    order = np.lexsort((moves, owners))  # stable: the nodes of a tree keep their order
    nodes, owners, moves = nodes.take(pa.array(order)), owners[order], moves[order]
    is_first = np.ones(len(owners), dtype=bool)
    is_first[1:] = (owners[1:] != owners[:-1]) | (moves[1:] != moves[:-1])
    rows = [
        Node(*fields)
        for fields in zip(
            nodes["node_id"].to_pylist(),
            nodes["parent_id"].to_pylist(),
            to_texts(nodes, ACTION),
            nodes["visits"].to_pylist(),
            nodes["value"].to_pylist(),
            nodes["reward"].to_pylist(),
            strict=True,
        )
    ]
    starts = np.flatnonzero(is_first)
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        tree = {node.node_id: node for node in rows[start:stop]}
        yield MoveTree(int(owners[start]), int(moves[start]), tree)
