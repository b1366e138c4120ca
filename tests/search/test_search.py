"""The state machine: waves, retries, failures, free running, re-rooting, seeds, proofs."""

from __future__ import annotations

import numpy as np
import pytest
from random_worlds import FINAL, PASSING, config
from trees import one_node

from rollout.errors import SearchError
from rollout.search.base import NodeInfo, Outcome
from rollout.search.decide import MoveRule, sample_action, tempered
from rollout.search.factory import make_search
from rollout.search.seeds import branch_seed
from rollout.search.tree import LOST, PROVEN
from rollout.types import Failure


def leaf(value: float = 0.0, **more: object) -> Outcome:
    return Outcome(0.0, NodeInfo(2, value), **more)


def test_a_wave_is_taken_in_as_a_whole_in_the_order_of_asking() -> None:
    search = make_search(config(wave=3), NodeInfo(4), 0)
    first = search.ask(2)
    assert search.tell(first[1].trial_id, leaf()) == ()
    rest = search.ask(5)
    assert len(first + rest) == 3
    assert search.ask(5) == []
    assert search.tell(rest[0].trial_id, leaf()) == ()
    commits = search.tell(first[0].trial_id, leaf())
    assert [c.trial_id for c in commits] == [t.trial_id for t in first + rest]
    assert [c.node_id for c in commits] == [1, 2, 3]
    assert all(c.is_new for c in commits)


def test_free_running_takes_each_outcome_in_at_once_and_keeps_the_wave_full() -> None:
    search = make_search(config(wave=3, deterministic=False), NodeInfo(4), 0)
    trials = search.ask(10)
    assert len(trials) == 3
    assert search.tell(trials[2].trial_id, leaf())[0].node_id == 1
    assert len(search.ask(10)) == 1
    assert search.tell(trials[0].trial_id, leaf())[0].node_id == 2


def test_trials_name_the_trial_whose_state_they_begin_from() -> None:
    search = make_search(config(wave=1, simulations=8, algorithm="revision"), NodeInfo(1), 0)
    sources = []
    while not search.done:
        [trial] = search.ask(1)
        sources.append(trial.source)
        assert trial.depth == len(sources)
        search.tell(trial.trial_id, Outcome(0.0, NodeInfo(1)))
    assert sources == list(range(8))


def test_when_all_depends_on_trials_in_flight_fewer_are_asked_for() -> None:
    for deterministic in (True, False):
        search = make_search(config(wave=8, deterministic=deterministic), NodeInfo(2), 0)
        trials = search.ask(8)
        assert sorted(trial.action for trial in trials) == [0, 1]
        assert search.ask(8) == []
        assert not search.done


@pytest.mark.parametrize("advances", [False, True])
def test_the_end_of_the_budget_closes_all_nodes_unless_the_tree_is_gone_on_with(advances: bool) -> None:
    search = make_search(config(wave=1, simulations=2), NodeInfo(4), 0)
    [trial] = search.ask(1)
    assert not search.closes(0, advances=advances)
    search.tell(trial.trial_id, leaf())
    search.ask(1)
    assert search.closes(0, advances=advances) is not advances


def test_a_node_is_closed_by_the_last_of_its_actions_in_flight() -> None:
    search = make_search(config(wave=2, simulations=9), NodeInfo(3), 0)
    for trial in search.ask(2):
        assert not search.closes(0, advances=True)
        search.tell(trial.trial_id, Outcome(0.0, NodeInfo(0), terminated=True))
    [last] = search.ask(1)
    assert (last.source, search.closes(0, advances=True)) == (0, True)


def test_a_retry_has_the_same_seed_and_a_new_number() -> None:
    search = make_search(config(wave=1, max_retries=1), NodeInfo(2), 0)
    [first] = search.ask(1)
    [commit] = search.tell(first.trial_id, PASSING)
    assert (commit.node_id, commit.is_new) == (None, False)
    [second] = search.ask(1)
    assert (second.seed, second.action, second.source) == (first.seed, first.action, first.source)
    assert second.trial_id != first.trial_id
    assert search.tell(first.trial_id, leaf()) == ()  # late news of an attempt that was given up
    search.tell(second.trial_id, PASSING)
    [third] = search.ask(1)
    assert third.action != first.action
    stats = search.stats()
    assert (stats["failures"], stats["retries"], stats["given_up"]) == (2, 1, 1)


@pytest.mark.parametrize("deterministic", [True, False])
def test_when_every_branch_at_the_root_fails_the_search_ends_and_says_so(deterministic: bool) -> None:
    search = make_search(config(wave=4, deterministic=deterministic), NodeInfo(3), 0)
    while not search.done:
        for trial in search.ask(4):
            search.tell(trial.trial_id, FINAL)
    assert search.stats()["given_up"] == 3
    assert not any(search.tree.in_flight)
    with pytest.raises(SearchError, match="all failed"):
        search.best()
    assert search.policy_target() == pytest.approx([1 / 3] * 3)


