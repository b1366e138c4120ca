"""Gumbel search: planning with policy improvement (Danihelka et al., ICLR 2022), by the formulas of mctx.

- Root: sequential halving over the m actions of the largest g + logit, with g ~ Gumbel(0): the argmax of
  g + logit + σ(q̂) over the actions whose visits equal the count that the schedule has reached.
- Interior, without any noise: argmax of π'(a) − N(a)/(1+ΣN).
- The improved policy π' = softmax(logit + σ(q̂)), which is also what to train towards.

σ(q) = (c_visit + max N)·c_scale·q, after completion (an unvisited action has v_mix) and rescaling to [0, 1].

Trials in flight count as visits in the schedule and in the interior rule. Illegal actions take no part; mctx,
where they get a low logit instead, lets their completed value into the rescaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp, inf, log, log2

import numpy as np

from rollout.errors import SearchError
from rollout.search.algorithm import add_root_noise
from rollout.search.base import OPEN_ENDED, Outcome
from rollout.search.descend import Path, descend
from rollout.search.select import BLOCKED, DEAD
from rollout.search.tree import ILLEGAL, PENDING, PROVEN, SETTLED, UNTRIED, Tree
from rollout.search.widening import Drawing
from rollout.types import derive_seed

__all__ = ["Gumbel", "GumbelConstants", "considered_visits", "improved_policy", "sigma"]

TINY = 1e-38
"""Stands for a prior of 0, whose logit would be infinite."""
EPSILON = 1e-8
"""The smallest range of completed values that is stretched to 1."""


@dataclass(frozen=True, slots=True)
class GumbelConstants:
    """Constants of the algorithm.

    Attributes:
        considered_actions: m: actions that sequential halving begins with.
        scale: Scale of the root's Gumbel noise.
        c_visit: As in σ.
        c_scale: As in σ.
    """

    considered_actions: int = 16
    scale: float = 1.0
    c_visit: float = 50.0
    c_scale: float = 0.1


class Gumbel:
    """Gumbel search.

    Args:
        tree: The tree.
        drawing: Single outcomes or chance nodes.
        constants: m, scale, c_visit and c_scale.
        noise: (alpha, fraction) of Dirichlet noise on the root's prior; a fraction of 0 is none.
    """

    can_advance = True

    def __init__(
        self, tree: Tree, drawing: Drawing, constants: GumbelConstants, noise: tuple[float, float]
    ) -> None:
        self._tree = tree
        self._drawing = drawing
        self._constants = constants
        self._noise = noise
        self._noisy_logits: list[float] = []
        self._carried: list[int] = []
        self._schedule: Sequence[int] = ()

    def begin(self, seed: int, simulations: int) -> None:
        """Draws the root's noise and lays out the schedule.

        Visits that were carried over from an earlier move take no part in the schedule.

        Raises:
            SearchError: The root is open-ended.
        """
        tree, rng = self._tree, np.random.default_rng(derive_seed(seed, "gumbel"))
        if tree.open_ended[0]:
            raise SearchError("gumbel needs listed actions, and the root is open-ended")
        alpha, fraction = self._noise
        if fraction:
            add_root_noise(tree, alpha, fraction, rng)
        gumbel: list[float] = (self._constants.scale * rng.gumbel(size=tree.num_actions[0])).tolist()
        self._noisy_logits = [
            g + log(max(prior, TINY)) for g, prior in zip(gumbel, tree.node_priors(0), strict=True)
        ]
        self._carried = tree.action_visits(0)
        num_legal = sum(edge != ILLEGAL for edge in tree.edges(0))
        self._schedule = considered_visits(min(self._constants.considered_actions, num_legal), simulations)

    def plan(self) -> Path | None:
        """Sequential halving at the root, the deterministic rule below."""
        return descend(self._tree, self._select, self._drawing)

    def check(self, path: Path, told: Outcome) -> None:
        """Checks that actions are listed.

        Raises:
            SearchError: The state is open-ended.
        """
        if told.node.num_actions == OPEN_ENDED:
            raise SearchError("gumbel needs listed actions, and a state is open-ended")

    def best(self) -> int:
        """The argmax of g + logit + σ(q̂) over the most visited actions; a proof goes first.

        Raises:
            SearchError: No action at the root has an outcome.
        """
        tree = self._tree
        edges, visits = tree.edges(0), tree.action_visits(0)
        done = [a for a, edge in enumerate(edges) if visits[a] and tree.edge_state[edge] <= SETTLED]
        done = done or [a for a, n in enumerate(visits) if n]
        if not done:
            raise SearchError("no branch at the root has an outcome: all failed, or none was told yet")
        if tree.flags[0] & PROVEN:
            return max(done, key=lambda a: (tree.is_proven(edges[a]), tree.edge_value[edges[a]]))
        spent = [n - carried for n, carried in zip(visits, self._carried, strict=True)]
        most = max(spent[a] for a in done)
        scores = self._scores()
        return max((a for a in done if spent[a] == most), key=scores.__getitem__)

    def policy_target(self, node: int = 0) -> Sequence[float]:
        """The improved policy."""
        return improved_policy(self._tree, node, self._constants)

    def _select(self, node: int) -> int:
        return self._select_interior(node) if node else self._select_root()

    def _select_root(self) -> int:
        """The best considered action among those whose visits equal the scheduled count."""
        tree, states = self._tree, self._tree.edge_state
        edges = tree.edges(0)
        counts = [begun - carried for begun, carried in zip(tree.action_begun(0), self._carried, strict=True)]
        left = [
            a for a, edge in enumerate(edges) if edge == UNTRIED or (edge >= 0 and states[edge] <= PENDING)
        ]
        if not left:
            return DEAD
        step = min(sum(counts), len(self._schedule) - 1)
        due = [a for a in left if counts[a] == self._schedule[step]]
        if not due:  # actions that were given up or lost leave gaps in the schedule
            fewest = min(counts[a] for a in left)
            due = [a for a in left if counts[a] == fewest]
        scores = self._scores()
        best = max(due, key=scores.__getitem__)
        return BLOCKED if edges[best] >= 0 and states[edges[best]] == PENDING else best

    def _select_interior(self, node: int) -> int:
        """Argmax of π'(a) − N(a)/(1+ΣN)."""
        tree, states = self._tree, self._tree.edge_state
        counts = tree.action_begun(node)
        share = 1.0 / (1 + sum(counts))
        policy = improved_policy(tree, node, self._constants)
        best, best_score, none_left = -1, -inf, DEAD
        for action, edge in enumerate(tree.edges(node)):
            if edge == ILLEGAL or (edge >= 0 and states[edge] > SETTLED):
                if edge >= 0 and states[edge] == PENDING:
                    none_left = BLOCKED
                continue
            score = policy[action] - counts[action] * share
            if score > best_score:
                best, best_score = action, score
        return best if best >= 0 else none_left

    def _scores(self) -> list[float]:
        """The sum g + logit + σ(q̂) of every root action; −inf where it is illegal."""
        bonus = sigma(self._tree, 0, self._constants)
        return [
            -inf if edge == ILLEGAL else logit + b
            for edge, logit, b in zip(self._tree.edges(0), self._noisy_logits, bonus, strict=True)
        ]


