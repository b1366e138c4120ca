"""A tree as JSON, and back: every column under its own name, so that a file can be read without this library.

Invariant: `tree_from_json(tree_to_json(tree))` equals `tree` column by column, to the bit.

What follows from other columns (`parent`, `begun`, `num_unready`, ...) is not written.

Not guaranteed: that a search can go on from it. What was in flight, and the random choices of an algorithm,
are not part of a tree; only one at rest can be written.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from math import isfinite
from typing import Any, cast

from rollout.errors import SearchError
from rollout.search.tree import ILLEGAL, NONE, SETTLED, Tree

__all__ = ["tree_from_json", "tree_to_json"]

VERSION = 2
READABLE = (1, 2)
"""Version 1 had columns of what is in flight besides, all zeros, which are passed over."""
NODE_COLUMNS = (
    "visits",
    "value",
    "raw_value",
    "evaluations",
    "depth",
    "num_actions",
    "first_slot",
    "flags",
    "open_ended",
    "state_hash",
    "trial",
    "entry",
)
SLOT_COLUMNS = ("slots", "priors")
EDGE_COLUMNS = (
    "edge_visits",
    "edge_value",
    "edge_outcome",
    "edge_node",
    "edge_action",
    "edge_draws",
    "edge_state",
)
OUTCOME_COLUMNS = (
    "outcome_node",
    "outcome_edge",
    "outcome_next",
    "outcome_draws",
    "outcome_visits",
    "outcome_reward",
    "outcome_discount",
)
TABLES = (NODE_COLUMNS, SLOT_COLUMNS, EDGE_COLUMNS, OUTCOME_COLUMNS)


def tree_to_json(tree: Tree) -> str:
    """The tree as one JSON object.

    Raises:
        SearchError: Trials are in flight.
    """
    if tree.begun != tree.visits:
        raise SearchError("a tree with trials in flight cannot be written")
    columns = {name: list(getattr(tree, name)) for table in TABLES for name in table}
    return json.dumps({"version": VERSION, **columns}, allow_nan=False)


def tree_from_json(text: str) -> Tree:
    """The tree that `tree_to_json` wrote.

    Raises:
        SearchError: The text is no such object, or its columns do not fit each other.
    """
    try:
        data = cast("object", json.loads(text))
    except ValueError as error:
        raise SearchError.wrap(error, "a tree's JSON") from error
    if not isinstance(data, dict):
        raise SearchError("a tree's JSON must be an object")
    columns = cast("Mapping[str, Any]", data)
    if columns.get("version") not in READABLE:
        raise SearchError(f"a tree of version {columns.get('version')!r}; this library reads up to {VERSION}")
    tree = Tree()
    values, actions = array("d"), array("i")
    filled: dict[str, Any] = {**vars(tree), "edge_value": values, "edge_action": actions}
    for table in TABLES:
        for name in table:
            _fill(filled[name], name, columns.get(name))
        if len({len(filled[name]) for name in table}) != 1:
            raise SearchError(f"a tree's columns {', '.join(table)} must have equal lengths")
    _check_references(tree)
    _place_edges(tree, actions, values)
    _derive(tree)
    return tree


def _fill(column: Any, name: str, values: object) -> None:
    """Fills one column, whose type checks each entry."""
    if not isinstance(values, list):
        raise SearchError(f"a tree's JSON has no column {name!r}")
    entries = cast("list[Any]", values)
    try:
        if isinstance(column, array | bytearray):
            column.extend(entries)
        elif name == "state_hash":
            column.extend(None if entry is None else str(entry) for entry in entries)
        else:
            kind = float if name.endswith("value") else int
            column.extend(kind(entry) for entry in entries)
    except (TypeError, ValueError, OverflowError) as error:
        raise SearchError.wrap(error, f"column {name!r} of a tree") from error
    if any(isinstance(entry, float) and not isfinite(entry) for entry in column):
        raise SearchError(f"column {name!r} of a tree has an entry that is not finite")


def _place_edges(tree: Tree, actions: array[int], values: array[float]) -> None:
    """Puts what is written by edge into the slots."""
    tree.slot_value.frombytes(bytes(8 * len(tree.slots)))
    tree.slot_begun.frombytes(bytes(4 * len(tree.slots)))
    for edge, (node, action, value) in enumerate(zip(tree.edge_node, actions, values, strict=True)):
        if not (0 <= action < tree.num_actions[node] and tree.edge(node, action) == edge):
            raise SearchError(f"edge {edge} of a tree is not in the slot of its action {action}")
        slot = tree.first_slot[node] + action
        tree.edge_slot.append(slot)
        tree.slot_value[slot] = value
        tree.slot_begun[slot] = tree.edge_visits[edge]


def _derive(tree: Tree) -> None:
    """Fills the columns that are not written, because at rest they follow from the others."""
    tree.begun.extend(tree.visits)
    for node, count in enumerate(tree.num_actions):
        ready = sum(
            tree.edge_outcome[edge] != NONE and tree.edge_state[edge] <= SETTLED
            for edge in tree.edges(node)
            if edge >= 0
        )
        tree.num_unready.append(count + tree.open_ended[node] - ready)


def _check_references(tree: Tree) -> None:
    """Every row that another names must exist."""
    if not len(tree):
        raise SearchError("a tree needs a root")
    num_edges, num_outcomes = len(tree.edge_visits), len(tree.outcome_node)
    limits = (
        ("slots", ILLEGAL, num_edges),
        ("edge_node", 0, len(tree)),
        ("edge_outcome", NONE, num_outcomes),
        ("outcome_node", 0, len(tree)),
        ("outcome_edge", 0, num_edges),
        ("outcome_next", NONE, num_outcomes),
        ("entry", NONE, num_outcomes),
    )
    for name, low, high in limits:
        if any(not low <= row < high for row in getattr(tree, name)):
            raise SearchError(f"column {name!r} of a tree names a row that does not exist")
    for node in range(len(tree)):
        first = tree.first_slot[node]
        if first != NONE and not 0 <= first <= first + tree.num_actions[node] <= len(tree.slots):
            raise SearchError(f"the slots of node {node} of a tree do not exist")
    if any(following >= row for row, following in enumerate(tree.outcome_next)):
        raise SearchError("column 'outcome_next' of a tree runs in a circle")
