"""AB-MCTS-A: posteriors, and the choice between wider and deeper."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_worlds import FINAL, World, config, drive

from rollout.errors import SearchError
from rollout.search.ab_mcts import AdaptiveBranching, Posterior
from rollout.search.attach import Attacher, make_root
from rollout.search.base import OPEN_ENDED, NodeInfo, Outcome
from rollout.search.decide import MoveRule
from rollout.search.factory import make_search
from rollout.search.tree import Tree
from rollout.search.widening import SingleOutcome
from rollout.types import derive_seed


@given(st.lists(st.floats(-10, 10), max_size=30))
def test_the_normal_posterior_is_the_textbooks(scores: list[float]) -> None:
    posterior = Posterior("normal")
    for score in scores:
        posterior.tell(score)
    n, (m0, k0, v0, t0) = len(scores), (0.0, 1.0, 1.0, 0.1)
    mean = float(np.mean(scores)) if scores else 0.0
    squares = float(np.sum((np.array(scores) - mean) ** 2)) if scores else 0.0
    tau = (v0 * t0 + squares + n * k0 / (k0 + n) * (m0 - mean) ** 2) / (v0 + n)
    assert posterior.parameters() == pytest.approx(((k0 * m0 + n * mean) / (k0 + n), k0 + n, v0 + n, tau))


def test_the_beta_posterior_counts_shares_of_successes() -> None:
    posterior = Posterior("beta")
    for score in (1.0, 0.25, 0.0):
        posterior.tell(score)
    assert posterior.parameters() == pytest.approx((0.5 + 1.25, 0.5 + 1.75))


@pytest.mark.parametrize("kind", ["normal", "beta"])
def test_samples_have_the_posteriors_mean_and_shrink_with_evidence(kind) -> None:
    rng = np.random.default_rng(0)
    posterior = Posterior(kind)
    for _ in range(200):
        posterior.tell(float(rng.uniform(0.6, 0.8)))
    draws = [posterior.sample(rng) for _ in range(2000)]
    assert np.mean(draws) == pytest.approx(0.7, abs=0.02)
    assert np.std(draws) < 0.05


class Answers:
    """Open-ended: an answer is a number, a proposal moves it at random, its score is how near it is to 1."""

    def __init__(self, step: float) -> None:
        self._step = step

    def info(self, answer: float) -> NodeInfo:
        return NodeInfo(OPEN_ENDED, max(0.0, 1.0 - abs(1.0 - answer)))

    def outcome(self, answer: float, action: int, seed: int) -> tuple[float, Outcome]:
        after = answer + np.random.default_rng(seed).uniform(-self._step, self._step)
        return after, Outcome(0.0, self.info(after))


def run(model: Answers, seed: int, **settings: object):
    search = make_search(
        config(**{"algorithm": "ab_mcts", "simulations": 100, "wave": 4, "backup": "best", **settings}),
        model.info(0.0),
        seed,
    )
    states, proposals = {0: 0.0}, dict[int, int]()
    while not search.done:
        for trial in search.ask(4):
            assert trial.action == proposals.get(trial.source, 0)  # each trial is one more proposal
            proposals[trial.source] = trial.action + 1
            states[trial.trial_id], told = model.outcome(states[trial.source], trial.action, trial.seed)
            search.tell(trial.trial_id, told)
    return search


@pytest.mark.parametrize("prior", ["normal", "beta"])
def test_it_goes_deeper_where_steps_are_small_and_finds_what_proposals_alone_cannot(prior: str) -> None:
    search = run(Answers(0.3), 0, score_prior=prior)
    best = max(search.tree.raw_value)
    assert best > 0.5  # a proposal from the root reaches 0.3 at most
    assert max(search.tree.depth) >= 3
    assert search.root_value() == pytest.approx(best)


def test_it_goes_wider_where_a_child_tells_nothing_about_its_children() -> None:
    wide = run(Answers(0.0), 0)
    deep = run(Answers(0.3), 0)
    assert len(search_children(wide)) > len(search_children(deep))


def search_children(search) -> list[int]:
    return [child for child in search.tree.children[0] if child >= 0]


def test_a_seed_gives_one_tree() -> None:
    assert run(Answers(0.3), 5).tree.value == run(Answers(0.3), 5).tree.value
    assert run(Answers(0.3), 5).tree.value != run(Answers(0.3), 6).tree.value


def test_listed_actions_are_generated_in_the_order_of_their_priors() -> None:
    world = World(derive_seed("listed") % 1000, stochastic=False)
    search = make_search(config(algorithm="ab_mcts"), NodeInfo(3, prior=(0.2, 0.5, 0.3)), 0)
    firsts = [trial.action for trial in search.ask(3)]
    assert firsts == [1, 2, 0]
    assert world.info(0).num_actions >= 1


def test_a_score_outside_the_beta_priors_range_is_refused_before_anything_changes() -> None:
    search = make_search(config(algorithm="ab_mcts", score_prior="beta", wave=1), NodeInfo(OPEN_ENDED), 0)
    [trial] = search.ask(1)
    with pytest.raises(SearchError, match="from 0 to 1"):
        search.tell(trial.trial_id, Outcome(0.0, NodeInfo(OPEN_ENDED, 1.5)))
    assert len(search.tree) == 1
    assert search.tell(trial.trial_id, Outcome(0.0, NodeInfo(OPEN_ENDED, 0.5)))[0].is_new


def test_failed_proposals_leave_the_search_going() -> None:
    world = World(1, open_share=1.0, stochastic=False, end_share=0.0)
    search = make_search(config(algorithm="ab_mcts", max_retries=0), NodeInfo(OPEN_ENDED), 0)
    drive(
        search,
        world,
        workers=3,
        order=random.Random(0),
        fails=lambda trial: FINAL if trial.trial_id % 3 == 0 else None,
    )
    stats = search.stats()
    assert stats["given_up"] == 20
    assert stats["simulations"] == 40


def test_who_learns_from_a_score() -> None:
    """The last edge of a new answer is GEN's; those above it went on, and so is every edge of an old one."""
    tree = Tree()
    make_root(tree, NodeInfo(OPEN_ENDED))
    algorithm = AdaptiveBranching(tree, SingleOutcome(), MoveRule(), "normal")
    edges = []
    for node in (0, 1):
        edges.append(tree.add_edge(node, tree.add_action(node)))
        Attacher(tree, 1.0).attach(edges[-1], Outcome(0.0, NodeInfo(OPEN_ENDED)), node + 1)

    def seen(table: dict[int, Posterior]) -> dict[int, tuple[int, float]]:
        return {row: (posterior.n, posterior.mean) for row, posterior in table.items()}

    algorithm.observe(edges, [0.2, 0.8], is_new=True)
    assert seen(algorithm._generate) == {1: (1, 0.8)}
    assert seen(algorithm._go_on) == {0: (1, 0.2)}
    assert seen(algorithm._child) == {edges[0]: (1, 0.2)}
    algorithm.observe(edges, [0.4, 0.6], is_new=False)
    assert seen(algorithm._generate) == {1: (1, 0.8)}
    assert seen(algorithm._go_on) == {0: (2, pytest.approx(0.3)), 1: (1, 0.6)}
    assert seen(algorithm._child) == {edges[0]: (2, pytest.approx(0.3)), edges[1]: (1, 0.6)}