def test_a_state_whose_actions_all_failed_stays_a_leaf_that_is_bootstrapped() -> None:
    search = make_search(config(wave=1, simulations=40, exploration=0.1), NodeInfo(2), 0)
    while not search.done:
        for trial in search.ask(1):
            told = leaf(1.0 if trial.action == 0 else -1.0) if trial.depth == 1 else FINAL
            search.tell(trial.trial_id, told)
    tree = search.tree
    good = tree.children[0][0]
    assert tree.visits[good] == tree.evaluations[good] > 10
    assert tree.value[good] == 1.0
    assert search.best() == 0


def test_a_chance_action_that_failed_for_good_keeps_the_outcomes_that_it_has() -> None:
    settings = config(wave=1, simulations=50, outcomes="widening", outcome_k=1, outcome_alpha=1.0)
    search = make_search(settings, NodeInfo(1), 0)
    draws = 0
    while not search.done:
        for trial in search.ask(1):
            draws += trial.depth == 1
            told = Outcome(0.0, NodeInfo(1, 1.0, state_hash="A")) if trial.depth > 1 or draws < 5 else FINAL
            search.tell(trial.trial_id, told)
    tree = search.tree
    assert tree.outcome_draws[0] == 4
    assert tree.edge_draws[0] == 5  # no branch was asked for after the failure
    assert tree.visits[0] == 1 + 49


def test_terminal_and_truncated_leaves_differ() -> None:
    def run(outcome: Outcome) -> object:
        search = make_search(config(wave=1, simulations=10, discount=0.5), NodeInfo(1), 0)
        while not search.done:
            for trial in search.ask(1):
                search.tell(trial.trial_id, outcome)
        return search

    info = NodeInfo(3, value=8.0)
    terminal = run(Outcome(1.0, info, terminated=True))
    truncated = run(Outcome(1.0, info, truncated=True))
    assert terminal.stats()["trials"] == truncated.stats()["trials"] == 1  # neither is expanded
    assert terminal.tree.edge_value[0] == 1.0
    assert truncated.tree.edge_value[0] == 1.0 + 0.5 * 8.0
    assert terminal.tree.discount[1] == 0.0
    assert truncated.tree.discount[1] == 0.5
    both = run(Outcome(1.0, info, terminated=True, truncated=True))
    assert both.tree.edge_value[0] == 1.0


def test_siblings_share_random_numbers_only_when_told_to() -> None:
    def seeds(common: bool) -> set[int]:
        search = make_search(config(wave=4, common_random_numbers=common), NodeInfo(4), 0)
        return {trial.seed for trial in search.ask(4)}

    assert len(seeds(True)) == 1
    assert len(seeds(False)) == 4


def test_seeds_differ_by_search_node_action_and_draw() -> None:
    seen = {branch_seed(s, n, a, d) for s in (0, 1) for n in range(30) for a in range(10) for d in range(10)}
    assert len(seen) == 2 * 30 * 10 * 10
    assert all(0 <= seed < 1 << 63 for seed in seen)
    bits = np.array([[(seed >> bit) & 1 for bit in range(63)] for seed in seen])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.04  # six standard deviations


def test_seeds_change_when_the_root_moves() -> None:
    search = make_search(config(wave=1, simulations=20), NodeInfo(1), 0)
    seeds = set()
    for move in range(3):
        while not search.done:
            for trial in search.ask(1):
                assert trial.seed not in seeds
                seeds.add(trial.seed)
                search.tell(trial.trial_id, Outcome(0.0, NodeInfo(1, state_hash=str(trial.depth + move))))
        assert search.advance(0, str(1 + move), seed=move + 1)


def test_advancing_needs_the_state_that_was_really_reached() -> None:
    search = make_search(config(wave=1, simulations=10), NodeInfo(1), 0)
    [trial] = search.ask(1)
    with pytest.raises(SearchError, match="in flight"):
        search.advance(0, "A", 1)
    search.tell(trial.trial_id, Outcome(0.0, NodeInfo(1, state_hash="A")))
    assert not search.advance(0, "B", 1)
    assert not search.advance(0, None, 1)
    assert not search.advance(3, "A", 1)
    assert search.advance(0, "A", 1)
    assert search.tree.trial[0] == 0
    [trial] = search.ask(1)
    assert (trial.source, trial.depth, trial.trial_id) == (0, 1, 2)


def test_a_terminal_state_cannot_be_the_root() -> None:
    search = make_search(config(wave=1, simulations=10), NodeInfo(1), 0)
    [trial] = search.ask(1)
    search.tell(trial.trial_id, Outcome(0.0, NodeInfo(1, state_hash="A"), terminated=True))
    assert not search.advance(0, "A", 1)


def drive_to_end(search) -> None:
    while not search.done:
        for trial in search.ask(2):
            search.tell(trial.trial_id, Outcome(0.1, NodeInfo(1, state_hash=str(trial.depth))))


