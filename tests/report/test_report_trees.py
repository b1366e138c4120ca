"""What of a run's moves and trees is shown, and what is left out and counted."""

from pathlib import Path

import pyarrow as pa
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from made_runs import played, write_run

from rollout.report.sections import cuts_text
from rollout.report.summary import RunSummary, summarise
from rollout.report.trees import DrawnTree, Limits, draw_tree, read_details, read_moves
from rollout.types import Failure


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunSummary:
    returns = [0.5, 0.1, 0.9, 0.4, 0.6, 0.3]
    episodes = [played("run", i, return_=value, length=3, simulations=20) for i, value in enumerate(returns)]
    return summarise(write_run(tmp_path_factory.mktemp("trees") / "run", episodes))


def check_tree(tree: DrawnTree) -> None:
    columns = (
        tree.node_id,
        tree.parent,
        tree.action,
        tree.visits,
        tree.value,
        tree.prior,
        tree.reward,
        tree.mark,
    )
    assert len({len(column) for column in columns}) == 1
    assert len(set(tree.node_id)) == len(tree.node_id)
    if tree.parent:
        assert tree.parent[0] == -1
    assert all(0 <= parent < at for at, parent in enumerate(tree.parent) if at)


def test_small_runs_are_shown_whole(run: RunSummary) -> None:
    details = read_details(run)
    assert [d.episode.number for d in details] == [1, 2, 3, 4, 5, 6]
    for detail in details:
        assert [move.t for move in detail.moves] == [0, 1, 2, 3]
        for move in detail.moves[:-1]:
            assert move.tree is not None
            check_tree(move.tree)
            assert move.tree.num_nodes == len(move.tree.node_id) == 21
            assert move.node_id in move.tree.node_id
            assert move.played is not None
            assert move.choices[move.played][1] == max(count for _, count, _ in move.choices)
            assert move.choices[move.played][0] == move.action
        assert detail.moves[-1].action is None
        assert detail.moves[-1].tree is None
    assert cuts_text(run, details) == "6 of 6 episodes, with the trees of 18 of their 18 searched moves."


def test_the_best_the_worst_and_the_median_come_first(run: RunSummary) -> None:
    details = read_details(run, Limits(max_episodes=3))
    assert [d.episode.return_ for d in details] == [0.1, 0.9, 0.4]
    assert cuts_text(run, details).startswith("3 of 6 episodes")


def test_moves_and_nodes_have_budgets(run: RunSummary) -> None:
    by_moves = read_details(run, Limits(max_moves=7))
    assert sum(d.episode.length for d in by_moves) == 6
    by_nodes = read_details(run, Limits(max_nodes=50))
    assert sum(m.tree is not None for d in by_nodes for m in d.moves) == 2
    by_reading = read_details(run, Limits(max_nodes_read=1))
    assert sum(m.tree is not None for d in by_reading for m in d.moves) == 1  # one tree is always there
    assert len(by_nodes) == len(by_reading) == 6


def test_a_large_tree_keeps_its_most_visited_nodes(run: RunSummary) -> None:
    whole = read_details(run)[0].moves[0].tree
    cut = read_details(run, Limits(max_tree_nodes=8))[0].moves[0].tree
    assert whole is not None
    assert cut is not None
    check_tree(cut)
    assert cut.num_nodes == 21
    assert cut.visits == whole.visits[:8]
    assert min(cut.visits) >= max(whole.visits[8:])
    details = read_details(run, Limits(max_tree_nodes=8))
    assert cuts_text(run, details).endswith("; 18 large trees are cut to their most visited nodes.")


def node_table(parents: list[int | None], visits: list[int]) -> pa.Table:
    count = len(parents)
    failure = pa.struct([("cause", pa.string()), ("boundary", pa.string()), ("retryable", pa.bool_())])
    return pa.table(
        {
            "node_id": pa.array(range(count), pa.int64()),
            "parent_id": pa.array(parents, pa.int64()),
            "depth": pa.array([0] * count, pa.int64()),
            "action": pa.array([0] * count, pa.int64()),
            "visits": pa.array(visits, pa.int64()),
            "value": pa.array([float("nan")] * count, pa.float64()),
            "prior": pa.nulls(count, pa.float64()),
            "reward": pa.nulls(count, pa.float64()),
            "terminated": pa.array([False] * count),
            "truncated": pa.array([False] * count),
            "failure": pa.nulls(count, failure),
        }
    )


@given(st.data())
def test_any_table_of_nodes_gives_a_tree(data: st.DataObject) -> None:
    """Also one that is no tree: orphans, rings and children with more visits than their parents."""
    count = data.draw(st.integers(0, 20))
    parents = data.draw(st.lists(st.none() | st.integers(0, 25), min_size=count, max_size=count))
    visits = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    tree = draw_tree(node_table(parents, visits), data.draw(st.integers(1, 25)))
    check_tree(tree)
    assert all(value is None for value in tree.value)  # JSON has no NaN


def test_a_failed_episode_shows_the_steps_that_it_has(tmp_path: Path) -> None:
    failure = Failure("the guest did not answer", "guest", True)
    summary = summarise(write_run(tmp_path / "run", [played("run", 0, length=2, failure=failure)]))
    (detail,) = read_details(summary)
    assert [move.t for move in detail.moves] == [0, 1]


def test_text_observations_keep_their_lines(tmp_path: Path) -> None:
    episode = played("run", 0, length=1, observations=["SF\nHG", "\x1b[31m"])
    folder = write_run(tmp_path / "run", [episode], observation_space=spaces.Text(100))
    (moves,) = read_moves(folder, [episode.episode.episode_id]).values()
    assert [move.observation for move in moves] == ["SF\nHG", "\\x1b[31m"]


def test_no_episode_has_no_moves(run: RunSummary) -> None:
    assert read_moves(run.files.folder, []) == {}
    assert read_moves(run.files.folder, ["nobody"]) == {}
