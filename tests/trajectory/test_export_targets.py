"""Candidates, preferences, advantages and paths of small trees, worked out by hand."""

from __future__ import annotations

import math

import pytest

from rollout.trajectory.export.targets import (
    Candidate,
    Node,
    advantages,
    candidates,
    leaf_paths,
    preference_pairs,
)

#        0 (V 0.5)
#      /     |     \
#   1 "a"  2 "b"   3 "c" (failed: no value)
#   /   \     \
#  4 "d" 5 "e"  6 "f"
TREE = {
    node.node_id: node
    for node in (
        Node(0, None, None, 10, 0.5, None),
        Node(1, 0, "a", 5, 0.4, 1.0),
        Node(2, 0, "b", 3, 0.8, None),
        Node(3, 0, "c", 1, None, None),
        Node(4, 1, "d", 2, 0.1, 0.0),
        Node(5, 1, "e", 1, 0.2, 0.0),
        Node(6, 2, "f", 2, 0.9, 0.5),
    )
}


def test_candidates_are_the_roots_children_with_their_action_values() -> None:
    assert candidates(TREE, 0.5, 1) == [Candidate("a", 5, 1.0 + 0.5 * 0.4), Candidate("b", 3, 0.5 * 0.8)]
    assert [candidate.action for candidate in candidates(TREE, 1.0, 4)] == ["a"]
    assert candidates({}, 1.0, 1) == []


def test_pairs_hold_the_margin_and_never_ties() -> None:
    group = [Candidate("a", 1, 0.5), Candidate("b", 9, 0.5), Candidate("c", 4, 0.2), Candidate("d", 2, 0.45)]
    assert [(one.action, other.action) for one, other in preference_pairs(group, 0.0)] == [
        ("b", "c"),
        ("b", "d"),
    ]
    assert [other.action for _, other in preference_pairs(group, 0.1)] == ["c"]
    assert list(preference_pairs(group, 0.4)) == []
    assert list(preference_pairs([], 0.0)) == []
    assert list(preference_pairs(group[:2], 0.0)) == []


def test_advantages_of_a_group() -> None:
    found = advantages([Candidate("a", 1, 1.0), Candidate("b", 1, 0.0), Candidate("c", 1, 0.5)], 0.25)
    deviation = math.sqrt(((0.5**2) * 2) / 3)
    assert found[0].group == pytest.approx(0.5 / deviation)
    assert found[0].leave_one_out == pytest.approx(1.0 - 0.25)
    assert [one.tree for one in found] == [0.75, -0.25, 0.25]
    assert sum(one.group for one in found) == pytest.approx(0.0)
    same = advantages([Candidate("a", 1, 0.3)] * 3, None)
    assert [(one.group, one.tree) for one in same] == [(0.0, None)] * 3


def test_paths_go_from_the_root_to_each_leaf() -> None:
    paths = [[node.action for node in path] for path in leaf_paths(TREE, 1)]
    assert paths == [["a", "d"], ["a", "e"], ["b", "f"]]
    assert [[node.action for node in path] for path in leaf_paths(TREE, 2)] == [["a", "d"], ["b", "f"]]
    assert [[node.action for node in path] for path in leaf_paths(TREE, 3)] == [["a"], ["b"]]
    orphan = {**TREE, 7: Node(7, 99, "g", 5, 0.1, None)}
    assert len(list(leaf_paths(orphan, 1))) == 3
