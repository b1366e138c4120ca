"""Backups against their formulas, where paths join, and against full enumeration of small games."""

from __future__ import annotations

import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_worlds import World, config, drive
from trees import one_node

from rollout.search.attach import Attacher, make_root
from rollout.search.backward import (
    MeanBackward,
    RecomputedBackward,
    best_found,
    max_value,
    mean_value,
    mixed_value,
)
from rollout.search.base import NodeInfo, Outcome
from rollout.search.factory import make_search
from rollout.search.tree import Tree
from rollout.types import derive_seed


def chain(discounts: list[float], rewards: list[float]) -> tuple[Tree, list[int], list[int]]:
    tree = Tree()
    make_root(tree, NodeInfo(2, 0.5))
    attacher = Attacher(tree, 1.0)
    edges, outcomes, node = [], [], 0
    for trial, (discount, reward) in enumerate(zip(discounts, rewards, strict=True), 1):
        edges.append(tree.add_edge(node, 0))
        outcomes.append(attacher.attach(edges[-1], Outcome(reward, NodeInfo(2), discount=discount), trial))
        node = tree.outcome_node[outcomes[-1]]
    return tree, edges, outcomes


def test_the_mean_backup_discounts_rewards_on_the_way_up() -> None:
    tree, edges, outcomes = chain([0.5, 0.9], [1.0, 2.0])
    MeanBackward()(tree, edges, outcomes, 2, 10.0)
    assert tree.value[2] == 10.0
    assert tree.edge_value[edges[1]] == pytest.approx(2.0 + 0.9 * 10.0)
    assert tree.edge_value[edges[0]] == pytest.approx(1.0 + 0.5 * 11.0)
    assert tree.value[0] == pytest.approx((0.5 + 6.5) / 2)
    assert list(tree.visits) == [2, 1, 1]
    MeanBackward()(tree, edges[:1], outcomes[:1], 1, -1.0)
    assert tree.edge_value[edges[0]] == pytest.approx((6.5 + 0.5) / 2)
    assert tree.edge_value[edges[1]] == pytest.approx(11.0)


def test_the_other_players_value_is_the_negative_of_ours() -> None:
    tree, edges, outcomes = chain([-1.0, -1.0], [0.0, 1.0])
    RecomputedBackward(max_value(), by_draws=True)(tree, edges, outcomes, 2, 0.0)
    assert tree.value[1] == 1.0
    assert tree.value[0] == -1.0


def test_rules_of_a_state() -> None:
    tree = one_node([0.25] * 4, [3, 1, 0, 0], [1.0, 2.0, 0.0, 0.0], raw=-1.0)
    mean = (-1.0 + 3.0 + 2.0) / 5
    assert mean_value(tree, 0) == pytest.approx(mean)
    assert max_value()(tree, 0) == 2.0
    assert best_found(tree, 0) == 2.0
    assert best_found(one_node([1.0], [3], [-1.0], raw=0.5), 0) == 0.5
    assert mixed_value(0.25, max_value())(tree, 0) == pytest.approx(0.75 * mean + 0.25 * 2.0)
    assert max_value(3.0)(tree, 0) == pytest.approx(max((3 * 1.0 - 3) / 6, (2.0 - 3) / 4))
    assert max_value(1.0)(tree, 0) == pytest.approx(max((3 * 1.0 - 1) / 4, (2.0 - 1) / 2))
    untried = one_node([0.5, 0.5], [3, 0], [-1.0, 0.0], raw=0.25)
    assert max_value()(untried, 0) == -1.0
    assert max_value(2.0)(untried, 0) == 0.25  # the action that is untried has the evaluation alone
    assert max_value()(one_node([1.0], [0], [0.0], raw=0.7), 0) == 0.7


def two_outcomes() -> tuple[Tree, int, list[int]]:
    """An edge drawn 3 times into A (worth 1) and once into B (worth -3)."""
    tree = Tree()
    make_root(tree, NodeInfo(1, 0.0))
    attacher, edge = Attacher(tree, 0.5), tree.add_edge(0, 0)
    rows = []
    for trial, (digest, value) in enumerate([("A", 1.0), ("A", 1.0), ("B", -3.0), ("A", 1.0)], 1):
        outcome = attacher.attach(edge, Outcome(2.0, NodeInfo(1, value, state_hash=digest)), trial)
        rows.append(outcome)
        RecomputedBackward(max_value(), by_draws=True)(
            tree, [edge], [outcome], tree.outcome_node[outcome], value
        )
    return tree, edge, rows


