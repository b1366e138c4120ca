"""Gumbel search against its formulas, written out once more with numpy, and against published schedules."""

from __future__ import annotations

from math import ceil, floor, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_worlds import World, config
from trees import one_node

from rollout.errors import SearchError
from rollout.search.base import NodeInfo, Outcome
from rollout.search.factory import make_search
from rollout.search.gumbel import Gumbel, GumbelConstants, considered_visits, improved_policy, sigma
from rollout.search.tree import Tree
from rollout.search.widening import SingleOutcome
from rollout.types import Failure

SCHEDULES = {
    # (m, n): (visits that the action must have, how many simulations in a row), as mctx 0.0.71 lays them out
    (1, 4): [(0, 1), (1, 1), (2, 1), (3, 1)],
    (2, 8): [(0, 2), (1, 2), (2, 2), (3, 2)],
    (3, 8): [(0, 3), (1, 2), (2, 2), (3, 1)],
    (4, 16): [(0, 4), (1, 4), (2, 2), (3, 2), (4, 2), (5, 2)],
    (5, 17): [(0, 5), (1, 2), (2, 2), (3, 2), (4, 2), (5, 2), (6, 2)],
    (8, 32): [(0, 8), (1, 4), (2, 4), *((n, 2) for n in range(3, 11))],
    (16, 32): [(0, 16), (1, 8), (2, 4), (3, 4)],
    (16, 50): [(0, 16), (1, 8), (2, 4), (3, 4), (4, 4), *((n, 2) for n in range(5, 12))],
    (4, 50): [*((n, 4) for n in range(6)), *((n, 2) for n in range(6, 19))],
    (3, 50): [*((n, 3) for n in range(8)), *((n, 2) for n in range(8, 21))],
    (16, 200): [
        *((n, 16) for n in range(3)),
        *((n, 8) for n in range(3, 9)),
        *((n, 4) for n in range(9, 21)),
        *((n, 2) for n in range(21, 49)),
    ],
    (8, 200): [
        *((n, 8) for n in range(8)),
        *((n, 4) for n in range(8, 24)),
        *((n, 2) for n in range(24, 60)),
    ],
}


@pytest.mark.parametrize(("m", "n"), SCHEDULES)
def test_schedules_are_the_published_ones(m: int, n: int) -> None:
    expected = [visits for visits, count in SCHEDULES[m, n] for _ in range(count)]
    assert list(considered_visits(m, n)) == expected


