"""Root-parallel ensembles: sums at the root, moving it, and what one member has proven."""

from __future__ import annotations

import random

import pytest
from random_worlds import World, config, drive, trees_of

from rollout.errors import SearchError
from rollout.search.base import NodeInfo, Outcome
from rollout.search.ensemble import Ensemble
from rollout.search.factory import make_search
from rollout.search.tree import PROVEN


def drive_to_end(search) -> None:
    while not search.done:
        for trial in search.ask(2):
            search.tell(trial.trial_id, Outcome(0.1, NodeInfo(1, state_hash=str(trial.depth))))


def test_an_ensemble_adds_its_members_up() -> None:
    world = World(4)
    settings = config(ensemble=3, simulations=100, wave=6, outcomes="widening")
    search = make_search(settings, world.info(0), 7)
    assert isinstance(search, Ensemble)
    commits = drive(search, world, workers=6, order=random.Random(0))
    members = [member.tree for member in search._members]
    assert sum(search.action_visits()) == search.stats()["simulations"] == 100
    assert [tree.visits[0] - 1 for tree in members] == [34, 33, 33]
    tree = search.tree
    assert tree.visits[0] == 103
    assert len(tree) == 1 + sum(commit.is_new for commit in commits)
    made = {commit.node_id: commit.trial_id for commit in commits if commit.is_new}
    assert [made[node] for node in range(1, len(tree))] == tree.trial[1:]
    assert len({tuple(member.value) for member in members}) == 3  # they differ in their seeds
    for node in range(1, len(tree)):
        parent = tree.parent[node]
        assert parent < node
        assert tree.depth[node] == tree.depth[parent] + 1
        assert parent == 0 or tree.children[parent][tree.action[node]] > parent
    assert all(child > 0 for child, n in zip(tree.children[0], tree.action_visits(0), strict=True) if n)
    assert search.root_value() == pytest.approx(tree.value[0])
    assert sum(search.policy_target()) == pytest.approx(1.0)
    with pytest.raises(SearchError, match="never asked"):
        search.tell(10_000, Outcome(0.0, NodeInfo(2)))


def test_an_ensemble_advances_all_members_or_none() -> None:
    search = make_search(config(ensemble=2, simulations=20, wave=2), NodeInfo(1), 7)
    drive_to_end(search)
    assert not search.advance(0, "elsewhere", 8)
    kept = set(search.tree.trial)
    assert search.advance(0, "1", 8)
    assert search.tree.visits[0] > 2
    assert set(search.tree.trial) < kept | {0}
    drive_to_end(search)
    assert search.stats()["simulations"] == 20


def test_an_ensemble_plays_what_one_member_has_proven() -> None:
    """Action 1 looks best, action 2 wins, and only the first member finds that out."""
    settings = config(ensemble=2, proofs=True, return_bounds=(-1, 1), wave=2, simulations=24)
    search = make_search(settings, NodeInfo(3), 0)
    assert isinstance(search, Ensemble)
    while not search.done:
        for trial in search.ask(1):
            member, _ = search._trials[trial.trial_id - 1]
            wins = trial.action == 2 and trial.depth == 1 and member == 0
            value = 0.9 if trial.action == 1 else -0.9
            search.tell(trial.trial_id, Outcome(float(wins), NodeInfo(3, value), wins, proven=wins))
    assert not trees_of(search)[1].flags[0] & PROVEN
    assert max(range(3), key=search.action_visits().__getitem__) == 1
    assert search.best() == 2


def test_an_ensemble_draws_no_move_that_one_member_has_proven_lost() -> None:
    settings = config(ensemble=2, proofs=True, return_bounds=(-1, 1), wave=2, simulations=24, temperature=1.0)
    for seed in range(10):
        search = make_search(settings, NodeInfo(2), seed)
        assert isinstance(search, Ensemble)
        while not search.done:
            for trial in search.ask(1):
                member, _ = search._trials[trial.trial_id - 1]
                lost = trial.action == 0 and trial.depth == 1 and member == 0
                value = 0.9 if trial.action == 0 else -0.9
                search.tell(
                    trial.trial_id,
                    Outcome(-float(lost), NodeInfo(2, 0.0 if lost else value), lost, proven=lost),
                )
        assert search.best() == 1
