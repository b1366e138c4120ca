"""Baselines without a tree policy: best-of-n, sequential revision, breadth-first and beam search.

Each decides which node to try an action in; the path to it is the one by which it was first reached. Listed
actions are tried in the order of their priors; in an open-ended state every further trial is one more
proposal. All play the action that leads to the best return found, so their backup is `best_found`.

Not guaranteed: that parallel trials help. Revision goes on from the newest result, and so has one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from rollout.search.base import Outcome
from rollout.search.decide import MoveRule, visit_target
from rollout.search.descend import Path, path_to, taken
from rollout.search.select import next_untried
from rollout.search.tree import NONE, SETTLED, UNTRIED, Tree
from rollout.search.widening import SingleOutcome, WideningDraws

__all__ = ["Baseline", "Beam", "BestOfN", "BreadthFirst", "Revision"]

Expansion: TypeAlias = "tuple[int, int] | None"
"""(node, action) to branch next; None while all waits for branches in flight, or nothing is left."""


class Baseline:
    """An algorithm that names the node and the action of each branch.

    Args:
        tree: The tree.
        move: How the move is read off the root.
        expand: The next branch.
    """

    can_advance = False

    def __init__(self, tree: Tree, move: MoveRule, expand: Callable[[], Expansion]) -> None:
        self._tree = tree
        self._move = move
        self._expand = expand
        self._seed = 0

    def begin(self, seed: int, simulations: int) -> None:
        """Nothing but the seed, for ties."""
        self._seed = seed

    def plan(self) -> Path | None:
        """The way to the node, and the branch."""
        expansion = self._expand()
        if expansion is None:
            return None
        node, action = expansion
        path = path_to(self._tree, node)
        path.edges.append(taken(self._tree, node, action))
        path.leaf = NONE
        return path

    def check(self, path: Path, told: Outcome) -> None:
        """Anything goes."""

    def best(self) -> int:
        """By the move rule."""
        return self._move.choose(self._tree, self._seed)

    def policy_target(self, node: int = 0) -> Sequence[float]:
        """The visit distribution."""
        return visit_target(self._tree, node)


class BestOfN:
    """Best-of-n: n branches from the root, never below it.

    Once all actions are tried, chance outcomes are drawn again in turn; single ones leave nothing to do.

    Args:
        tree: The tree.
        drawing: Single outcomes or chance nodes.
    """

    def __init__(self, tree: Tree, drawing: SingleOutcome | WideningDraws) -> None:
        self._tree = tree
        self._redraws = isinstance(drawing, WideningDraws)

    def __call__(self) -> Expansion:
        """The next untried action, or the one with the fewest draws."""
        tree = self._tree
        edges = tree.edges(0)
        if tree.open_ended[0] or UNTRIED in edges:
            return 0, next_untried(tree, 0)
        drawn = [(tree.edge_draws[e], a) for a, e in enumerate(edges) if e >= 0 and _can_draw(tree, e)]
        return (0, min(drawn)[1]) if self._redraws and drawn else None


class Revision:
    """Sequential revision: each branch goes on from what the one before it came to.

    Where the newest state cannot be gone on with, the search goes back to the nearest one above that can.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def __call__(self) -> Expansion:
        """An action in the newest state."""
        tree = self._tree
        if tree.begun[0] > tree.visits[0]:
            return None
        node = len(tree) - 1
        while node != NONE:
            if not tree.flags[node] and (tree.open_ended[node] or UNTRIED in tree.edges(node)):
                return node, next_untried(tree, node)
            node = tree.parent[node]
        return None


class BreadthFirst:
    """Breadth-first: every action of every state, in the order in which states were reached.

    Args:
        tree: The tree.
        branching: Proposals in each open-ended state.
    """

    def __init__(self, tree: Tree, branching: int) -> None:
        self._tree = tree
        self._branching = branching
        self._next = 0

    def __call__(self) -> Expansion:
        """The first untried action in the oldest state that has one."""
        tree = self._tree
        while self._next < len(tree):
            if _is_expandable(tree, self._next, self._branching):
                return self._next, next_untried(tree, self._next)
            self._next += 1
        return None


class Beam:
    """Beam search: all actions of `width` states at a depth, then on from the best of what they led to.

    A state's score is the return on the way to it plus its own value.

    Args:
        tree: The tree.
        width: States that are kept at each depth.
        branching: Proposals in each open-ended state.
    """

    def __init__(self, tree: Tree, width: int, branching: int) -> None:
        self._tree = tree
        self._width = width
        self._branching = branching
        self._beam = [0]

    def __call__(self) -> Expansion:
        """The next action of the beam's states; once they are all back, of the next depth's."""
        tree = self._tree
        while self._beam:
            for node in self._beam:
                if _is_expandable(tree, node, self._branching):
                    return node, next_untried(tree, node)
            if tree.begun[0] > tree.visits[0]:
                return None
            reached = [
                tree.outcome_node[outcome]
                for node in self._beam
                for edge in tree.edges(node)
                if edge >= 0
                for outcome in tree.outcomes(edge)
            ]
            going_on = [node for node in reached if not tree.flags[node]]
            going_on.sort(key=self._score, reverse=True)
            self._beam = going_on[: self._width]
        return None

    def _score(self, node: int) -> float:
        """Discounted return from the root to `node`, and its value after it."""
        score = self._tree.raw_value[node]
        for outcome in reversed(path_to(self._tree, node).outcomes):
            score = self._tree.outcome_reward[outcome] + self._tree.outcome_discount[outcome] * score
        return score


def _is_expandable(tree: Tree, node: int, branching: int) -> bool:
    if tree.flags[node]:
        return False
    if tree.open_ended[node]:
        return tree.num_actions[node] < branching
    return UNTRIED in tree.edges(node)


def _can_draw(tree: Tree, edge: int) -> bool:
    return tree.edge_state[edge] < SETTLED
