"""The tree itself: its columns, open-ended states, JSON, and memory."""

from __future__ import annotations

import gc
import json
import tracemalloc

import pytest
from random_worlds import config

from rollout.errors import SearchError
from rollout.search.attach import Attacher, make_root
from rollout.search.backward import MeanBackward
from rollout.search.base import NodeInfo, Outcome
from rollout.search.factory import make_search
from rollout.search.tree import ILLEGAL, UNTRIED, Tree
from rollout.search.tree_json import tree_from_json, tree_to_json


def grown(num_nodes: int, num_actions: int) -> Tree:
    search = make_search(config(simulations=num_nodes, wave=1), NodeInfo(num_actions), 0)
    while not search.done:
        for trial in search.ask(1):
            search.tell(
                trial.trial_id, Outcome(0.37 * trial.action, NodeInfo(num_actions, trial.seed / 2**63))
            )
    return search.tree


def test_columns_say_how_each_node_was_reached() -> None:
    tree = Tree()
    make_root(tree, NodeInfo(3, prior=(0.2, 0.3, 0.5)))
    attacher = Attacher(tree, 0.9)
    edge = tree.add_edge(0, 2)
    attacher.attach(edge, Outcome(1.5, NodeInfo(2, state_hash="A")), 1)
    attacher.attach(edge, Outcome(0.0, NodeInfo(2, state_hash="B"), terminated=True), 2)
    assert list(tree.parent) == [-1, 0, 0]
    assert list(tree.action) == [-1, 2, 2]
    assert list(tree.prior) == [1.0, 0.5, 0.5]
    assert list(tree.reward) == [0.0, 1.5, 0.0]
    assert list(tree.discount) == [1.0, 0.9, 0.0]
    assert list(tree.depth) == [0, 1, 1]
    assert list(tree.trial) == [0, 1, 2]
    assert tree.children[0] == [-1, -1, 2]
    assert tree.children[1] == [-1, -1]
    assert tree.children[0:2] == [[-1, -1, 2], [-1, -1]]
    assert tree.parent[-1] == 0
    with pytest.raises(IndexError):
        tree.parent[3]


def test_a_mask_closes_actions() -> None:
    tree = Tree()
    tree.add_node(3, mask=[True, False, True])
    assert list(tree.edges(0)) == [UNTRIED, ILLEGAL, UNTRIED]
    assert list(tree.node_priors(0)) == [0.5, 0.0, 0.5]


def test_open_ended_states_grow_between_others() -> None:
    tree = Tree()
    nodes = [tree.add_node(0, open_ended=True) for _ in range(3)]
    expected: dict[int, list[int]] = {node: [] for node in nodes}
    for turn in range(40):
        node = nodes[turn * turn % 3]
        assert tree.add_action(node) == len(expected[node])
        expected[node].append(tree.add_edge(node, len(expected[node])))
    for node in nodes:
        assert list(tree.edges(node)) == expected[node]
        assert list(tree.node_priors(node)) == pytest.approx(
            [1 / len(expected[node])] * len(expected[node]) if expected[node] else []
        )
    assert len(tree.slots) <= 4 * 40


def test_json_is_readable_and_exact() -> None:
    tree = grown(200, 3)
    text = tree_to_json(tree)
    assert vars(tree_from_json(text)) == vars(tree)
    data = json.loads(text)
    assert data["visits"][0] == 201
    assert sum(data["edge_visits"][edge] for edge in tree.edges(0)) == 200


def test_json_of_the_first_version_can_be_read() -> None:
    tree = grown(200, 3)
    idle = {"in_flight": [0] * 201, "edge_in_flight": [0] * 200}
    first = {**json.loads(tree_to_json(tree)), "version": 1, **idle}
    assert vars(tree_from_json(json.dumps(first))) == vars(tree)


def broken(**changes: object) -> str:
    return json.dumps({**json.loads(tree_to_json(grown(10, 2))), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ("{}", "version None"),
        (broken(version=3), "version 3"),
        (broken(visits=None), "no column 'visits'"),
        (broken(visits=[1]), "equal lengths"),
        (broken(visits=["many"] * 11), "column 'visits'"),
        (broken(value=[float("nan")] * 11), "not finite"),
        (broken(raw_value=[float("inf")] * 11), "not finite"),
        (broken(depth=[2**40] * 11), "column 'depth'"),
        (broken(slots=[99] * 12, priors=[0.5] * 12), "column 'slots'"),
        (broken(outcome_node=[-1] * 10), "column 'outcome_node'"),
        (broken(outcome_next=list(range(10))), "circle"),
        (broken(first_slot=[1000] * 11), "slots of node"),
        (broken(flags=[256] * 11), "column 'flags'"),
        (broken(edge_action=[1] * 10), "not in the slot"),
    ],
)
def test_json_that_is_no_tree_is_refused(text: str, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        tree_from_json(text)


def test_a_tree_in_flight_is_not_written() -> None:
    search = make_search(config(), NodeInfo(2), 0)
    search.ask(1)
    with pytest.raises(SearchError, match="in flight"):
        tree_to_json(search.tree)


def test_a_node_with_sixteen_actions_takes_at_most_600_bytes() -> None:
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tree = Tree()
    make_root(tree, NodeInfo(16))
    attacher, backward = Attacher(tree, 1.0), MeanBackward()
    prior = tuple((a + 1) / 136 for a in range(16))
    for node in range(5000):
        parent, action = divmod(node, 16)
        edge = tree.add_edge(parent, action)
        outcome = attacher.attach(edge, Outcome(0.1 * node, NodeInfo(16, node / 7, prior)), node + 1)
        backward(tree, [edge], [outcome], tree.outcome_node[outcome], node / 7)
    gc.collect()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert used / len(tree) <= 600
