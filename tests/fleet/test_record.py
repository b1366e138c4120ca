"""The small files of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rollout.config import RunConfig
from rollout.errors import SinkError
from rollout.fleet.record import RunRecord, make_run_folder, make_run_id
from rollout.sandbox.base import PhaseTimings


def test_an_id_sorts_by_time_and_is_a_folder_name() -> None:
    assert make_run_id("My Config.v2", "20260101-120000", "ab12") == "20260101-120000-my-config-v2-ab12"
    assert make_run_id("../..", "20260101-120000", "ab12") == "20260101-120000-run-ab12"


def test_a_run_never_takes_a_folder_that_is_there(tmp_path: Path) -> None:
    folder = make_run_folder(str(tmp_path / "deep" / "runs"), "id")
    assert folder.local is not None
    assert list(folder.local.iterdir()) == []
    with pytest.raises(SinkError, match=r"cannot write to the output folder .*File exists"):
        make_run_folder(str(tmp_path / "deep" / "runs"), "id")


def test_run_json_is_replaced_as_a_whole_and_keeps_what_was_said(tmp_path: Path) -> None:
    record = RunRecord.begin(tmp_path, "id", RunConfig(seed=7), started_at=1.5)
    assert not (tmp_path / "run.json").exists(), "nothing is said before there is something to say"
    record.update(status="running")
    record.update(status="finished", summary={"episodes": 3})
    described = json.loads((tmp_path / "run.json").read_text())
    assert (described["run_id"], described["seed"], described["status"]) == ("id", 7, "finished")
    assert RunConfig.model_validate(described["config"]) == RunConfig(seed=7)
    assert described["versions"]["rollout"]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_timings_and_metrics_are_what_a_report_reads(tmp_path: Path) -> None:
    from rollout.report.files import read_run_files

    record = RunRecord.begin(tmp_path, "id", RunConfig(), started_at=0.0)
    record.update(status="finished")
    record.write_timings(PhaseTimings({"step": 2.0, "search": 3.0}, {"step": 4, "search": 5}))
    for t_s in (1.0, 2.0):
        record.add_metric({"t_s": t_s, "live_sandboxes": 3, "branches": 9})
    files = read_run_files(tmp_path)
    assert [(phase.phase, phase.seconds, phase.calls) for phase in files.phases] == [
        ("search", 3.0, 5),
        ("step", 2.0, 4),
    ]
    assert [(metric.t_s, metric.branches) for metric in files.metrics] == [(1.0, 9), (2.0, 9)]
    assert files.notes == ()


def test_what_cannot_be_written_is_a_sink_error(tmp_path: Path) -> None:
    record = RunRecord.begin(tmp_path / "gone", "id", RunConfig(), started_at=0.0)
    with pytest.raises(SinkError, match=r"cannot write .*run\.json"):
        record.update(status="running")
    with pytest.raises(SinkError, match=r"cannot write metrics\.jsonl"):
        record.add_metric({"t_s": 1.0})
    with pytest.raises(SinkError, match=r"cannot write .*timings\.json"):
        record.write_timings(PhaseTimings())
