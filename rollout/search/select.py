"""Select: which action a simulation takes in a node.

In flight, O(s,a) simulations through an action wait for their outcome. In WU-UCT (Liu et al., ICLR 2020) they
count as visits in every exploration term, N + O in place of N, and leave values alone. With a virtual loss
(as in KataGo) they moreover pull the value towards a loss.

Invariants: an action whose only branch is in flight, that was given up or that is proven lost is never
selected; a choice depends on the tree alone (with tie noise on the seed, too), so equal trees give equal
choices. Of equals the first is taken; untried actions of equal prior in an order that is rotated from node to
node, so that no action comes first everywhere.

Work per call: O(actions). Where every action has an outcome and none is barred, as nearly everywhere in a
large tree, a selector reads no more of an action than its formula names.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log, sqrt
from typing import Protocol

from rollout.search.normalise import Normaliser, no_normalisation
from rollout.search.seeds import branch_seed
from rollout.search.tree import NONE, PENDING, SETTLED, UNTRIED, Tree
from rollout.search.widening import ActionWidening

__all__ = [
    "BLOCKED",
    "DEAD",
    "PuctSelector",
    "Selector",
    "TieNoise",
    "UctSelector",
    "VirtualLoss",
    "next_untried",
]

BLOCKED = -1
"""Every action that is left waits for a branch in flight."""
DEAD = -2
"""No action is left: the node stays a leaf."""


class Selector(Protocol):
    """The tree policy."""

    def __call__(self, node: int) -> int:
        """The action to take, or BLOCKED, or DEAD; `num_actions` stands for one more proposal."""
        ...


@dataclass(frozen=True, slots=True)
class VirtualLoss:
    """U ← U + (loss − U)·w/(w + max(0.25, W)) with w = 3·O, W = N, as in KataGo.

    Attributes:
        loss: The lowest Q possible; None: the low end of the normalised range.
    """

    loss: float | None

    def apply(self, q_hat: float, low: float, scale: float, visits: int, in_flight: int) -> float:
        """q̂ with the trials in flight counted as losses."""
        lost = 0.0 if self.loss is None else (self.loss - low) * scale
        weight = 3.0 * in_flight
        return q_hat + (lost - q_hat) * weight / (weight + max(0.25, visits))


@dataclass(frozen=True, slots=True)
class TieNoise:
    """Noise that breaks ties, scale·U(0,1) per action; mctx has 1e-7.

    A function of the seed, the node, its visits and the action: equal trees still give equal choices.

    Attributes:
        scale: Its largest value, in units of the score.
        seed: Of the search.
    """

    scale: float
    seed: int

    def of(self, tree: Tree, node: int, action: int) -> float:
        """The noise of an action."""
        return self.scale * branch_seed(self.seed, node, action, tree.begun[node]) / 2**63


class UctSelector:
    """UCT (Kocsis and Szepesvári, 2006): argmax of q̂(a) + c·√(ln N(s) / N(a)); untried actions come first.

    Args:
        tree: The tree.
        exploration: c.
        normaliser: q̂ from Q.
        widening: When another action may be tried.
        virtual_loss: What trials in flight cost beside counting as visits; None is nothing (WU-UCT).
        tie_noise: Breaks ties; None: the order of actions does.
    """

    def __init__(
        self,
        tree: Tree,
        exploration: float,
        normaliser: Normaliser,
        widening: ActionWidening,
        virtual_loss: VirtualLoss | None = None,
        tie_noise: TieNoise | None = None,
    ) -> None:
        self._tree = tree
        self._c = exploration
        self._normaliser = normaliser
        self._widening = widening
        self._virtual_loss = virtual_loss
        self._tie_noise = tie_noise
        self._is_plain = normaliser is no_normalisation and virtual_loss is None and tie_noise is None

    def __call__(self, node: int) -> int:
        """The UCT action."""
        tree = self._tree
        first = tree.first_slot[node]
        if first == NONE:
            return next_untried(tree, node, self._tie_noise)
        if not self._is_plain or tree.num_unready[node]:
            return self._of_some(node, first)
        values, counts = tree.slot_value, tree.slot_begun
        spread = self._c * sqrt(log(tree.begun[node]))
        best, best_score = -1, -inf
        for slot in range(first, first + tree.num_actions[node]):
            score = values[slot] + spread / sqrt(counts[slot])
            if score > best_score:
                best, best_score = slot, score
        return best - first

    def _of_some(self, node: int, first: int) -> int:
        """The action where some may be untried or barred, with normalisation, virtual loss and noise."""
        tree, virtual_loss, noise = self._tree, self._virtual_loss, self._tie_noise
        states, visits = tree.edge_state, tree.edge_visits
        values, counts, edges = tree.slot_value, tree.slot_begun, tree.edges(node)
        if (UNTRIED in edges or tree.open_ended[node]) and self._widening.has_room(tree, node):
            return next_untried(tree, node, noise)
        low, scale = self._normaliser(node)
        spread = self._c * sqrt(log(tree.begun[node]))
        best, best_score, none_left = -1, -inf, DEAD
        for slot, edge in enumerate(edges, first):
            if edge < 0 or states[edge] > SETTLED:
                if edge >= 0 and states[edge] == PENDING:
                    none_left = BLOCKED
                continue
            n, begun = visits[edge], counts[slot]
            q_hat = ((values[slot] if n else tree.value[node]) - low) * scale
            if virtual_loss is not None and begun > n:
                q_hat = virtual_loss.apply(q_hat, low, scale, n, begun - n)
            score = q_hat + spread / sqrt(begun)
            if noise is not None:
                score += noise.of(tree, node, slot - first)
            if score > best_score:
                best, best_score = slot, score
        return best - first if best >= 0 else none_left


class PuctSelector:
    """PUCT, as in mctx: argmax of q̂(a) + √N(s)·P(a)/(1+N(a))·[c1 + ln((N(s)+c2+1)/c2)].

    N(s) counts the node's own evaluation, so a new node has N = 1.

    Args:
        tree: The tree.
        c1: pb_c_init.
        c2: pb_c_base.
        normaliser: q̂ from Q.
        widening: When another action may be tried.
        fpu_reduction: First-play urgency: an unvisited action is worth V(s) − r·√(Σ P of visited), then
            normalised. None: q̂ = 0, as in mctx.
        virtual_loss: As for UCT.
        tie_noise: As for UCT.
    """

    def __init__(
        self,
        tree: Tree,
        c1: float,
        c2: float,
        normaliser: Normaliser,
        widening: ActionWidening,
        fpu_reduction: float | None = None,
        virtual_loss: VirtualLoss | None = None,
        tie_noise: TieNoise | None = None,
    ) -> None:
        self._tree = tree
        self._c1 = c1
        self._c2 = c2
        self._normaliser = normaliser
        self._widening = widening
        self._fpu_reduction = fpu_reduction
        self._virtual_loss = virtual_loss
        self._tie_noise = tie_noise
        self._is_plain = virtual_loss is None and tie_noise is None

    def __call__(self, node: int) -> int:
        """The PUCT action."""
        tree = self._tree
        first = tree.first_slot[node]
        if first == NONE:
            return next_untried(tree, node, self._tie_noise)
        begun = tree.begun[node]
        factor = sqrt(begun) * (self._c1 + log((begun + self._c2 + 1.0) / self._c2))
        low, scale = self._normaliser(node)
        if not self._is_plain or tree.num_unready[node]:
            return self._of_some(node, first, factor, low, scale)
        values, counts, priors = tree.slot_value, tree.slot_begun, tree.priors
        best, best_score = -1, -inf
        for slot in range(first, first + tree.num_actions[node]):
            score = (values[slot] - low) * scale + factor * priors[slot] / (1 + counts[slot])
            if score > best_score:
                best, best_score = slot, score
        return best - first

    def _of_some(self, node: int, first: int, factor: float, low: float, scale: float) -> int:
        """The action where some may be untried or barred, with first-play urgency, virtual loss and noise."""
        tree, virtual_loss, noise = self._tree, self._virtual_loss, self._tie_noise
        states, visits = tree.edge_state, tree.edge_visits
        values, counts, priors = tree.slot_value, tree.slot_begun, tree.priors
        edges = tree.edges(node)
        unvisited = self._first_play(node, low, scale)
        best, best_score, none_left = -1, -inf, DEAD
        if (UNTRIED in edges or tree.open_ended[node]) and self._widening.has_room(tree, node):
            # Untried actions differ in their prior alone, so one of the largest is the best of them.
            untried = next_untried(tree, node, noise)
            best = first + untried
            prior = priors[best] if untried < len(edges) else 1.0 / (len(edges) + 1)
            best_score = unvisited + factor * prior
            if noise is not None:
                best_score += noise.of(tree, node, untried)
        for slot, edge in enumerate(edges, first):
            if edge < 0 or states[edge] > SETTLED:
                if edge >= 0 and states[edge] == PENDING:
                    none_left = BLOCKED
                continue
            n, begun = visits[edge], counts[slot]
            q_hat = (values[slot] - low) * scale if n else unvisited
            if virtual_loss is not None and begun > n:
                q_hat = virtual_loss.apply(q_hat, low, scale, n, begun - n)
            score = q_hat + factor * priors[slot] / (1 + begun)
            if noise is not None:
                score += noise.of(tree, node, slot - first)
            if score > best_score:
                best, best_score = slot, score
        return best - first if best >= 0 else none_left

    def _first_play(self, node: int, low: float, scale: float) -> float:
        """q̂ of an unvisited action."""
        if self._fpu_reduction is None:
            return 0.0
        tree = self._tree
        visited = sum(
            prior
            for edge, prior in zip(tree.edges(node), tree.node_priors(node), strict=True)
            if edge >= 0 and tree.edge_visits[edge]
        )
        return (tree.value[node] - self._fpu_reduction * sqrt(visited) - low) * scale


def next_untried(tree: Tree, node: int, noise: TieNoise | None = None) -> int:
    """The untried action of the largest prior; `num_actions`, one more proposal, where none is listed."""
    first, count = tree.first_slot[node], tree.num_actions[node]
    if noise is not None:
        noisy_priors = [prior + noise.of(tree, node, a) for a, prior in enumerate(tree.node_priors(node))]
        untried = [action for action, edge in enumerate(tree.edges(node)) if edge == UNTRIED]
        return max(untried, key=noisy_priors.__getitem__, default=count)
    if first == NONE:
        return node % count if count else 0
    slots, priors = tree.slots, tree.priors
    best, best_prior = count, -1.0
    for k in range(count):
        action = (node + k) % count
        if slots[first + action] == UNTRIED and priors[first + action] > best_prior:
            best, best_prior = action, priors[first + action]
    return best
