"""Descend: one simulation's way from the root to the place where it needs something new.

A simulation walks through stored outcomes and ends in one of two places: at an action that needs a fresh
branch (a new machine), or at a node that needs none, because it is terminal, truncated, proven or dead.
So every simulation asks for at most one branch.
"""

from __future__ import annotations

from dataclasses import dataclass

from rollout.search.select import BLOCKED, Selector
from rollout.search.tree import NONE, UNTRIED, Tree
from rollout.search.widening import Drawing

__all__ = ["Path", "descend", "path_to", "taken"]


@dataclass(slots=True)
class Path:
    """The way of one simulation.

    Attributes:
        edges: Its actions, from the root.
        outcomes: The outcome of each edge; without the last one's while that is to be drawn.
        leaf: The node where it ends; NONE while the last edge's outcome is to be drawn.
    """

    edges: list[int]
    outcomes: list[int]
    leaf: int


def descend(tree: Tree, select: Selector, drawing: Drawing) -> Path | None:
    """Walks down from the root by the tree policy; None when every way is blocked or the root is a leaf."""
    edges: list[int] = []
    outcomes: list[int] = []
    node, flags, outcome_node = 0, tree.flags, tree.outcome_node
    slots, first_slot, num_actions = tree.slots, tree.first_slot, tree.num_actions
    while not flags[node]:
        action = select(node)
        if action < 0:
            if action == BLOCKED:
                return None
            break
        first = first_slot[node]
        edge = slots[first + action] if first != NONE and action < num_actions[node] else UNTRIED
        if edge == UNTRIED:
            edge = taken(tree, node, action)
        edges.append(edge)
        outcome = drawing.choose(tree, edge)
        if outcome == NONE:
            return Path(edges, outcomes, NONE)
        outcomes.append(outcome)
        node = outcome_node[outcome]
    return Path(edges, outcomes, node) if edges else None


def taken(tree: Tree, node: int, action: int) -> int:
    """The edge of an action, made when there is none yet; so is the action where one more is proposed."""
    if action == tree.num_actions[node]:
        tree.add_action(node)
    edge = tree.edge(node, action)
    return tree.add_edge(node, action) if edge == UNTRIED else edge


def path_to(tree: Tree, node: int) -> Path:
    """The way by which a node was first reached."""
    edges: list[int] = []
    outcomes: list[int] = []
    leaf = node
    while node:
        outcome = tree.entry[node]
        outcomes.append(outcome)
        edges.append(tree.outcome_edge[outcome])
        node = tree.edge_node[edges[-1]]
    return Path(edges[::-1], outcomes[::-1], leaf)
