"""The small files of a run: whole, missing, torn and altered."""

import itertools
import json
from pathlib import Path

import pytest

from rollout.errors import SinkError
from rollout.report.files import MAX_METRICS, has_manifest, read_run_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text('{"run_id": "r1", "config": {"seed": 7}}')
    return tmp_path


def test_whole_files_are_read(folder: Path) -> None:
    (folder / "timings.json").write_text(
        '{"step": {"seconds": 1, "calls": 2}, "ray": {"seconds": 3, "calls": 1}}'
    )
    (folder / "metrics.jsonl").write_text(
        '{"t_s": 0, "branches": 0}\n{"t_s": 1.5, "branches": 30, "rss_bytes": null}\n'
    )
    files = read_run_files(folder)
    assert files.run_id == "r1"
    assert files.config == {"seed": 7}
    assert [(p.phase, p.seconds, p.calls) for p in files.phases] == [("ray", 3, 1), ("step", 1, 2)]
    assert [(m.t_s, m.branches, m.rss_bytes) for m in files.metrics] == [(0, 0, None), (1.5, 30, None)]
    assert files.notes == ()


def test_a_killed_run_has_neither_timings_nor_timeline(folder: Path) -> None:
    files = read_run_files(folder)
    assert files.phases == ()
    assert files.metrics == ()
    assert [note.split()[0] for note in files.notes] == ["timings.json", "metrics.jsonl"]


def test_a_torn_last_line_is_left_out_silently(folder: Path) -> None:
    (folder / "timings.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"t_s": 0}\n{"t_s": 1}\n{"t_s": 2, "bran')
    files = read_run_files(folder)
    assert [m.t_s for m in files.metrics] == [0, 1]
    assert files.notes == ()


@pytest.mark.parametrize(
    "line", ["nonsense", "[1]", '{"t_s": "x"}', '{"t_s": NaN}', '{"t_s": 0.5}', "[" * 100_000, "\x00\xff"]
)
def test_damaged_lines_are_counted(folder: Path, line: str) -> None:
    (folder / "timings.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"t_s": 1}\n' + line + '\n{"t_s": 2}\n')
    files = read_run_files(folder)
    assert [m.t_s for m in files.metrics] == [1, 2]
    assert files.notes == ("metrics.jsonl: 1 damaged lines are left out",)


def test_a_long_timeline_is_thinned_evenly(folder: Path) -> None:
    lines = [json.dumps({"t_s": t}) + "\n" for t in range(10 * MAX_METRICS)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    times = [m.t_s for m in read_run_files(folder).metrics]
    assert len(times) == MAX_METRICS
    assert {after - before for before, after in itertools.pairwise(times)} == {10}


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00", "[" * 100_000])
def test_a_damaged_run_json_is_a_note(folder: Path, text: str) -> None:
    (folder / "run.json").write_text(text)
    files = read_run_files(folder)
    assert files.description == {}
    assert files.run_id == folder.name
    assert any("run.json" in note for note in files.notes)


def test_damaged_timings_are_left_out_one_by_one(folder: Path) -> None:
    bad = {"a": 1, "b": {"seconds": "x", "calls": 1}, "c": {"seconds": -1, "calls": 1}, "d": {"seconds": 1}}
    (folder / "timings.json").write_text(json.dumps({**bad, "good": {"seconds": 1.0, "calls": 0}}))
    files = read_run_files(folder)
    assert [p.phase for p in files.phases] == ["good"]
    assert sum("is damaged" in note for note in files.notes) == len(bad)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="holds no run"):
        read_run_files(tmp_path)
    with pytest.raises(SinkError, match="not a folder"):
        read_run_files(tmp_path / "missing")


@pytest.mark.parametrize(("content", "found"), [(None, False), ("", False), ("{torn", False), ("{}\n", True)])
def test_a_manifest_counts_from_its_first_whole_line(
    tmp_path: Path, content: str | None, found: bool
) -> None:
    if content is not None:
        (tmp_path / "manifest.jsonl").write_text(content)
    assert has_manifest(tmp_path) is found
