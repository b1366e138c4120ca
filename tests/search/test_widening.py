"""Chance nodes: when a branch is drawn afresh, and how stored outcomes are walked through."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_worlds import World, config, drive

from rollout.search.attach import Attacher, make_root
from rollout.search.base import NodeInfo, Outcome
from rollout.search.factory import make_search
from rollout.search.tree import NONE, SETTLED, Tree
from rollout.search.widening import SingleOutcome, WideningDraws


def edge_with(draws: list[int]) -> tuple[Tree, int]:
    tree = Tree()
    make_root(tree, NodeInfo(1))
    edge, attacher = tree.add_edge(0, 0), Attacher(tree, 1.0)
    for name, count in enumerate(draws):
        for _ in range(count):
            attacher.attach(edge, Outcome(0.0, NodeInfo(1, state_hash=str(name))), 1)
    tree.edge_draws[edge] = sum(draws)
    return tree, edge


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(50, 2000))
@settings(max_examples=50, deadline=None)
def test_stored_outcomes_are_walked_through_in_proportion_to_their_draws(draws: list[int], n: int) -> None:
    tree, edge = edge_with(draws)
    tree.edge_state[edge] = SETTLED  # nothing is drawn any more
    counts = [0] * len(draws)
    for visit in range(n):
        tree.slot_begun[0] = visit
        outcome = WideningDraws(1.0, 0.5).choose(tree, edge)
        counts[int(tree.state_hash[tree.outcome_node[outcome]] or "")] += 1
    for count, share in zip(counts, draws, strict=True):
        # The golden ratio's sequence is off by O(log n) visits, where independent draws would be by O(√n).
        assert count == pytest.approx(n * share / sum(draws), abs=6)


@pytest.mark.parametrize(("k", "alpha"), [(1.0, 0.5), (2.0, 0.7), (0.25, 1.0)])
def test_an_action_is_drawn_k_n_to_the_alpha_times(k: float, alpha: float) -> None:
    class Coin(World):
        def info(self, state: int) -> NodeInfo:
            return NodeInfo(1, 0.0, state_hash=str(state))

        def outcome(self, state: int, action: int, seed: int) -> tuple[int, Outcome]:
            return state * 2 + 1 + seed % 2, Outcome(0.0, self.info(state * 2 + 1 + seed % 2))

    world = Coin(0)
    search = make_search(
        config(simulations=500, outcomes="widening", outcome_k=k, outcome_alpha=alpha, wave=1),
        world.info(0),
        0,
    )
    drive(search, world, workers=1, order=random.Random(0))
    tree = search.tree
    edge = tree.edge(0, 0)
    assert tree.edge_visits[edge] == 500
    assert tree.edge_draws[edge] == pytest.approx(max(1, k * 500**alpha), abs=1.5)
    assert len(list(tree.outcomes(edge))) == 2
    assert search.stats()["merged"] >= tree.edge_draws[edge] - 2


def test_a_single_outcome_is_drawn_once() -> None:
    tree, edge = edge_with([1])
    assert SingleOutcome().choose(tree, edge) != NONE
    tree.slot_begun[0] = 10**6
    assert SingleOutcome().choose(tree, edge) != NONE


def test_each_simulation_asks_for_at_most_one_branch() -> None:
    world = World(3)
    search = make_search(config(simulations=300, outcomes="widening"), world.info(0), 0)
    drive(search, world, workers=4, order=random.Random(0))
    stats = search.stats()
    assert stats["trials"] <= stats["simulations"] == 300
    assert stats["trials"] == sum(search.tree.edge_draws)
