"""AB-MCTS-A: wider or deeper by Thompson sampling (Inoue et al., 2025), for open-ended actions such as text.

In every node a sample from the posterior of GEN (what newly proposed children scored) stands against one of
CONT (what going on below existing children scored). GEN proposes a new child; CONT goes to the child whose
own posterior sampled highest, and asks again there. A child's posterior knows only what was found below it.

Scores are returns, R + γ·G. Posteriors: normal with unknown mean and variance under a normal-inverse-χ² prior
(m=0, κ=1, ν=1, τ²=0.1; Murphy, Probabilistic Machine Learning: Advanced Topics, 3.4.3.3), or Beta(½, ½) with
a score from 0 to 1 as that share of a success.

In a state with listed actions, GEN takes the next untried one. Not guaranteed: re-rooting; posteriors belong
to one tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np

from rollout.errors import SearchError
from rollout.search.backward import Backward
from rollout.search.base import Outcome
from rollout.search.decide import MoveRule, visit_target
from rollout.search.descend import Path, descend
from rollout.search.select import BLOCKED, DEAD, next_untried
from rollout.search.tree import PENDING, SETTLED, UNTRIED, Tree
from rollout.search.widening import Drawing
from rollout.types import derive_seed

__all__ = ["AdaptiveBranching", "Posterior", "ScoringBackward"]

M, KAPPA, NU, TAU_SQUARED = 0.0, 1.0, 1.0, 0.1
"""The normal-inverse-χ² prior."""
A, B = 0.5, 0.5
"""The beta prior."""


@dataclass(slots=True)
class Posterior:
    """What is known of the scores of one choice: their number, mean, and sum of squared deviations."""

    kind: Literal["normal", "beta"]
    n: int = 0
    mean: float = 0.0
    deviation: float = 0.0

    def tell(self, score: float) -> None:
        """Takes in a score (Welford's update)."""
        self.n += 1
        delta = score - self.mean
        self.mean += delta / self.n
        self.deviation += delta * (score - self.mean)

    def parameters(self) -> tuple[float, ...]:
        """(m, κ, ν, τ²) of the normal-inverse-χ², or (a, b) of the beta."""
        n = self.n
        if self.kind == "beta":
            return A + n * self.mean, B + n * (1.0 - self.mean)
        kappa, nu = KAPPA + n, NU + n
        spread = NU * TAU_SQUARED + self.deviation + n * KAPPA * (M - self.mean) ** 2 / kappa
        return (KAPPA * M + n * self.mean) / kappa, kappa, nu, spread / nu

    def sample(self, rng: np.random.Generator) -> float:
        """A draw of the mean score: σ² ~ Inv-χ²(ν, τ²), µ ~ N(m, σ²/κ); or Beta(a, b)."""
        if self.kind == "beta":
            a, b = self.parameters()
            return float(rng.beta(a, b))
        m, kappa, nu, tau_squared = self.parameters()
        variance = nu * tau_squared / rng.chisquare(nu)
        return float(rng.normal(m, sqrt(variance / kappa)))


class AdaptiveBranching:
    """The AB-MCTS-A search.

    Args:
        tree: The tree.
        drawing: Single outcomes or chance nodes.
        move: How the move is read off the root.
        prior: The family of the posteriors.
    """

    can_advance = False

    def __init__(
        self, tree: Tree, drawing: Drawing, move: MoveRule, prior: Literal["normal", "beta"]
    ) -> None:
        self._tree = tree
        self._drawing = drawing
        self._move = move
        self._prior: Literal["normal", "beta"] = prior
        self._generate: dict[int, Posterior] = {}
        self._go_on: dict[int, Posterior] = {}
        self._child: dict[int, Posterior] = {}
        self._seed = 0
        self._rng = np.random.default_rng(0)

    def begin(self, seed: int, simulations: int) -> None:
        """Seeds the sampling."""
        self._seed = seed
        self._rng = np.random.default_rng(derive_seed(seed, "thompson"))

    def plan(self) -> Path | None:
        """Down by Thompson sampling until a new child is generated."""
        return descend(self._tree, self._select, self._drawing)

    def best(self) -> int:
        """By the move rule."""
        return self._move.choose(self._tree, self._seed)

    def policy_target(self, node: int = 0) -> Sequence[float]:
        """The visit distribution."""
        return visit_target(self._tree, node)

    def check(self, path: Path, told: Outcome) -> None:
        """Checks that every score on the path would suit the prior.

        Raises:
            SearchError: A return outside [0, 1] under the beta prior.
        """
        if self._prior != "beta":
            return
        for score in _returns(self._tree, path.outcomes, _first_return(told)):
            if not 0.0 <= score <= 1.0:
                raise SearchError(f"score_prior = 'beta' needs returns from 0 to 1, got {score}")

    def observe(self, edges: Sequence[int], scores: Sequence[float], *, is_new: bool) -> None:
        """Takes in one simulation: the last edge generated a child, those above it went on.

        Args:
            edges: The path.
            scores: The return from each edge on.
            is_new: The last edge's child was made by this simulation.
        """
        tree = self._tree
        for edge, score in zip(edges[:-1] if is_new else edges, scores, strict=False):
            self._of(self._child, edge).tell(score)
            self._of(self._go_on, tree.edge_node[edge]).tell(score)
        if is_new:
            self._of(self._generate, tree.edge_node[edges[-1]]).tell(scores[-1])

    def _select(self, node: int) -> int:
        tree = self._tree
        edges = tree.edges(node)
        going_on = [a for a, e in enumerate(edges) if e >= 0 and tree.edge_state[e] <= SETTLED]
        can_generate = bool(tree.open_ended[node]) or UNTRIED in edges
        if not going_on and not can_generate:
            is_waiting = any(e >= 0 and tree.edge_state[e] == PENDING for e in edges)
            return BLOCKED if is_waiting else DEAD
        if can_generate and (not going_on or self._generates(node)):
            return next_untried(tree, node)
        return max(going_on, key=lambda a: self._of(self._child, edges[a]).sample(self._rng))

    def _generates(self, node: int) -> bool:
        """Whether GEN samples higher than CONT."""
        generate = self._of(self._generate, node).sample(self._rng)
        return generate >= self._of(self._go_on, node).sample(self._rng)

    def _of(self, table: dict[int, Posterior], row: int) -> Posterior:
        if row not in table:
            table[row] = Posterior(self._prior)
        return table[row]


class ScoringBackward:
    """Backs up, and tells the posteriors what a simulation scored.

    Args:
        inner: The backup.
        algorithm: Holds the posteriors.
    """

    def __init__(self, inner: Backward, algorithm: AdaptiveBranching) -> None:
        self._inner = inner
        self._algorithm = algorithm

    def __call__(
        self, tree: Tree, edges: Sequence[int], outcomes: Sequence[int], leaf: int, value: float
    ) -> None:
        """Backs up, and scores every edge with the return from it on."""
        scores = _returns(tree, outcomes, value)[:-1]
        self._algorithm.observe(edges, scores, is_new=tree.visits[leaf] == 0)
        self._inner(tree, edges, outcomes, leaf, value)


def _returns(tree: Tree, outcomes: Sequence[int], value: float) -> list[float]:
    """The return from each outcome of a path on, from the root; then `value`, which follows the last."""
    returns = [value]
    for outcome in reversed(outcomes):
        returns.append(tree.outcome_reward[outcome] + tree.outcome_discount[outcome] * returns[-1])
    return returns[::-1]


def _first_return(told: Outcome) -> float:
    """The return of the branch itself; the search's own discount, at most 1, can only bring it nearer 0."""
    if told.terminated:
        return told.reward
    return told.reward + (1.0 if told.discount is None else told.discount) * told.node.value
