"""What a search tree teaches: sibling candidates, preferences, advantages and step labels. Pure.

The candidates of a move are the children of its root: the actions that were tried in the same state. Their
action value is Q = reward + discount · V(child), with V = 0 behind a terminal child as the search has it;
an ungraded reward counts for nothing. Nodes without a value (a failed branch) are no candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "Advantages",
    "Candidate",
    "Node",
    "Tree",
    "advantages",
    "candidates",
    "leaf_paths",
    "preference_pairs",
]


@dataclass(frozen=True, slots=True)
class Node:
    """A node as exports need it; see `rollout.trajectory.rows.NodeRow`."""

    node_id: int
    parent_id: int | None
    action: str | None
    visits: int
    value: float | None
    reward: float | None


Tree = Mapping[int, Node]
"""The nodes of one move by id; 0 is the root."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An action that was tried at the root of a tree."""

    action: str
    visits: int
    q: float


@dataclass(frozen=True, slots=True)
class Advantages:
    """How much better a candidate is than what else was tried.

    Attributes:
        group: (Q - mean) / standard deviation over the group (0 where all are equal), as in GRPO.
        leave_one_out: Q - mean of the others, as in RLOO.
        tree: Q - V(root); None where the root has no value.
    """

    group: float
    leave_one_out: float
    tree: float | None


def candidates(tree: Tree, discount: float, min_visits: int) -> list[Candidate]:
    """The children of the root that have a value and enough visits, by node id."""
    found: list[Candidate] = []
    for node in sorted(tree.values(), key=lambda node: node.node_id):
        if node.parent_id != 0 or node.value is None or node.action is None or node.visits < min_visits:
            continue
        found.append(Candidate(node.action, node.visits, (node.reward or 0.0) + discount * node.value))
    return found


def preference_pairs(group: Sequence[Candidate], margin: float) -> Iterator[tuple[Candidate, Candidate]]:
    """(chosen, rejected): the best candidate against each that is worse by more than 0 and at least `margin`.

    Among equals the most visited is the best, and of these the first.
    """
    if not group:
        return
    best = max(group, key=lambda candidate: (candidate.q, candidate.visits))
    for other in group:
        if other.action != best.action and best.q - other.q >= max(margin, math.ulp(abs(best.q))):
            yield best, other


def advantages(group: Sequence[Candidate], root_value: float | None) -> list[Advantages]:
    """One for each candidate; the group has at least two."""
    count = len(group)
    mean = math.fsum(candidate.q for candidate in group) / count
    deviation = math.sqrt(math.fsum((candidate.q - mean) ** 2 for candidate in group) / count)
    found: list[Advantages] = []
    for candidate in group:
        gap = candidate.q - mean
        found.append(
            Advantages(
                group=gap / deviation if deviation > 1e-12 else 0.0,
                leave_one_out=gap * count / (count - 1),
                tree=None if root_value is None else candidate.q - root_value,
            )
        )
    return found


def leaf_paths(tree: Tree, min_visits: int) -> Iterator[list[Node]]:
    """The tree flattened: for each leaf the nodes from below the root down to it, by id of the leaf.

    Nodes with fewer visits, or without a value, are cut off, and with them what is below; so is what hangs on
    a node that is not there.
    """
    kept: dict[int, list[Node]] = {}
    inner: set[int] = set()
    for node in sorted(tree.values(), key=lambda node: node.node_id):
        if node.parent_id is None or node.value is None or node.action is None or node.visits < min_visits:
            continue
        above = kept.get(node.parent_id)
        if above is None and node.parent_id != 0:
            continue
        kept[node.node_id] = [*(above or []), node]
        inner.add(node.parent_id)
    for node_id, path in kept.items():
        if node_id not in inner:
            yield path