def test_proofs_end_a_search_that_is_solved() -> None:
    """Action 1 wins at once: nothing else needs to be tried."""
    search = make_search(config(proofs=True, return_bounds=(-1, 1), wave=1), NodeInfo(3), 0)
    while not search.done:
        for trial in search.ask(1):
            is_win = trial.action == 1
            search.tell(trial.trial_id, Outcome(float(is_win), NodeInfo(3), terminated=is_win, proven=is_win))
    assert search.tree.flags[0] & PROVEN
    assert search.root_value() == 1.0
    assert search.stats()["trials"] <= 3
    assert search.best() == 1


def test_an_action_that_is_proven_lost_is_avoided() -> None:
    search = make_search(config(proofs=True, return_bounds=(-1, 1), wave=1, simulations=50), NodeInfo(2), 0)
    while not search.done:
        for trial in search.ask(1):
            lost = trial.depth == 1 and trial.action == 0
            search.tell(trial.trial_id, Outcome(-1.0 if lost else 0.0, NodeInfo(2, -0.9), lost, proven=lost))
    tree = search.tree
    assert tree.edge_state[tree.edge(0, 0)] == LOST
    assert search.action_visits()[0] == 1
    assert search.best() == 1
    assert search.root_value() < 0


def test_a_drawn_move_is_no_proven_loss() -> None:
    """Nine in ten of the visits went to action 0 before it turned out to be lost."""
    tree = one_node([0.5, 0.5], [9, 1], [0.0, 0.0])
    moves = {MoveRule(temperature=1.0).choose(tree, seed) for seed in range(50)}
    assert moves == {0, 1}
    tree.set_state(tree.edge(0, 0), LOST)
    assert {MoveRule(temperature=1.0).choose(tree, seed) for seed in range(50)} == {1}
    tree.set_state(tree.edge(0, 1), LOST)
    assert {MoveRule(temperature=1.0).choose(tree, seed) for seed in range(50)} == {0, 1}


def test_without_bounds_only_complete_knowledge_proves() -> None:
    search = make_search(config(proofs=True, wave=1, simulations=50), NodeInfo(2), 0)
    while not search.done:
        for trial in search.ask(1):
            search.tell(
                trial.trial_id, Outcome(float(trial.action), NodeInfo(2), terminated=True, proven=True)
            )
    assert search.stats()["trials"] == 2
    assert search.root_value() == 1.0


def test_temperature_draws_the_move_from_the_visits() -> None:
    assert tempered([1, 3], 1.0) == pytest.approx([0.25, 0.75])
    assert tempered([1, 3], 0.5) == pytest.approx([0.1, 0.9])
    assert tempered([2, 3, 3], 0.0) == pytest.approx([0.0, 0.5, 0.5])
    assert tempered([0, 10**6], 1e-3) == pytest.approx([0.0, 1.0])
    assert tempered([0, 0], 1.0) == pytest.approx([0.5, 0.5])
    rng = np.random.default_rng(0)
    drawn = [sample_action([1, 3], 1.0, rng) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(0.75, abs=0.03)
    moves = set()
    for seed in range(30):
        search = make_search(config(temperature=1.0, simulations=20), NodeInfo(4), seed)
        drive_to_end(search)
        assert search.best() == search.best()
        moves.add(search.best())
    assert len(moves) > 1


def test_root_noise_changes_the_priors_of_the_root_alone() -> None:
    search = make_search(
        config(algorithm="puct", dirichlet_fraction=0.25, wave=1),
        NodeInfo(4, mask=(True, True, False, True)),
        3,
    )
    drive_to_end(search)
    priors = list(search.tree.node_priors(0))
    assert sum(priors) == pytest.approx(1.0)
    assert priors[2] == 0.0
    assert all(p >= 0.75 / 3 for p in (priors[0], priors[1], priors[3]))
    assert len(set(priors)) == 4
    assert all(list(search.tree.node_priors(node)) == [1.0] for node in range(1, len(search.tree)))


def test_ties_are_broken_by_the_seed_and_not_by_the_order_of_actions() -> None:
    found = set()
    for seed in range(30):
        search = make_search(config(simulations=4, wave=1), NodeInfo(4), seed)
        while not search.done:
            for trial in search.ask(1):
                search.tell(trial.trial_id, Outcome(0.0, NodeInfo(4)))
        found.add(search.best())
    assert found == {0, 1, 2, 3}


def test_the_budget_counts_branches_that_were_given_up() -> None:
    gone = Failure("gone", "guest", retryable=False)
    search = make_search(config(simulations=10, wave=1), NodeInfo(8), 0)
    while not search.done:
        for trial in search.ask(1):
            search.tell(trial.trial_id, gone if trial.trial_id % 2 else leaf())
    stats = search.stats()
    assert (stats["simulations"], stats["given_up"]) == (5, 5)
