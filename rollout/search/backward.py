"""Backward: carries the value of a leaf up the path of one simulation.

Along the path, from the leaf to the root, with G the value of the leaf at first:

    G ← R + γ·G      N ← N + 1      and then, by the backup that was chosen:

- mean: V ← V + (G − V)/N, Q likewise: the running average of returns. Only for trees, because where paths
  join a return that came in through one parent never reaches the other.
- recomputed: Q(s,a) = Σ_s' w(s')·(R + γ·V(s')) / Σ w and V(s) from its Q by a rule; no running sum, so it is
  exact wherever paths join. Rules: mean (weighted by visits, evaluations of s included), max, mixed =
  (1−w)·mean + w·max, and the best found, where a state's own evaluation is one more choice. The weights w(s')
  are visits; in the expectation backup (DP-UCT, Keller and Helmert, ICAPS 2013) they are the numbers of fresh
  draws, which alone are an unbiased sample of the environment (how often a stored outcome is walked through
  is the search's own choice), under the max rule.

Work per simulation: O(path) for mean, O(path · actions) when recomputed.

Not guaranteed: that a parent which is not on the path has the newest value of a shared child. It gets it with
the next simulation that passes through that parent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from rollout.search.normalise import TreeNormaliser
from rollout.search.tree import NONE, PROVEN, UNTRIED, Tree

__all__ = [
    "Backward",
    "MeanBackward",
    "ObservedBackward",
    "RecomputedBackward",
    "best_found",
    "max_value",
    "mean_value",
    "mixed_value",
]

ValueRule: TypeAlias = Callable[[Tree, int], float]
"""V(s) from the Q(s,a) and visits of its edges and its own evaluations."""


class Backward(Protocol):
    """How the value of a leaf changes the path that led to it."""

    def __call__(
        self, tree: Tree, edges: Sequence[int], outcomes: Sequence[int], leaf: int, value: float
    ) -> None:
        """Backs up one simulation.

        Args:
            tree: Changed in place.
            edges: Edges of the path, from the root.
            outcomes: The outcome of each edge.
            leaf: The node where the simulation ended.
            value: Its evaluation; 0 where it is terminal.
        """
        ...


class MeanBackward:
    """Running averages of the returns; for trees without transpositions."""

    def __call__(
        self, tree: Tree, edges: Sequence[int], outcomes: Sequence[int], leaf: int, value: float
    ) -> None:
        """G ← R + γ·G; V ← V + (G − V)/N."""
        visits, values = tree.visits, tree.value
        edge_visits, edge_node = tree.edge_visits, tree.edge_node
        slot_values, edge_slot = tree.slot_value, tree.edge_slot
        rewards, discounts, outcome_visits = tree.outcome_reward, tree.outcome_discount, tree.outcome_visits
        _evaluate(tree, leaf, value)
        values[leaf] += (value - values[leaf]) / visits[leaf]
        for edge, outcome in zip(reversed(edges), reversed(outcomes), strict=True):
            value = rewards[outcome] + discounts[outcome] * value
            outcome_visits[outcome] += 1
            n = edge_visits[edge] = edge_visits[edge] + 1
            slot = edge_slot[edge]
            mean = slot_values[slot]
            slot_values[slot] = mean + (value - mean) / n
            node = edge_node[edge]
            n = visits[node] = visits[node] + 1
            mean = values[node]
            values[node] = mean + (value - mean) / n


class RecomputedBackward:
    """Values from the values below, with no running sum: safe where paths join.

    Args:
        rule: V(s) from its edges.
        by_draws: Weigh an edge's outcomes by fresh draws (the expectation), not by visits.
    """

    def __init__(self, rule: ValueRule, *, by_draws: bool) -> None:
        self._rule = rule
        self._by_draws = by_draws

    def __call__(
        self, tree: Tree, edges: Sequence[int], outcomes: Sequence[int], leaf: int, value: float
    ) -> None:
        """Recomputes Q and V of every edge and node on the path, from the leaf up."""
        _evaluate(tree, leaf, value)
        self._update(tree, leaf)
        weights = tree.outcome_draws if self._by_draws else tree.outcome_visits
        for depth in range(len(edges) - 1, -1, -1):
            edge = edges[depth]
            tree.outcome_visits[outcomes[depth]] += 1
            tree.edge_visits[edge] += 1
            tree.slot_value[tree.edge_slot[edge]] = _edge_value(tree, edge, weights)
            node = tree.edge_node[edge]
            tree.visits[node] += 1
            self._update(tree, node)

    def _update(self, tree: Tree, node: int) -> None:
        if not tree.flags[node] & PROVEN:
            tree.value[node] = self._rule(tree, node)


def mean_value(tree: Tree, node: int) -> float:
    """(E·v̂ + Σ N(s,a)·Q(s,a)) / (E + Σ N(s,a)), with E evaluations of mean v̂."""
    total = evaluations = tree.evaluations[node]
    weighted = evaluations * tree.raw_value[node]
    visits = tree.edge_visits
    for edge, q in zip(tree.edges(node), tree.action_values(node), strict=True):
        if edge >= 0:
            n = visits[edge]
            total += n
            weighted += n * q
    return weighted / total


def max_value(evaluation_weight: float = 0.0) -> ValueRule:
    """Max of Q(s,a) over visited actions; the evaluation v̂ where there is none.

    The max of noisy values is too high, most of all in young states, whose Q are single samples; and it is
    too low where the best action is still untried. A weight κ counts v̂ as κ visits of every action, untried
    ones too: Q̃ = (N·Q + κ·v̂)/(N + κ), which fades as visits come in.
    """

    def rule(tree: Tree, node: int) -> float:
        raw = tree.raw_value[node]
        weighted = evaluation_weight * raw
        edges, visits = tree.edges(node), tree.edge_visits
        best = raw if evaluation_weight and UNTRIED in edges else float("-inf")
        for edge, value in zip(edges, tree.action_values(node), strict=True):
            if edge >= 0 and (n := visits[edge]):
                q = (n * value + weighted) / (n + evaluation_weight)
                if q > best:
                    best = q
        return best if best > float("-inf") else raw

    return rule


def best_found(tree: Tree, node: int) -> float:
    """The larger of the state's own evaluation and its best action: any state may be the last."""
    return max(tree.raw_value[node], max_value()(tree, node))


