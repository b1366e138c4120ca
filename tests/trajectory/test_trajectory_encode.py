"""Only whole, finite and well-typed trajectories become columns."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from trajectory_factory import ACTION_SPACE, NODES_PER_MOVE, OBSERVATION_SPACE, length_of, make_trajectory

from rollout.errors import SinkError
from rollout.trajectory.batch import TrajectoryBatch, concat_tables, pack_batch, unpack_batch
from rollout.trajectory.encode import TrajectoryEncoder, info_to_json
from rollout.trajectory.rows import Trajectory, make_episode_id
from rollout.trajectory.schema import TABLES, conform, file_schema
from rollout.types import Failure

ENCODER = TrajectoryEncoder(OBSERVATION_SPACE, ACTION_SPACE)


def encode(*numbers: int) -> TrajectoryBatch:
    return ENCODER.encode([make_trajectory(number) for number in numbers])


def test_a_batch_has_the_rows_in_order() -> None:
    batch = encode(3, 1)
    assert batch.num_steps.tolist() == [length_of(3) + 1, length_of(1) + 1]
    assert batch.num_nodes.tolist() == [length_of(3) * NODES_PER_MOVE, length_of(1) * NODES_PER_MOVE]
    assert batch.steps.column("observation").to_pylist() == [3, 4, 5, 6, 7, 1, 2, 3]
    assert batch.steps.column("reward").to_pylist() == [1, 1, 1, 1, None, 1, 1, None]
    assert batch.episodes.column("started_at").to_pylist()[0].timestamp() == 1_700_000_003.25


def test_dropping_an_episode_drops_its_rows_and_no_others() -> None:
    batch = encode(3, 1, 2)
    rest = batch.without({batch.episode_ids[1], "unknown"})
    assert rest.episode_ids == (batch.episode_ids[0], batch.episode_ids[2])
    expected = encode(3, 2)
    assert all(rest.table(table).equals(expected.table(table)) for table in TABLES)
    assert batch.without({"unknown"}) is batch


def test_packing_is_reversible_and_smaller() -> None:
    batch = encode(*range(50))
    data = pack_batch(batch)
    back = unpack_batch(data, ENCODER.schemas)
    assert all(back.table(table).equals(batch.table(table)) for table in TABLES)
    assert back.num_nodes.tolist() == batch.num_nodes.tolist()
    assert len(data) < batch.num_bytes


@pytest.mark.parametrize("data", [b"", b"garbage" * 9, b"\0" * 7 + b"\x7f", pack_batch(encode(1))[:-3]])
def test_garbage_in_a_record_is_an_error(data: bytes) -> None:
    with pytest.raises(SinkError):
        unpack_batch(data, ENCODER.schemas)


def test_file_tables_say_where_rows_belong() -> None:
    batch = encode(0, 4)
    schema = ENCODER.schemas["nodes"]
    table = concat_tables([batch], "nodes", "run-1", schema)
    assert table.schema.equals(file_schema("nodes", schema))
    assert set(table["run_id"].to_pylist()) == {"run-1"}
    assert table["tree_id"].to_pylist()[-1] == f"{batch.episode_ids[1]}/{length_of(4) - 1}"
    assert [row.as_py() for row in table["episode_id"]] == [
        *[batch.episode_ids[0]] * NODES_PER_MOVE,
        *[batch.episode_ids[1]] * (length_of(4) * NODES_PER_MOVE),
    ]


def test_trees_whose_nodes_are_mixed_have_their_own_names() -> None:
    whole = make_trajectory(2)
    mixed = ENCODER.encode([replace(whole, nodes=whole.nodes[::5] + whole.nodes[1::5])])
    table = concat_tables([mixed, encode(1)], "nodes", "run-1", ENCODER.schemas["nodes"])
    expected = [f"{row['episode_id']}/{row['t']}" for row in table.select(["episode_id", "t"]).to_pylist()]
    assert table["tree_id"].to_pylist() == expected


def test_columns_of_a_newer_schema_are_null_in_older_rows() -> None:
    table = concat_tables([encode(2)], "steps", "run-1", ENCODER.schemas["steps"])
    older = table.drop_columns(["policy_target", "tokens"])
    back = conform(older, table.schema)
    assert back.schema.equals(table.schema)
    assert back["policy_target"].null_count == table.num_rows
    assert back["observation"].equals(table["observation"])
    with pytest.raises(SinkError, match="'observation' is missing"):
        conform(table.drop_columns(["observation"]), table.schema)


def change_step(trajectory: Trajectory, t: int, **changes: Any) -> Trajectory:
    steps = list(trajectory.steps)
    steps[t] = replace(steps[t], **changes)
    return replace(trajectory, steps=steps)


def change_node(trajectory: Trajectory, index: int, **changes: Any) -> Trajectory:
    nodes = list(trajectory.nodes)
    nodes[index] = replace(nodes[index], **changes)
    return replace(trajectory, nodes=nodes)


WHOLE = make_trajectory(2)
BAD = [
    (replace(WHOLE, steps=WHOLE.steps[:-1]), "need 4 steps, not 3"),
    (replace(WHOLE, steps=WHOLE.steps[1:]), "do not count from 0"),
    (change_step(WHOLE, 1, action=None), "has no action"),
    (change_step(WHOLE, 3, action=1), "has no action"),
    (change_step(WHOLE, 1, reward=math.nan), "steps.reward: a value is not finite"),
    (change_step(WHOLE, 1, value=math.inf), "steps.value: a value is not finite"),
    (change_step(WHOLE, 1, policy_target=[0.5, math.nan]), "steps.policy_target: a value is not finite"),
    (change_step(WHOLE, 1, observation=1.5), "steps.observation"),
    (change_step(WHOLE, 1, observation=None), "'observation' is empty"),
    (change_step(WHOLE, 1, visits=2.5), "steps.visits"),
    (change_step(WHOLE, 1, action_visits=[1.5]), "steps.action_visits"),
    (change_step(WHOLE, 1, rng_seed=1 << 64), "steps.rng_seed"),
    (change_step(WHOLE, 1, state_hash="\ud800"), "steps.state_hash"),
    (change_step(WHOLE, 1, state_hash=7), "steps.state_hash"),
    (change_node(WHOLE, 3, prior=-math.inf), "nodes.prior: a value is not finite"),
    (change_node(WHOLE, 3, visits=None), "'visits' is empty"),
    (replace(WHOLE, episode=replace(WHOLE.episode, started_at=math.nan)), "episodes.started_at"),
    (replace(WHOLE, episode=replace(WHOLE.episode, return_=math.nan)), "episodes.return"),
    (replace(WHOLE, episode=replace(WHOLE.episode, seed=1 << 63)), "episodes.seed"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_trajectory_is_refused_by_name(bad: Trajectory, message: str) -> None:
    with pytest.raises(SinkError, match=message) as caught:
        ENCODER.encode([make_trajectory(1), bad, make_trajectory(3)])
    assert WHOLE.episode.episode_id in caught.value.message


def test_the_same_episode_twice_in_a_batch_is_refused() -> None:
    with pytest.raises(SinkError, match="twice"):
        ENCODER.encode([make_trajectory(1), make_trajectory(1)])


def test_huge_but_finite_values_are_kept() -> None:
    big = change_step(change_step(WHOLE, 0, value=1.5e308), 1, value=1.5e308)
    assert ENCODER.encode([big]).steps.column("value").to_pylist()[:2] == [1.5e308, 1.5e308]


def test_a_failed_episode_may_end_anywhere() -> None:
    failure = Failure("the guest is gone", "guest", retryable=True)
    episode = replace(
        WHOLE.episode, failure=failure, earlier_failures=[failure, failure], return_=None, attempt=2
    )
    for steps in ((), WHOLE.steps[:2]):
        batch = ENCODER.encode([Trajectory(episode, steps)])
        row = batch.episodes.to_pylist()[0]
        assert row["failure"] == {"cause": "the guest is gone", "boundary": "guest", "retryable": True}
        assert len(row["earlier_failures"]) == 2
        assert row["return"] is None
        assert batch.num_steps.tolist() == [len(steps)]


def test_info_is_json_whatever_is_in_it() -> None:
    class Odd:
        def __repr__(self) -> str:
            return "Odd()"

    info: Any = {
        "array": np.arange(3),
        "number": np.float32(0.5),
        "nan": math.nan,
        "minus": -math.inf,
        "bytes": b"\x01\xff",
        "nested": {"deep": [np.array([math.inf])]},
        "odd": Odd(),
        3: "key",
    }
    assert json.loads(info_to_json(info)) == {
        "array": [0, 1, 2],
        "number": 0.5,
        "nan": "NaN",
        "minus": "-Infinity",
        "bytes": "01ff",
        "nested": {"deep": [["Infinity"]]},
        "odd": "Odd()",
        "3": "key",
    }
    assert info_to_json({}) == "{}"
    info["itself"] = info
    with pytest.raises(SinkError, match="contains itself"):
        info_to_json(info)


def test_episode_ids_tell_apart_what_concatenation_would_not() -> None:
    ids = {
        make_episode_id("r", "ab", "c", 0),
        make_episode_id("r", "a", "bc", 0),
        make_episode_id("r", "a", "bc", 1),
        make_episode_id("r", "a", "bc", 1, (2,)),
        make_episode_id("r", "a", "bc", 1, (2, 3)),
        make_episode_id("r", "a", "bc", 1, (23,)),
    }
    assert len(ids) == 6
    assert (
        make_episode_id("r", "a", "b", 0) == "30e3b6ee49f148d79f265792df0bd0ea"
    )  # on every machine, for ever