def test_expectation_weighs_outcomes_by_draws_and_max_by_visits() -> None:
    tree, edge, rows = two_outcomes()
    assert len(tree) == 3
    assert rows[0] == rows[1] == rows[3]
    expected = 2.0 + 0.5 * (3 * 1.0 + 1 * -3.0) / 4
    assert tree.edge_value[edge] == pytest.approx(expected)
    # Ten simulations that walk through B are the search's own choice, and no evidence that B is likely.
    backward = RecomputedBackward(max_value(), by_draws=True)
    for _ in range(10):
        backward(tree, [edge], [rows[2]], tree.outcome_node[rows[2]], -3.0)
    assert tree.edge_value[edge] == pytest.approx(expected)
    RecomputedBackward(max_value(), by_draws=False)(tree, [edge], [rows[2]], tree.outcome_node[rows[2]], -3.0)
    assert tree.edge_value[edge] == pytest.approx(2.0 + 0.5 * (3 * 1.0 + 12 * -3.0) / 15)


def test_a_reward_that_varies_is_averaged_over_draws() -> None:
    tree = Tree()
    make_root(tree, NodeInfo(1))
    attacher, edge = Attacher(tree, 1.0), tree.add_edge(0, 0)
    for trial, reward in enumerate([1.0, 2.0, 6.0], 1):
        row = attacher.attach(edge, Outcome(reward, NodeInfo(1, state_hash="A")), trial)
    assert tree.outcome_reward[row] == pytest.approx(3.0)
    assert tree.outcome_draws[row] == 3


def test_where_paths_join_both_parents_get_the_shared_childs_value() -> None:
    """Root -0-> A -> C and root -1-> B -> C: what is found below C through A must reach B's value too."""
    tree = Tree()
    make_root(tree, NodeInfo(2))
    attacher = Attacher(tree, 1.0, transpositions=True)
    backward = RecomputedBackward(mean_value, by_draws=False)
    top = [tree.add_edge(0, 0), tree.add_edge(0, 1)]
    sides = [
        attacher.attach(e, Outcome(0.0, NodeInfo(1, 0.0, state_hash=h)), t)
        for e, h, t in zip(top, "AB", (1, 2), strict=False)
    ]
    joined = []
    for trial, (edge, side) in enumerate(zip(top, sides, strict=True), 3):
        below = tree.add_edge(tree.outcome_node[side], 0)
        joined.append((below, attacher.attach(below, Outcome(0.0, NodeInfo(1, 0.0, state_hash="C")), trial)))
        assert edge in top
    c = tree.outcome_node[joined[0][1]]
    assert tree.outcome_node[joined[1][1]] == c
    assert tree.trial[c] == 3
    for side in (0, 1):
        path = [top[side], joined[side][0]], [sides[side], joined[side][1]]
        backward(tree, *path, c, 1.0 if side == 0 else 3.0)
    assert tree.visits[c] == tree.evaluations[c] == 2
    assert tree.value[c] == pytest.approx(2.0)
    assert tree.edge_value[joined[1][0]] == pytest.approx(2.0)  # not 3, the return that came in through B
    backward(tree, [top[0], joined[0][0]], [sides[0], joined[0][1]], c, 5.0)
    assert tree.edge_value[joined[0][0]] == pytest.approx(3.0)
    assert tree.edge_visits[joined[0][0]] == 2
    assert tree.visits[c] == 3


def test_equal_states_at_unequal_depths_stay_apart() -> None:
    tree = Tree()
    make_root(tree, NodeInfo(2, state_hash="S"))
    attacher = Attacher(tree, 1.0, transpositions=True)
    row = attacher.attach(tree.add_edge(0, 0), Outcome(0.0, NodeInfo(2, state_hash="S")), 1)
    assert tree.outcome_node[row] == 1
    assert tree.depth[1] == 1


