"""Puts a search together from its configuration."""

from __future__ import annotations

from rollout.config import SearchConfig
from rollout.errors import ConfigError
from rollout.search.ab_mcts import AdaptiveBranching, ScoringBackward
from rollout.search.algorithm import Algorithm, TreePolicyAlgorithm
from rollout.search.attach import Attacher, make_root
from rollout.search.backward import (
    Backward,
    MeanBackward,
    ObservedBackward,
    RecomputedBackward,
    best_found,
    max_value,
    mean_value,
    mixed_value,
)
from rollout.search.base import NodeInfo, Search
from rollout.search.baselines import Baseline, Beam, BestOfN, BreadthFirst, Revision
from rollout.search.decide import MoveRule
from rollout.search.ensemble import Ensemble
from rollout.search.gumbel import Gumbel, GumbelConstants
from rollout.search.normalise import Normaliser, SiblingNormaliser, TreeNormaliser, no_normalisation
from rollout.search.prove import ProvingBackward
from rollout.search.select import PuctSelector, Selector, TieNoise, UctSelector, VirtualLoss
from rollout.search.tree import Tree
from rollout.search.tree_search import Limits, TreeSearch
from rollout.search.widening import ActionWidening, SingleOutcome, WideningDraws
from rollout.types import derive_seed

__all__ = ["make_search"]

BASELINES = ("best_of_n", "beam", "revision", "breadth_first")


def make_search(config: SearchConfig, root: NodeInfo, seed: int) -> Search:
    """A search from `root`.

    Args:
        config: Which algorithm, and its constants.
        root: What is known of the root.
        seed: Every random choice of the search, and every branch's seed, derive from it.

    Raises:
        ConfigError: The algorithm is none of a search.
        SearchError: The root has no action, or its value or prior cannot be accepted.
    """
    if config.algorithm == "random":
        raise ConfigError("search.algorithm 'random' plays without a search")
    size = min(config.ensemble, config.simulations)
    if size == 1:
        return _make_one(config, root, seed)
    members: list[TreeSearch] = []
    for index in range(size):
        share = {
            "simulations": (config.simulations + size - 1 - index) // size,
            "wave": max(1, (config.wave + size - 1 - index) // size),
        }
        members.append(_make_one(config.model_copy(update=share), root, derive_seed(seed, "member", index)))
    return Ensemble(members, _move_rule(config), seed)


def _make_one(config: SearchConfig, root: NodeInfo, seed: int) -> TreeSearch:
    tree = Tree()
    make_root(tree, root)
    drawing = _drawing(config)
    normaliser = _normaliser(config, tree)
    algorithm = _algorithm(config, tree, normaliser, drawing, seed)
    backward = _backward(config, normaliser)
    if isinstance(algorithm, AdaptiveBranching):
        backward = ScoringBackward(backward, algorithm)
    if config.proofs:
        backward = ProvingBackward(backward, config.return_bounds)
    return TreeSearch(
        tree,
        algorithm,
        backward,
        Attacher(tree, config.discount, transpositions=config.transpositions),
        drawing,
        Limits(
            config.simulations,
            config.wave,
            config.deterministic,
            config.max_retries,
            config.common_random_numbers,
        ),
        seed,
    )


def _algorithm(
    config: SearchConfig,
    tree: Tree,
    normaliser: Normaliser,
    drawing: SingleOutcome | WideningDraws,
    seed: int,
) -> Algorithm:
    noise = (config.dirichlet_alpha, config.dirichlet_fraction)
    move = _move_rule(config)
    match config.algorithm:
        case "gumbel":
            constants = GumbelConstants(
                config.considered_actions, config.gumbel_scale, config.c_visit, config.c_scale
            )
            return Gumbel(tree, drawing, constants, noise)
        case "ab_mcts":
            return AdaptiveBranching(tree, drawing, move, config.score_prior)
        case "best_of_n":
            return Baseline(tree, move, BestOfN(tree, drawing))
        case "beam":
            return Baseline(tree, move, Beam(tree, config.width, config.branching))
        case "revision":
            return Baseline(tree, move, Revision(tree))
        case "breadth_first":
            return Baseline(tree, move, BreadthFirst(tree, config.branching))
        case _:
            select = _selector(config, tree, normaliser, seed)
            return TreePolicyAlgorithm(tree, select, drawing, move, noise)


def _selector(config: SearchConfig, tree: Tree, normaliser: Normaliser, seed: int) -> Selector:
    widening = ActionWidening(config.action_k, config.action_alpha)
    virtual_loss = None
    if config.in_flight == "virtual_loss":
        virtual_loss = VirtualLoss(config.return_bounds[0] if config.return_bounds else None)
    tie_noise = TieNoise(config.tie_noise, derive_seed(seed, "ties")) if config.tie_noise else None
    if config.algorithm == "uct":
        return UctSelector(tree, config.exploration, normaliser, widening, virtual_loss, tie_noise)
    reduction = config.first_play_reduction if config.first_play == "parent" else None
    return PuctSelector(
        tree, config.pb_c_init, config.pb_c_base, normaliser, widening, reduction, virtual_loss, tie_noise
    )


def _drawing(config: SearchConfig) -> SingleOutcome | WideningDraws:
    if config.outcomes == "single":
        return SingleOutcome()
    return WideningDraws(config.outcome_k, config.outcome_alpha)


def _normaliser(config: SearchConfig, tree: Tree) -> Normaliser:
    kind = config.normalise
    if kind == "auto":
        kind = "none" if config.algorithm == "uct" else "siblings"
    if kind == "tree":
        return TreeNormaliser()
    return SiblingNormaliser(tree) if kind == "siblings" else no_normalisation


def _backup_kind(config: SearchConfig) -> str:
    if config.backup != "auto":
        return config.backup
    return "best" if config.algorithm in BASELINES else "mean"


def _backward(config: SearchConfig, normaliser: Normaliser) -> Backward:
    kind = _backup_kind(config)
    highest = max_value(config.evaluation_weight)
    backward: Backward
    if kind == "mean" and not config.transpositions:
        backward = MeanBackward()
    elif kind == "mean":
        backward = RecomputedBackward(mean_value, by_draws=False)
    elif kind == "best":
        backward = RecomputedBackward(best_found, by_draws=False)
    elif kind == "mixed":
        backward = RecomputedBackward(mixed_value(config.mixed_weight, highest), by_draws=False)
    else:
        backward = RecomputedBackward(highest, by_draws=kind == "expectation")
    if isinstance(normaliser, TreeNormaliser):
        return ObservedBackward(backward, normaliser)
    return backward


def _move_rule(config: SearchConfig) -> MoveRule:
    by = config.move
    if by == "auto":
        by = "visits" if _backup_kind(config) == "mean" else "value"
    return MoveRule(by, config.temperature)
