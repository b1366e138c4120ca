"""Exports: what is selected, in which order, split how, and that nothing half-written ever shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from trajectory_factory import episode_id, length_of, make_trajectory

from rollout.cli import main
from rollout.errors import ConfigError, SinkError
from rollout.trajectory import TrajectorySink
from rollout.trajectory.export.context import ExportOptions
from rollout.trajectory.export.formats import FORMATS, export_run
from rollout.trajectory.export.source import Selection, Source, split_of
from rollout.trajectory.reader import open_run
from rollout.types import Failure

OpenSink = Callable[..., TrajectorySink]
NUMBERS = range(12)


@pytest.fixture
def run(open_sink: OpenSink, run_dir: Path) -> Path:
    """Twelve episodes of three tasks in three parts, in a mixed order, and one that failed."""
    with open_sink() as sink:
        for numbers in ((7, 2, 11, 0), (5, 9, 1, 3), (10, 4, 8, 6)):
            sink.write_many([make_trajectory(number) for number in numbers])
            sink.flush()
        broken = make_trajectory(20)
        failure = Failure("the guest is gone", "guest", retryable=True)
        episode = replace(broken.episode, failure=failure, return_=None)
        sink.write(replace(broken, episode=episode, steps=broken.steps[:-1]))
    return run_dir


def read(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{split}.parquet").to_pylist()


def export(run: Path, name: str, out: Path, **options: Any) -> list[dict[str, Any]]:
    export_run(run, name, out, ExportOptions(**options))
    return read(out)


def test_episodes_come_in_their_order_however_they_were_committed(run: Path, tmp_path: Path) -> None:
    rows = export(run, "verl-sft", tmp_path / "out")
    assert [row["episode_id"] for row in rows] == [episode_id(number) for number in NUMBERS]
    for number, row in zip(NUMBERS, rows, strict=True):
        turns = [(m["role"], m["content"]) for m in row["messages"]]
        expected = [
            said
            for t in range(length_of(number))
            for said in (("user", str(number + t)), ("assistant", str((number + t) % 4)))
        ]
        assert turns == expected
        assert row["return"] == length_of(number)


def test_two_exports_are_the_same_bytes(run: Path, tmp_path: Path) -> None:
    for name in FORMATS:
        files = []
        for attempt in ("one", "two"):
            export_run(run, name, tmp_path / attempt / name)
            folder = tmp_path / attempt / name
            files.append(
                {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            )
        assert files[0] == files[1]
        assert files[0]


def test_chunks_hold_the_rows_of_their_episodes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.trajectory.export.source.CHUNK_ROWS", 7)
    monkeypatch.setattr("rollout.trajectory.export.source.CACHE_BYTES", 1)
    source = Source(open_run(run), Selection(), ["t", "observation"], ["t", "node_id"])
    seen: list[str] = []
    for chunk in source.chunks():
        for index, id_ in enumerate(chunk.episodes["episode_id"].to_pylist()):
            number = NUMBERS[len(seen)]
            seen.append(id_)
            steps = chunk.steps.slice(chunk.step_offsets[index], np.diff(chunk.step_offsets)[index])
            assert steps["observation"].to_pylist() == [number + t for t in range(length_of(number) + 1)]
            assert np.diff(chunk.node_offsets)[index] == length_of(number) * 4
    assert seen == [episode_id(number) for number in NUMBERS]
    assert source.num_episodes == 12


def test_selection_by_return_and_failure(run: Path, tmp_path: Path) -> None:
    rows = export(run, "trl-sft", tmp_path / "a", selection=Selection(min_return=2.0, max_return=3.0))
    assert {row["return"] for row in rows} == {2.0, 3.0}
    rows = export(run, "trl-sft", tmp_path / "b", selection=Selection(failed=True))
    assert len(rows) == 13
    rows = export(run, "trl-sft", tmp_path / "c", selection=Selection(failed=True, min_return=-math.inf))
    assert len(rows) == 12


def test_splits_go_by_task_never_by_row(run: Path, tmp_path: Path) -> None:
    seeds = [s for s in range(20) if 0 < split_of(["task-0", "task-1", "task-2"], 0.5, s).sum() < 3]
    options = ExportOptions(test_fraction=0.5, split_seed=seeds[0])
    report = export_run(run, "verl-rl", tmp_path / "out", options)
    train, test = read(tmp_path / "out"), read(tmp_path / "out", "test")
    tasks = [{row["extra_info"]["task_id"] for row in rows} for rows in (train, test)]
    assert tasks[0] & tasks[1] == set()
    assert tasks[0] | tasks[1] == {"task-0", "task-1", "task-2"}
    assert report.num_records == {"train": len(train), "test": len(test)}
    assert len(train) + len(test) == sum(map(length_of, NUMBERS))
    assert [row["extra_info"]["index"] for row in test] == list(range(len(test)))
    assert {row["extra_info"]["split"] for row in test} == {"test"}


def test_prompts_end_with_the_observation_and_keep_their_history(run: Path, tmp_path: Path) -> None:
    rows = export(run, "verl-rl", tmp_path / "out", system="Play.", history=1)
    last = [row for row in rows if row["extra_info"]["episode_id"] == episode_id(4)][-1]
    assert [(m["role"], m["content"]) for m in last["prompt"]] == [
        ("system", "Play."),
        ("user", "7"),
        ("assistant", "3"),
        ("user", "8"),
    ]
    assert last["reward_model"] == {"style": "rule", "ground_truth": "0"}
    assert last["data_source"] == "Test-v0"


def test_transitions_have_both_observations_and_their_probability(run: Path, tmp_path: Path) -> None:
    rows = export(run, "rllib", tmp_path / "out")
    assert len(rows) == sum(map(length_of, NUMBERS))
    assert all(row["new_obs"] == row["obs"] + 1 for row in rows)
    assert all(row["action_logp"] == pytest.approx(math.log(0.25)) for row in rows)
    ends = [row for row in rows if row["terminateds"]]
    assert len(ends) == 12


def test_training_triples_have_shares_of_visits(run: Path, tmp_path: Path) -> None:
    rows = export(run, "alphazero", tmp_path / "out")
    assert all(row["visit_policy"] == [0.25] * 4 and row["value"] == 0.5 for row in rows)
    assert rows[0]["legal_actions"] == [0, 1, 2, 3]


def test_a_language_models_tokens_and_logprobs(open_sink: OpenSink, run_dir: Path, tmp_path: Path) -> None:
    whole = make_trajectory(1)
    spoken = [
        step if step.action is None else replace(step, tokens=[5, 6], logprobs=[-0.5, -0.25])
        for step in whole.steps
    ]
    with open_sink() as sink:
        sink.write_many([replace(whole, steps=spoken), make_trajectory(2)])
    rows = export(run_dir, "rllib", tmp_path / "out")
    logps = [row["action_logp"] for row in rows]
    assert logps[:2] == [-0.75, -0.75]
    assert logps[2] == pytest.approx(math.log(0.25))
    export_run(run_dir, "atif", tmp_path / "atif")
    document = json.loads((tmp_path / "atif" / "train" / f"{episode_id(1)}.json").read_text())
    assert document["steps"][1]["metrics"] == {
        "completion_tokens": 2,
        "completion_token_ids": [5, 6],
        "logprobs": [-0.5, -0.25],
    }


def test_a_branched_episode_marks_what_it_shares(open_sink: OpenSink, run_dir: Path, tmp_path: Path) -> None:
    whole = make_trajectory(4)
    episode = replace(whole.episode, parent_episode_id=episode_id(0), branch_path=(3, 1))
    with open_sink() as sink:
        sink.write(replace(whole, episode=episode))
    export_run(run_dir, "atif", tmp_path / "atif")
    document = json.loads((tmp_path / "atif" / "train" / f"{episode_id(4)}.json").read_text())
    copied = [step.get("is_copied_context", False) for step in document["steps"]]
    assert copied == [True, True, True, False, False, False]


def test_trees_can_be_cut_by_depth_and_visits(run: Path, tmp_path: Path) -> None:
    export_run(run, "jsonl", tmp_path / "out", ExportOptions(min_visits=3, max_depth=1))
    lines = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert len(lines) == 12
    first = json.loads(lines[0])
    assert [node["node_id"] for node in first["nodes"]] == [0, 1]
    assert first["steps"][0]["info"] == {"number": 0}
    assert [step["action"] for step in first["steps"]] == [0, None]
    rows = export(run, "grpo", tmp_path / "grpo", min_visits=2)
    assert {row["group_size"] for row in rows} == {2}


def test_the_discount_is_that_of_the_run(open_sink: OpenSink, run_dir: Path, tmp_path: Path) -> None:
    with open_sink() as sink:
        sink.write(make_trajectory(5))
    (run_dir / "run.json").write_text(json.dumps({"config": {"search": {"discount": 0.5}}}))
    rows = export(run_dir, "grpo", tmp_path / "out")
    assert rows[0]["reward"] == pytest.approx(0.5 * (0.1 * 5 + 0.01))
    (run_dir / "run.json").write_text("{}")
    with pytest.raises(SinkError, match=r"run\.json does not say the discount"):
        export_run(run_dir, "grpo", tmp_path / "bad")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_an_empty_run_gives_an_empty_file_of_the_right_columns(
    open_sink: OpenSink, run_dir: Path, tmp_path: Path
) -> None:
    open_sink().close()
    for name in FORMATS:
        assert export_run(run_dir, name, tmp_path / name).num_episodes == 0
    assert pq.read_schema(tmp_path / "trl-dpo" / "train.parquet").names[:3] == [
        "prompt",
        "chosen",
        "rejected",
    ]


def test_what_is_in_the_way_stays_unless_it_may_be_replaced(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(SinkError, match="is there already"):
        export_run(run, "jsonl", out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    export_run(run, "jsonl", out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["train.jsonl"]
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkError, match="cannot make"):
        export_run(run, "jsonl", tmp_path / "file" / "out")


def test_a_failed_export_leaves_nothing(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="no format 'parqet'"):
        export_run(run, "parqet", tmp_path / "out")

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_run(run, "verl-sft", tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_part_is_reported_or_stops_the_export(run: Path, tmp_path: Path) -> None:
    path = sorted((run / "steps").iterdir())[0]
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = b"\0" * (len(data) // 2 - 4)
    path.write_bytes(data)
    with pytest.raises(SinkError, match="cannot read"):
        export_run(run, "rllib", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path.unlink()
    report = export_run(run, "rllib", tmp_path / "out")
    assert report.num_episodes == 8
    assert [problem.kind for problem in report.problems] == ["missing file"]


@pytest.mark.parametrize(
    "options",
    [{"test_fraction": 1.5}, {"min_visits": -1}, {"max_depth": 0}, {"margin": math.nan}, {"history": -1}],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ExportOptions(**options)


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", str(run), "--format", "trl-dpo", "--out", str(tmp_path / "out"), "--json"])
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 12
    with pytest.raises(SystemExit) as caught:
        main(["export", str(run), "--format", "dpo", "--out", str(tmp_path / "other")])
    assert caught.value.code == 2
    assert "there is no format 'dpo'" in capsys.readouterr().err
