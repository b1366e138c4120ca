"""What a search refuses: each is a typed error, and changes nothing."""

from __future__ import annotations

from math import inf, nan

import pytest
from pydantic import ValidationError
from random_worlds import ALGORITHMS, config

from rollout.config import load_config
from rollout.errors import ConfigError, SearchError
from rollout.search.base import NodeInfo, Outcome
from rollout.search.factory import make_search
from rollout.search.tree_json import tree_to_json

OK = NodeInfo(2)


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (Outcome(nan, OK), "reward must be finite"),
        (Outcome(inf, OK), "reward must be finite"),
        (Outcome(-1e200, OK), "reward must be finite"),
        (Outcome(nan, OK, terminated=True), "reward must be finite"),
        (Outcome(0.0, NodeInfo(2, nan)), "value must be finite"),
        (Outcome(0.0, NodeInfo(2, -inf), truncated=True), "value must be finite"),
        (Outcome(0.0, NodeInfo(0)), "at least one action"),
        (Outcome(0.0, NodeInfo(-2)), "at least one action"),
        (Outcome(0.0, NodeInfo(2, prior=(0.5, 0.6))), "sum to 1"),
        (Outcome(0.0, NodeInfo(2, prior=(0.0, 0.0))), "sum to 1"),
        (Outcome(0.0, NodeInfo(2, prior=(nan, 1.0))), "probability"),
        (Outcome(0.0, NodeInfo(2, prior=(-0.5, 1.5))), "probability"),
        (Outcome(0.0, NodeInfo(2, prior=(1.0,))), "1 priors for 2 actions"),
        (Outcome(0.0, NodeInfo(2, mask=(False, False))), "forbids every action"),
        (Outcome(0.0, NodeInfo(2, mask=(True,))), "mask of 1 entries"),
        (Outcome(0.0, NodeInfo(2, prior=(0.5, 0.5), mask=(True, False))), "forbids has a prior"),
        (Outcome(0.0, OK, discount=nan), "discount"),
        (Outcome(0.0, OK, discount=1.5), "discount"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_outcome_that_cannot_be_accepted(algorithm: str, outcome: Outcome, message: str) -> None:
    search = make_search(config(algorithm=algorithm, wave=1), OK, 0)
    [trial] = search.ask(1)
    with pytest.raises(SearchError, match=message):
        search.tell(trial.trial_id, outcome)
    assert len(search.tree) == 1
    [commit] = search.tell(trial.trial_id, Outcome(1.0, OK))  # it is still in flight
    assert commit.is_new
    assert search.root_value() == search.root_value()


def test_what_is_refused_leaves_the_tree_as_it_was() -> None:
    search = make_search(config(wave=1, simulations=5), OK, 0)
    while not search.done:
        [trial] = search.ask(1)
        with pytest.raises(SearchError):
            search.tell(trial.trial_id, Outcome(nan, OK))
        search.tell(trial.trial_id, Outcome(1.0, OK))
    clean = make_search(config(wave=1, simulations=5), OK, 0)
    while not clean.done:
        [trial] = clean.ask(1)
        clean.tell(trial.trial_id, Outcome(1.0, OK))
    assert tree_to_json(search.tree) == tree_to_json(clean.tree)


@pytest.mark.parametrize(
    "root", [NodeInfo(0), NodeInfo(2, nan), NodeInfo(2, prior=(0.9, 0.9)), NodeInfo(1, mask=(False,))]
)
def test_a_root_that_cannot_be_searched(root: NodeInfo) -> None:
    with pytest.raises(SearchError):
        make_search(config(), root, 0)


@pytest.mark.parametrize("ensemble", [1, 2])
def test_an_unknown_trial(ensemble: int) -> None:
    search = make_search(config(ensemble=ensemble), OK, 0)
    for trial_id in (-1, 0, 1, 999):
        with pytest.raises(SearchError, match="never asked for"):
            search.tell(trial_id, Outcome(0.0, OK))


def test_a_prior_that_is_nearly_a_distribution_is_scaled_to_one() -> None:
    search = make_search(config(wave=1), NodeInfo(2, prior=(0.3333, 0.6663)), 0)
    assert sum(search.tree.node_priors(0)) == pytest.approx(1.0, abs=1e-15)


def test_huge_rewards_do_not_overflow_into_what_is_no_number() -> None:
    for algorithm in ALGORITHMS:
        search = make_search(config(algorithm=algorithm, simulations=50, wave=2), OK, 0)
        while not search.done:
            for trial in search.ask(2):
                reward = 1e100 if trial.trial_id % 2 else -1e100
                search.tell(trial.trial_id, Outcome(reward, NodeInfo(2, -reward)))
        tree_to_json(search.tree)  # refuses what is not finite
        assert all(p == p for p in search.policy_target())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proofs": True, "outcomes": "widening"}, "proofs need"),
        ({"in_flight": "virtual_loss"}, "virtual_loss needs"),
        ({"return_bounds": (1.0, -1.0)}, "must rise"),
        ({"transpositions": True, "algorithm": "beam"}, "transpositions need"),
        ({"exploration": inf}, "finite"),
        ({"return_bounds": (-inf, 1.0)}, "finite"),
        ({"simulations": 0}, "greater than or equal to 1"),
        ({"algorithm": "mcts"}, "uct"),
    ],
)
def test_settings_that_do_not_fit_together(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**settings)


def test_such_settings_are_one_line_to_the_user(tmp_path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[search]\nproofs = true\noutcomes = "widening"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == "search: proofs need outcomes = 'single': a sampled outcome proves nothing"


def test_playing_at_random_is_no_search() -> None:
    with pytest.raises(ConfigError, match="without a search"):
        make_search(config(algorithm="random"), OK, 0)
