"""Runs in figures, from tables written by the real sink."""

import json
from pathlib import Path

import pytest
from made_runs import TIMINGS, a_timeline, played, write_run

from rollout.errors import SinkError
from rollout.report.summary import summarise
from rollout.types import Failure

LOST = Failure("the guest did not answer", "guest", True)
RETRIED = Failure("the VMM ended", "fork", True)


def test_failed_episodes_have_no_part_in_the_means(tmp_path: Path) -> None:
    episodes = [
        played("run", 0, return_=1.0, length=4),
        played("run", 1, return_=0.0, length=6, earlier=[RETRIED]),
        played("run", 2, length=2, failure=LOST, earlier=[RETRIED, RETRIED]),
        played("run", 3, return_=None, length=5),
    ]
    summary = summarise(write_run(tmp_path / "run", episodes, timings=TIMINGS, metrics=a_timeline(11)))
    assert summary.num_episodes == 4
    assert summary.num_failed == 1
    assert summary.returns == (1.0, 0.0)
    assert summary.lengths == (4, 6, 5)
    assert summary.num_steps == 17
    assert summary.wall_s == pytest.approx(7.5)  # begun 2 s apart, 1.5 s long
    assert summary.branches_per_s == pytest.approx(22.0)
    assert [(g.boundary, g.num_final, g.num_retried) for g in summary.failures] == [
        ("guest", 1, 0),
        ("fork", 0, 3),
    ]
    assert summary.notes == ("1 episodes have no finite return",)


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [played("run", 0)], planned=5)
    description = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**description, "status": "running"}))
    notes = " ".join(summarise(folder).notes)
    assert "4 of 5 planned episodes are not committed" in notes
    assert "still running, or was killed" in notes


def test_a_run_without_episodes_has_empty_figures(tmp_path: Path) -> None:
    summary = summarise(write_run(tmp_path / "run", [], planned=3))
    assert summary.num_episodes == 0
    assert summary.mean_return is None
    assert summary.wall_s is None
    assert summary.distinct("engine") == []
    assert summary.started_at is None


@pytest.mark.parametrize("manifest", [None, "", '{"torn'])
def test_a_run_that_was_killed_before_its_tables_began(tmp_path: Path, manifest: str | None) -> None:
    (tmp_path / "run.json").write_text("{}")
    if manifest is not None:
        (tmp_path / "manifest.jsonl").write_text(manifest)
    summary = summarise(tmp_path)
    assert summary.num_episodes == 0
    assert any("no manifest" in note for note in summary.notes)


def test_a_lost_file_is_a_note_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [played("run", 0)])
    next((folder / "steps").glob("*.parquet")).unlink()
    summary = summarise(folder)
    assert summary.num_episodes == 0
    assert any(note.startswith("skipped, missing file") for note in summary.notes)


def test_an_altered_file_is_an_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [played("run", 0)])
    victim = next((folder / "episodes").glob("*.parquet"))
    data = bytearray(victim.read_bytes())
    data[-40:] = bytes(40)  # in the footer; the size stays
    victim.write_bytes(data)
    with pytest.raises(SinkError):
        summarise(folder)


def test_episodes_are_numbered_as_they_began(tmp_path: Path) -> None:
    episodes = [played("run", number) for number in (2, 0, 1)]
    summary = summarise(write_run(tmp_path / "run", episodes))
    assert [(e.number, e.seed) for e in summary.episodes()] == [(1, 0), (2, 1), (3, 2)]
    assert [e.number for e in summary.episodes(1, 1)] == [2]
    assert [e.ending for e in summary.episodes()] == ["terminated", "terminated", "truncated"]


def test_the_time_of_a_resumed_run_leaves_out_the_pauses(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        [played("run", number) for number in range(2)],
        metrics=[{"t_s": 1.0, "branches": 10}, {"t_s": 2.0, "branches": 30}],
    )
    described = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(described | {"resumed_at": [5.0, 6.0]}))
    summary = summarise(run)
    assert (summary.wall_s, summary.branches_per_s) == (2.0, 15.0)
    assert "the run was interrupted and resumed 2 times; times leave out the pauses" in summary.notes
    (run / "metrics.jsonl").unlink()
    assert summarise(run).wall_s is None
