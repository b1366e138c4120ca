"""Attach: makes a node of what a branch led to, or finds the node that it already is.

- Chance: an outcome whose state hash is one of the edge's own merges with it, and counts as a further draw.
- Transpositions: one whose hash is known at the same depth from the root, whatever the path, joins that node.
  Keyed by depth too, joined paths have equal lengths: the graph has no cycle, and a state with less time
  left is another state.

A state hash is not taken at its word: states that differ in their actions, or in whether they are final, stay
apart whatever their hashes say.
"""

from __future__ import annotations

from rollout.search.base import OPEN_ENDED, NodeInfo, Outcome
from rollout.search.checks import check_node, checked_prior
from rollout.search.tree import NONE, PROVEN, TERMINATED, TRUNCATED, Tree

__all__ = ["Attacher", "make_root"]


class Attacher:
    """Adds outcomes to a tree.

    Args:
        tree: Changed in place.
        discount: Discount of a transition that names none.
        transpositions: Join paths that lead to equal states.
    """

    def __init__(self, tree: Tree, discount: float, *, transpositions: bool = False) -> None:
        self._tree = tree
        self._discount = discount
        self._known: dict[tuple[int, str], int] | None = {} if transpositions else None
        self.index()

    def index(self) -> None:
        """Learns anew where each state is, after the tree was made or re-rooted."""
        if self._known is None:
            return
        self._known.clear()
        for node, digest in enumerate(self._tree.state_hash):
            if digest is not None:
                self._known[self._tree.depth[node], digest] = node

    def attach(self, edge: int, told: Outcome, trial_id: int) -> int:
        """The outcome row of what a draw of `edge` led to, with the draw counted.

        The row's node is new if and only if it names `trial_id` as its trial.
        """
        tree = self._tree
        outcome = self._stored(edge, told)
        if outcome == NONE:
            discount = self._discount if told.discount is None else told.discount
            node = self._node(tree.depth[tree.edge_node[edge]] + 1, told, trial_id)
            outcome = tree.add_outcome(edge, node, float(told.reward), float(discount))
        draws = tree.outcome_draws[outcome] + 1
        tree.outcome_draws[outcome] = draws
        tree.outcome_reward[outcome] += (told.reward - tree.outcome_reward[outcome]) / draws
        return outcome

    def _stored(self, edge: int, told: Outcome) -> int:
        """The outcome of this edge that led to the same state."""
        if told.node.state_hash is not None:
            for outcome in self._tree.outcomes(edge):
                if _is_same(self._tree, self._tree.outcome_node[outcome], told):
                    return outcome
        return NONE

    def _node(self, depth: int, told: Outcome, trial_id: int) -> int:
        digest = told.node.state_hash
        if self._known is None or digest is None:
            return _add_node(self._tree, told, depth, trial_id)
        known = self._known.get((depth, digest))
        if known is not None and _is_same(self._tree, known, told):
            return known
        node = _add_node(self._tree, told, depth, trial_id)
        self._known.setdefault((depth, digest), node)
        return node


def _is_same(tree: Tree, node: int, told: Outcome) -> bool:
    """Whether a node is the state that was told of: by its hash, its actions and its end."""
    info = told.node
    flags = TERMINATED * told.terminated | TRUNCATED * told.truncated
    return (
        tree.state_hash[node] == info.state_hash
        and tree.flags[node] & (TERMINATED | TRUNCATED) == flags
        and (bool(flags) or told.proven or _num_actions(tree, node) == info.num_actions)
    )


def _num_actions(tree: Tree, node: int) -> int:
    return OPEN_ENDED if tree.open_ended[node] else tree.num_actions[node]


def make_root(tree: Tree, info: NodeInfo) -> None:
    """Adds the root, evaluated once: N = 1, V its value.

    Raises:
        SearchError: The state has no action, or its value or prior cannot be accepted.
    """
    check_node(info, is_final=False)
    _add_node(tree, Outcome(0.0, info), 0, 0)
    tree.visits[0] = tree.begun[0] = tree.evaluations[0] = 1
    tree.value[0] = tree.raw_value[0] = float(info.value)


def _add_node(tree: Tree, told: Outcome, depth: int, trial_id: int) -> int:
    info = told.node
    flags = TERMINATED * told.terminated | TRUNCATED * told.truncated | PROVEN * told.proven
    if flags:
        node = tree.add_node(0, depth=depth, flags=flags, state_hash=info.state_hash, trial=trial_id)
        if told.proven and not told.terminated:
            tree.value[node] = float(info.value)
        return node
    is_open = info.num_actions == OPEN_ENDED
    return tree.add_node(
        0 if is_open else info.num_actions,
        prior=checked_prior(info),
        mask=info.mask,
        open_ended=is_open,
        depth=depth,
        state_hash=info.state_hash,
        trial=trial_id,
    )