@given(st.integers(2, 40), st.integers(1, 300))
def test_schedules_follow_sequential_halving(m: int, n: int) -> None:
    """Played out action by action: each round gives every kept action its share, then halves."""
    played, kept, visits = list[int](), m, [0] * m
    while len(played) < n:
        for _ in range(max(1, floor(n / (ceil(log2(m)) * kept)))):
            for action in range(kept):
                played.append(visits[action])
                visits[action] += 1
        kept = max(2, kept // 2)
    assert list(considered_visits(m, n)) == played[:n]


def numpy_sigma(prior, visits, values, raw, c_visit, c_scale):
    n, q, p = np.array(visits, float), np.array(values), np.array(prior)
    seen = n > 0
    mixed = raw
    if seen.any():
        mixed = (raw + n.sum() * (p[seen] * q[seen]).sum() / p[seen].sum()) / (1 + n.sum())
    completed = np.where(seen, q, mixed)
    rescaled = (completed - completed.min()) / max(completed.max() - completed.min(), 1e-8)
    return (c_visit + n.max()) * c_scale * rescaled


def softmax(x):
    weights = np.exp(x - np.max(x))
    return weights / weights.sum()


@st.composite
def cases(draw: st.DrawFn):
    count = draw(st.integers(1, 8))
    weights = np.array(draw(st.lists(st.floats(0.01, 1.0), min_size=count, max_size=count)))
    visits = draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))
    values = draw(st.lists(st.floats(-5, 5), min_size=count, max_size=count))
    return list(weights / weights.sum()), visits, values, draw(st.floats(-5, 5))


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([(50.0, 0.1), (10.0, 1.0)]))
def test_sigma_and_the_improved_policy_are_the_formulas(case, scales) -> None:
    prior, visits, values, raw = case
    tree = one_node(prior, visits, values, raw=raw)
    constants = GumbelConstants(c_visit=scales[0], c_scale=scales[1])
    expected = numpy_sigma(prior, visits, values, raw, *scales)
    assert sigma(tree, 0, constants) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    policy = softmax(np.log(prior) + expected)
    assert improved_policy(tree, 0, constants) == pytest.approx(policy, rel=1e-9, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_the_interior_rule_is_the_argmax_of_its_formula(case) -> None:
    prior, visits, values, raw = case
    tree = one_node(prior, visits, values, raw=raw)
    n = np.array(visits, float)
    scores = softmax(np.log(prior) + numpy_sigma(prior, visits, values, raw, 50.0, 0.1)) - n / (1 + n.sum())
    search = Gumbel(tree, SingleOutcome(), GumbelConstants(), (0.3, 0.0))
    assert scores[search._select_interior(0)] == pytest.approx(scores.max(), abs=1e-12)


def test_a_prior_of_nearly_zero_gives_no_probability_that_is_not_a_number() -> None:
    tree = one_node([0.0, 1.0], [3, 3], [1.0, -1.0])
    policy = improved_policy(tree, 0, GumbelConstants(c_visit=1000.0, c_scale=100.0))
    assert sum(policy) == pytest.approx(1.0)
    assert policy[0] > 0.99  # the value outweighs any finite logit


@given(st.integers(0, 1000), st.integers(1, 60), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_root_visits_are_those_of_sequential_halving(seed: int, simulations: int, considered: int) -> None:
    world = World(seed, stochastic=False, masked=True, end_share=0.1)
    settings_ = config(algorithm="gumbel", simulations=simulations, wave=1, considered_actions=considered)
    root = world.info(0)
    search = make_search(settings_, root, seed)
    states = {0: 0}
    while not search.done:
        for trial in search.ask(1):
            states[trial.trial_id], outcome = world.outcome(states[trial.source], trial.action, trial.seed)
            search.tell(trial.trial_id, outcome)
    legal = root.num_actions if root.mask is None else sum(root.mask)
    counts = [0] * min(considered, legal)
    for visits in considered_visits(len(counts), simulations):
        counts[counts.index(visits)] += 1
    assert sorted(filter(None, search.action_visits())) == sorted(filter(None, counts))
    assert search.action_visits()[search.best()] == max(search.action_visits())


def test_the_best_action_is_the_argmax_over_the_most_visited() -> None:
    tree = one_node([0.2, 0.3, 0.5], [4, 4, 2], [0.9, 0.1, 1.0])
    search = Gumbel(tree, SingleOutcome(), GumbelConstants(scale=0.0), (0.3, 0.0))
    search.begin(0, 10)
    search._carried = [0, 0, 0]
    assert search.best() == 0  # action 2 is better, but was dropped earlier


def test_noise_of_scale_zero_makes_the_choice_deterministic_and_noise_spreads_it() -> None:
    def first_actions(scale: float) -> set[int]:
        tree = Tree()
        tree.add_node(5, prior=[0.1, 0.1, 0.6, 0.1, 0.1])
        tree.visits[0] = tree.evaluations[0] = 1
        found = set()
        for seed in range(50):
            search = Gumbel(tree, SingleOutcome(), GumbelConstants(1, scale), (0.3, 0.0))
            search.begin(seed, 10)
            found.add(search._select_root())
        return found

    assert first_actions(0.0) == {2}
    assert len(first_actions(1.0)) > 2


def test_actions_that_are_given_up_leave_the_others_to_the_schedule() -> None:
    search = make_search(config(algorithm="gumbel", simulations=16, wave=1), NodeInfo(4), 0)
    while not search.done:
        for trial in search.ask(1):
            told = Outcome(0.0, NodeInfo(4)) if trial.depth > 1 or trial.action != 2 else None
            search.tell(trial.trial_id, told or Failure("gone", "guest", retryable=False))
    assert search.action_visits()[2] == 0
    assert sum(search.action_visits()) == 15
    assert search.best() != 2


def test_open_ended_states_are_refused() -> None:
    with pytest.raises(SearchError, match="open-ended"):
        make_search(config(algorithm="gumbel"), NodeInfo(-1), 0)
    search = make_search(config(algorithm="gumbel"), NodeInfo(2), 0)
    [trial] = search.ask(1)
    with pytest.raises(SearchError, match="open-ended"):
        search.tell(trial.trial_id, Outcome(0.0, NodeInfo(-1)))
    assert search.tell(trial.trial_id, Outcome(0.0, NodeInfo(2))) == ()  # still in flight, part of a wave
