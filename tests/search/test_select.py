"""The tree policies against their formulas, written out once more with numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trees import one_node

from rollout.search.normalise import SiblingNormaliser, TreeNormaliser, no_normalisation
from rollout.search.select import (
    BLOCKED,
    DEAD,
    PuctSelector,
    TieNoise,
    UctSelector,
    VirtualLoss,
    next_untried,
)
from rollout.search.tree import GIVEN_UP, LOST, PENDING, SETTLED, Tree
from rollout.search.widening import ActionWidening

WIDE = ActionWidening()


@st.composite
def nodes(draw: st.DrawFn, *, unvisited: bool) -> Tree:
    count = draw(st.integers(1, 8))
    weights = draw(st.lists(st.floats(0.01, 1.0), min_size=count, max_size=count))
    visits = draw(st.lists(st.integers(0 if unvisited else 1, 50), min_size=count, max_size=count))
    values = draw(st.lists(st.floats(-5, 5), min_size=count, max_size=count))
    in_flight = [draw(st.integers(0, 5)) if n else 0 for n in visits]
    priors = [w / sum(weights) for w in weights]
    return one_node(priors, visits, values, raw=draw(st.floats(-5, 5)), in_flight=in_flight)


def columns(tree: Tree) -> tuple[np.ndarray, ...]:
    edges = tree.edges(0)
    n = np.array([tree.edge_visits[e] if e >= 0 else 0 for e in edges], float)
    o = np.array([tree.edge_in_flight[e] if e >= 0 else 0 for e in edges], float)
    q = np.array([tree.edge_value[e] if e >= 0 else 0 for e in edges])
    return np.array(tree.node_priors(0)), n, o, q


def is_argmax(scores: np.ndarray, action: int) -> bool:
    return bool(np.isclose(scores[action], scores.max(), rtol=1e-12, atol=1e-12))


@settings(max_examples=100, deadline=None)
@given(nodes(unvisited=False), st.floats(0, 3))
def test_uct_is_the_argmax_of_its_formula(tree: Tree, c: float) -> None:
    _, n, o, q = columns(tree)
    total = tree.visits[0] + tree.in_flight[0]
    assert total == 1 + n.sum() + o.sum()
    scores = q + c * np.sqrt(np.log(total) / (n + o))
    assert is_argmax(scores, UctSelector(tree, c, no_normalisation, WIDE)(0))


@settings(max_examples=100, deadline=None)
@given(nodes(unvisited=True))
def test_uct_tries_what_is_untried_first(tree: Tree) -> None:
    priors, n, _, _ = columns(tree)
    assume((n == 0).any())
    action = UctSelector(tree, 1.0, no_normalisation, WIDE)(0)
    assert n[action] == 0
    assert priors[action] == priors[n == 0].max()


@settings(max_examples=100, deadline=None)
@given(nodes(unvisited=True))
def test_puct_is_the_argmax_of_mctxs_formula(tree: Tree) -> None:
    p, n, o, q = columns(tree)
    low = min([tree.value[0], *q[n > 0]])
    high = max([tree.value[0], *q[n > 0]])
    q_hat = np.where(n > 0, (q - low) / max(high - low, 1e-8), 0.0)
    total = tree.visits[0] + tree.in_flight[0]
    scores = q_hat + np.sqrt(total) * p / (1 + n + o) * (1.25 + np.log((total + 19652 + 1) / 19652))
    assert is_argmax(scores, PuctSelector(tree, 1.25, 19652, SiblingNormaliser(tree), WIDE)(0))


@settings(max_examples=100, deadline=None)
@given(nodes(unvisited=True), st.floats(0, 1))
def test_first_play_is_the_parents_value_less_the_visited_mass(tree: Tree, reduction: float) -> None:
    p, n, o, q = columns(tree)
    first_play = tree.value[0] - reduction * np.sqrt(p[n > 0].sum())
    total = tree.visits[0] + tree.in_flight[0]
    factor = np.sqrt(total) * (1.25 + np.log((total + 19652 + 1) / 19652))
    scores = np.where(n > 0, q, first_play) + factor * p / (1 + n + o)
    assert is_argmax(scores, PuctSelector(tree, 1.25, 19652, no_normalisation, WIDE, reduction)(0))


@settings(max_examples=100, deadline=None)
@given(nodes(unvisited=False), st.floats(-9, -5))
def test_virtual_loss_pulls_values_towards_a_loss(tree: Tree, loss: float) -> None:
    _, n, o, q = columns(tree)
    w = 3 * o
    pulled = q + (loss - q) * w / (w + np.maximum(0.25, n))
    scores = pulled + np.sqrt(np.log(tree.visits[0] + tree.in_flight[0]) / (n + o))
    assert is_argmax(scores, UctSelector(tree, 1.0, no_normalisation, WIDE, VirtualLoss(loss))(0))


def test_virtual_loss_sends_the_next_simulation_elsewhere_where_visits_alone_do_not() -> None:
    tree = one_node([0.5, 0.5], [1000, 10], [0.5, 0.4], in_flight=[1000, 0])
    assert UctSelector(tree, 0.01, no_normalisation, WIDE)(0) == 0
    assert UctSelector(tree, 0.01, no_normalisation, WIDE, VirtualLoss(-1.0))(0) == 1


def test_the_tree_wide_range_is_that_of_all_values_seen() -> None:
    normaliser = TreeNormaliser()
    assert normaliser(0) == (0.0, 1.0)
    for q in (3.0, -1.0, 2.0):
        normaliser.observe(q)
    low, scale = normaliser(0)
    assert [(q - low) * scale for q in (-1.0, 1.0, 3.0)] == pytest.approx([0.0, 0.5, 1.0])


@pytest.mark.parametrize("kind", ["uct", "puct"])
def test_what_cannot_be_taken_is_never_selected(kind: str) -> None:
    def select(states: list[int]) -> int:
        tree = one_node([1 / 3] * 3, [5, 5, 5], [1.0, 0.5, 0.0])
        for action, state in enumerate(states):
            tree.set_state(tree.edge(0, action), state)
        if kind == "uct":
            return UctSelector(tree, 0.0, no_normalisation, WIDE)(0)
        return PuctSelector(tree, 0.0, 1.0, no_normalisation, WIDE)(0)

    assert select([0, 0, 0]) == 0
    assert select([PENDING, SETTLED, 0]) == 1
    assert select([GIVEN_UP, LOST, 0]) == 2
    assert select([GIVEN_UP, LOST, PENDING]) == BLOCKED
    assert select([GIVEN_UP, LOST, GIVEN_UP]) == DEAD


def test_untried_actions_of_equal_prior_do_not_come_in_the_same_order_everywhere() -> None:
    tree = Tree()
    for _ in range(4):
        tree.add_node(4)
    assert [next_untried(tree, node) for node in range(4)] == [0, 1, 2, 3]
    masked = Tree()
    masked.add_node(3, mask=[False, True, False])
    assert next_untried(masked, 0) == 1


@pytest.mark.parametrize("kind", ["uct", "puct"])
@pytest.mark.parametrize("visited", [False, True])
def test_tie_noise_spreads_equals_over_seeds_and_decides_nothing_else(kind: str, visited: bool) -> None:
    def chosen(tree: Tree, seed: int) -> int:
        noise = TieNoise(1e-7, seed)
        if kind == "uct":
            return UctSelector(tree, 1.0, no_normalisation, WIDE, tie_noise=noise)(0)
        return PuctSelector(tree, 1.25, 19652, no_normalisation, WIDE, tie_noise=noise)(0)

    n = 5 * visited
    equal = one_node([0.25] * 4, [n] * 4, [0.3] * 4, mask=[True, True, True, True])
    choices = [chosen(equal, seed) for seed in range(200)]
    assert all(choices.count(action) > 25 for action in range(4))
    assert choices == [chosen(equal, seed) for seed in range(200)]
    better = one_node([0.249, 0.253, 0.249, 0.249], [n] * 4, [0.3, 0.301, 0.3, 0.3])
    assert {chosen(better, seed) for seed in range(50)} == {1}


@pytest.mark.parametrize(("k", "alpha"), [(1.0, 0.5), (2.0, 0.3)])
def test_widening_tries_as_many_actions_as_it_may(k: float, alpha: float) -> None:
    widening = ActionWidening(k, alpha)
    for tried in range(1, 6):
        tree = one_node([1 / 6] * 6, [3] * tried + [0] * (6 - tried), [0.0] * 6)
        assert widening.has_room(tree, 0) == (tried < k * (1 + 3 * tried) ** alpha)
    assert widening.has_room(one_node([1.0], [0], [0.0]), 0)