@lru_cache(maxsize=64)
def considered_visits(num_considered: int, num_simulations: int) -> tuple[int, ...]:
    """The schedule of sequential halving (algorithm 2 of the paper).

    Each round gives every kept action max(1, ⌊n/(⌈log2 m⌉·k)⌋) visits, then k ← max(2, ⌊k/2⌋).

    Returns:
        For each simulation the visits that the action to be taken must have already.
    """
    if num_considered <= 1:
        return tuple(range(num_simulations))
    rounds = ceil(log2(num_considered))
    schedule: list[int] = []
    visits, kept = 0, num_considered
    while len(schedule) < num_simulations:
        for _ in range(max(1, num_simulations // (rounds * kept))):
            schedule += [visits] * kept
            visits += 1
        kept = max(2, kept // 2)
    return tuple(schedule[:num_simulations])


def sigma(tree: Tree, node: int, constants: GumbelConstants) -> list[float]:
    """σ of the completed and rescaled values: (c_visit + max N)·c_scale·q̂, one per action; 0 if illegal."""
    visits, values = tree.action_visits(node), tree.action_values(node)
    if tree.num_unready[node]:
        return _sigma_of_some(tree, node, visits, values, constants)
    low = min(values)
    factor = (constants.c_visit + max(visits)) * constants.c_scale / max(max(values) - low, EPSILON)
    return [(q - low) * factor for q in values]


def _sigma_of_some(
    tree: Tree, node: int, visits: Sequence[int], values: Sequence[float], constants: GumbelConstants
) -> list[float]:
    """σ where some actions may be unvisited or illegal."""
    edges = tree.edges(node)
    mixed = _mixed_value(tree.raw_value[node], visits, values, tree.node_priors(node))
    completed = [q if n else mixed for n, q in zip(visits, values, strict=True)]
    legal = [q for q, edge in zip(completed, edges, strict=True) if edge != ILLEGAL]
    low = min(legal)
    factor = (constants.c_visit + max(visits)) * constants.c_scale / max(max(legal) - low, EPSILON)
    return [0.0 if edge == ILLEGAL else (q - low) * factor for q, edge in zip(completed, edges, strict=True)]


def improved_policy(tree: Tree, node: int, constants: GumbelConstants) -> list[float]:
    """π' = softmax(logit + σ(q̂)); 0 for illegal actions."""
    bonus = sigma(tree, node, constants)
    priors = tree.node_priors(node)
    most = max(bonus)
    weights = [p * exp(b - most) for p, b in zip(priors, bonus, strict=True)]
    total = sum(weights)
    if total < TINY:  # all mass is on actions far below the best: the softmax of logits, with none at -inf
        logits = [log(max(p, TINY)) + b for p, b in zip(priors, bonus, strict=True)]
        legal = [x if edge != ILLEGAL else -inf for x, edge in zip(logits, tree.edges(node), strict=True)]
        top = max(legal)
        weights = [exp(x - top) for x in legal]
        total = sum(weights)
    return [w / total for w in weights]


def _mixed_value(
    raw_value: float, visits: Sequence[int], values: Sequence[float], priors: Sequence[float]
) -> float:
    """v_mix = (v̂ + ΣN·Σ_vis πq / Σ_vis π) / (1 + ΣN)."""
    mass, weighted = 0.0, 0.0
    for n, q, prior in zip(visits, values, priors, strict=True):
        if n:
            p = max(prior, TINY)
            mass += p
            weighted += p * q
    total = sum(visits)
    return (raw_value + total * weighted / mass) / (1 + total) if total else raw_value