def mixed_value(weight: float, highest: ValueRule) -> ValueRule:
    """(1−w)·mean + w·max."""

    def rule(tree: Tree, node: int) -> float:
        return (1.0 - weight) * mean_value(tree, node) + weight * highest(tree, node)

    return rule


def _evaluate(tree: Tree, leaf: int, value: float) -> None:
    """Counts one more simulation that ended in `leaf`, and its evaluation."""
    tree.visits[leaf] += 1
    tree.begun[leaf] += 1
    n = tree.evaluations[leaf] + 1
    tree.evaluations[leaf] = n
    tree.raw_value[leaf] += (value - tree.raw_value[leaf]) / n


def _edge_value(tree: Tree, edge: int, weights: Sequence[int]) -> float:
    total, weighted, outcome = 0, 0.0, tree.edge_outcome[edge]
    while outcome != NONE:
        weight = weights[outcome]
        below = tree.value[tree.outcome_node[outcome]]
        weighted += weight * (tree.outcome_reward[outcome] + tree.outcome_discount[outcome] * below)
        total += weight
        outcome = tree.outcome_next[outcome]
    return weighted / total


class ObservedBackward:
    """Shows every Q that a backup changed to the tree-wide normaliser.

    Args:
        inner: The backup.
        normaliser: Keeps the range.
    """

    def __init__(self, inner: Backward, normaliser: TreeNormaliser) -> None:
        self._inner = inner
        self._normaliser = normaliser

    def __call__(
        self, tree: Tree, edges: Sequence[int], outcomes: Sequence[int], leaf: int, value: float
    ) -> None:
        """Backs up, then widens the range."""
        self._inner(tree, edges, outcomes, leaf, value)
        for edge in edges:
            self._normaliser.observe(tree.edge_value[edge])