@pytest.mark.parametrize(
    "told",
    [
        Outcome(0.0, NodeInfo(3, state_hash="A")),
        Outcome(0.0, NodeInfo(2, state_hash="A"), terminated=True),
        Outcome(0.0, NodeInfo(2, state_hash="A"), truncated=True),
        Outcome(0.0, NodeInfo(-1, state_hash="A")),
        Outcome(0.0, NodeInfo(2, state_hash="B")),
        Outcome(0.0, NodeInfo(2)),
    ],
)
@pytest.mark.parametrize("transpositions", [False, True])
def test_states_that_differ_stay_apart_whatever_their_hashes_say(told: Outcome, transpositions: bool) -> None:
    tree = Tree()
    make_root(tree, NodeInfo(2))
    attacher = Attacher(tree, 1.0, transpositions=transpositions)
    edges = [tree.add_edge(0, 0), tree.add_edge(0, 1)]
    first = Outcome(0.0, NodeInfo(2, state_hash="A"))
    same = [attacher.attach(edges[0], first, trial) for trial in (1, 2)]
    assert same[0] == same[1]
    assert attacher.attach(edges[0], told, 3) != same[0]
    other = attacher.attach(edges[1], first, 4)
    assert (tree.outcome_node[other] == tree.outcome_node[same[0]]) == transpositions


class FiniteWorld(World):
    """A world whose episodes end after `horizon` actions; the state carries the steps taken."""

    def outcome(self, state: int, action: int, seed: int) -> tuple[int, Outcome]:
        steps, cell = divmod(state, 1000)
        luck = derive_seed(seed) % 2
        after = derive_seed(self.seed, cell, action, luck) % 40
        reward = (derive_seed(self.seed, "r", cell, action, after) % 9 - 4) / 4
        terminated = steps == 3
        return (steps + 1) * 1000 + after, Outcome(reward, self.info((steps + 1) * 1000 + after), terminated)

    def info(self, state: int) -> NodeInfo:
        return NodeInfo(1 + derive_seed(self.seed, state) % 3, 0.0, state_hash=str(state))


def enumerate_value(world: FiniteWorld, stochastic: bool) -> float:
    """V*(start) by full enumeration, both outcomes of each action equally likely."""
    lucks = [next(s for s in range(100) if derive_seed(s) % 2 == luck) for luck in range(2)]

    @cache
    def value(state: int) -> float:
        best = float("-inf")
        for action in range(world.info(state).num_actions):
            total = 0.0
            for seed in lucks if stochastic else lucks[:1]:
                after, told = world.outcome(state, action, seed)
                total += told.reward + (0.0 if told.terminated else value(after))
            best = max(best, total / (2 if stochastic else 1))
        return best

    return value(0)


class FixedLuck(FiniteWorld):
    def outcome(self, state: int, action: int, seed: int) -> tuple[int, Outcome]:
        return super().outcome(state, action, next(s for s in range(100) if derive_seed(s) % 2 == 0))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["max", "expectation"]), st.booleans())
def test_a_deterministic_game_is_solved_exactly(seed: int, backup: str, transpositions: bool) -> None:
    """Breadth-first visits every action, so the max is over all of them."""
    world = FixedLuck(seed)
    algorithm = "uct" if transpositions else "breadth_first"
    search = make_search(
        config(
            algorithm=algorithm,
            simulations=3000 if transpositions else 400,
            backup=backup,
            transpositions=transpositions,
            exploration=20.0,
        ),
        world.info(0),
        seed,
    )
    drive(search, world, workers=8, order=random.Random(seed))
    assert search.root_value() == pytest.approx(enumerate_value(world, stochastic=False))


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 1000))
def test_a_stochastic_game_converges_to_its_exact_value(seed: int) -> None:
    world = FiniteWorld(seed)
    search = make_search(
        config(
            simulations=4000,
            backup="expectation",
            outcomes="widening",
            outcome_alpha=0.8,
            exploration=4.0,
            transpositions=True,
            wave=1,
        ),
        world.info(0),
        seed,
    )
    drive(search, world, workers=1, order=random.Random(seed))
    assert search.root_value() == pytest.approx(enumerate_value(world, stochastic=True), abs=0.25)
