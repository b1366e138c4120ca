"""`rollout report`, `show`, `diff` and `runs`, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gymnasium import spaces
from made_runs import TIMINGS, a_timeline, played, write_run

from rollout.cli import main
from rollout.types import Failure

LOST = Failure("no answer\x1b[31m within 60 s", "guest", True)


class Cli:
    """Calls the command line; remembers what it said."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(words)
        said = self._capsys.readouterr()
        assert exit_.value.code == code, said.err
        self.errors = said.err
        return said.out

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json"))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(capsys)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    lost = [played("first", i, return_=float(i % 2), failure=LOST if i == 4 else None) for i in range(8)]
    write_run(folder / "first", lost, planned=9, timings=TIMINGS, metrics=a_timeline(5))
    write_run(folder / "second", [played("second", i, return_=1.0) for i in range(8)])
    return folder


def test_show_a_run(cli: Cli, runs: Path) -> None:
    text = cli("show", "first")
    for wanted in (
        "8 of 9 planned; 1 failed",
        "0.5714",
        "guest",
        "no answer\\x1b[31m",
        "restore",
        "note: 1 of 9",
    ):
        assert wanted in text
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 160


def test_show_a_run_as_json(cli: Cli, runs: Path) -> None:
    shown = cli.json("show", str(runs / "first"), "--limit", "3")
    assert shown["return"]["mean"] == pytest.approx(4 / 7)
    assert shown["return"]["method"] == "wilson"
    assert shown["episodes_failed"] == 1
    assert shown["failures"] == [
        {"boundary": "guest", "cause": "no answer\x1b[31m within 60 s", "final": 1, "retried": 0}
    ]
    assert shown["timings"]["restore"] == {"seconds": 21.3, "calls": 840}
    assert [episode["number"] for episode in shown["listed"]] == [1, 2, 3]
    assert len(cli.json("show", "first", "--limit", "0")["listed"]) == 8
    by_uri = cli.json("show", (runs / "first").as_uri(), "--limit", "3")
    assert by_uri.pop("folder") == (runs / "first").as_uri()
    assert by_uri.items() <= shown.items()


def test_show_an_episode_by_number_and_by_id(cli: Cli, runs: Path) -> None:
    by_number = cli.json("show", "first", "2")
    assert by_number["seed"] == 1
    assert [step["t"] for step in by_number["steps"]] == [0, 1, 2, 3]
    assert by_number["steps"][0]["observation"] == "0"
    assert cli.json("show", "first", by_number["episode_id"][:8]) == by_number
    text = cli("show", "first", "2")
    assert by_number["episode_id"] in text
    assert "the first" not in text
    assert "the first 2 of 4 rows; --limit 0 shows all" in cli("show", "first", "2", "--limit", "2")


def test_hostile_observations_do_not_reach_the_terminal(cli: Cli, tmp_path: Path) -> None:
    seen = ["\x1b[2J[bold]x[/bold]\nline", "\u202eright", "ok"]
    write_run(
        tmp_path / "run", [played("run", 0, length=2, observations=seen)], observation_space=spaces.Text(99)
    )
    text = cli("show", "run", "1")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b[2J[bold]x[/bold]\\nline" in text


@pytest.mark.parametrize("wanted", ["0", "9", "99999999999999999999", "abc", "zzzzzzzz", "-"])
def test_an_episode_that_is_not_there(cli: Cli, runs: Path, wanted: str) -> None:
    cli("show", "first", wanted, code=2)
    assert "there is no episode" in cli.errors
    assert "from 1 to 8" in cli.errors


def test_diff_pairs_equal_episodes(cli: Cli, runs: Path) -> None:
    found = cli.json("diff", "first", "second")
    assert found["return"]["method"] == "paired t"
    assert found["return"]["count"] == 7
    assert found["return"]["value"] == pytest.approx(3 / 7)
    assert not found["return"]["significant"]
    assert found["changed_settings"] == [{"key": "episodes", "first": "9", "second": "8"}]
    text = cli("diff", "first", "second")
    assert "+0.4286" in text
    assert "paired t, not significant" in text
    assert "note: first: 1 of 9 planned" in text


def test_diff_of_other_episodes_takes_them_apart(cli: Cli, runs: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "third", [played("third", i, return_=i / 7, seed=1000 + i) for i in range(8)])
    found = cli.json("diff", "second", "third")
    assert found["return"]["method"] == "welch"
    assert found["return"]["value"] == pytest.approx(-0.5)
    empty = write_run(tmp_path / "empty", [])
    assert cli.json("diff", "second", str(empty))["return"] is None
    assert "-" in cli("diff", str(empty), "second")


def test_runs_lists_what_is_there(cli: Cli, runs: Path) -> None:
    (runs / "broken").mkdir()
    (runs / "broken" / "manifest.jsonl").write_text("nonsense\n")
    (runs / "killed").mkdir()
    (runs / "killed" / "run.json").write_text('{"run_id": "killed", "status": "running"}')
    (runs / "no-run").mkdir()
    (runs / "file").write_text("")
    listed = cli.json("runs")
    assert [Path(run["folder"]).name for run in listed] == ["broken", "killed", "first", "second"]
    assert "problem" in listed[0]
    assert listed[1]["episodes"] == 0
    text = cli("runs", str(runs))
    assert "8/9" in text
    assert "no-run" not in text


def test_a_folder_without_runs_is_an_empty_list(cli: Cli, tmp_path: Path) -> None:
    assert cli.json("runs", str(tmp_path)) == []
    cli("runs", str(tmp_path / "missing"), code=2)
    assert "cannot list the runs" in cli.errors


def test_report_prints_the_path_of_the_page(cli: Cli, runs: Path) -> None:
    assert cli("report", "first") == "runs/first/report.html\n"
    assert (runs / "first" / "report.html").stat().st_size > 1_000_000
    assert cli("report", "first", "-o", "page.html") == "page.html\n"
    cli("report", "first", "-o", "missing/page.html", code=1)
    assert cli.errors.startswith("rollout: sink error: cannot write the report")


@pytest.mark.parametrize("command", [("show",), ("report",), ("diff", "first")])
def test_a_run_that_is_not_there_is_one_line_on_stderr(
    cli: Cli, runs: Path, command: tuple[str, ...]
) -> None:
    cli(*command, "ru\x1bn", code=2)
    assert cli.errors.splitlines() == [
        "rollout: config error: there is no run 'ru\\x1bn': neither that folder nor runs/ru\\x1bn"
    ]
    (runs / "hollow").mkdir()
    cli(*command, "hollow", code=1)
    assert "holds no run" in cli.errors
