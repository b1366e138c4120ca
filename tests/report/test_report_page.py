"""The page as a file: well-formed, self-contained, the same each time, and written whole or not at all."""

from __future__ import annotations

import base64
import gzip
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest
from gymnasium import spaces
from made_runs import TIMINGS, a_timeline, played, write_run

from rollout.errors import SinkError
from rollout.report import write_report
from rollout.report.charts import MAX_POINTS, histogram_figure, plotly_text, returns_figure, timeline_figures
from rollout.report.files import RunMetric
from rollout.report.summary import summarise
from rollout.types import Failure

LOST = Failure("<b>lost</b> & gone", "guest", True)


class Reader(HTMLParser):
    """Collects what a browser would see before any script runs."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: dict[str, str] = {}
        self._in_script: str | None = None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._in_script = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._in_script = None

    def handle_data(self, data: str) -> None:
        if self._in_script is None:
            self.text += data
        else:
            self.scripts[self._in_script] = self.scripts.get(self._in_script, "") + data


def data_of(reader: Reader) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(reader.scripts["report-data"])))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    episodes = [played("run", i, return_=float(i % 2), failure=LOST if i == 3 else None) for i in range(6)]
    place = tmp_path_factory.mktemp("page") / "run"
    return write_run(place, episodes, timings=TIMINGS, metrics=a_timeline(20))


def test_the_page_is_complete_without_scripts_and_names_nothing_outside(folder: Path) -> None:
    page = write_report(folder).read_text()
    reader = Reader(page)
    for wanted in (
        "FrozenLake-v1",
        "Mean return",
        "0.4",
        "terminated",
        "truncated",
        "failed",
        "<b>lost</b> & gone",
    ):
        assert wanted in reader.text
    assert "b" not in {tag for tag, _ in reader.tags}
    outside = [(tag, attributes) for tag, attributes in reader.tags if {"src", "href"} & attributes.keys()]
    assert outside == []
    policy = next(a["content"] for _, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.partition("style-src")[0]
    assert "unsafe-eval" not in policy
    assert len(page) < 3_000_000


def test_the_same_run_gives_the_same_page(folder: Path, tmp_path: Path) -> None:
    first = write_report(folder).read_bytes()
    second = write_report(folder, tmp_path / "again.html").read_bytes()
    assert first == second


def test_the_data_is_that_of_the_run(folder: Path) -> None:
    data = data_of(Reader(write_report(folder).read_text()))
    assert [episode["number"] for episode in data["episodes"]] == [1, 2, 3, 4, 5, 6]
    assert [episode["return"] for episode in data["episodes"]] == [0, 1, 0, None, 0, 1]
    assert data["episodes"][3]["failure"] == "guest: <b>lost</b> & gone"
    assert data["first"] == 0
    tree = data["episodes"][0]["moves"][0]["tree"]
    assert tree["num_nodes"] == len(tree["visits"]) == 13


def test_every_figure_is_one_that_plotly_knows(folder: Path) -> None:
    """The names and values of plotly.js that it would silently ignore are refused by its Python classes."""
    figures = data_of(Reader(write_report(folder).read_text()))["figures"]
    assert len(figures) == 9
    for figure in figures.values():
        text = json.dumps(figure).replace("var(--accent-soft)", "#eeeeee")
        for name in ("accent", "good", "warn", "bad"):
            text = text.replace(f"var(--{name})", "#123456")
        plotly.graph_objects.Figure(json.loads(text))


def test_a_long_run_is_thinned(tmp_path: Path) -> None:
    episodes = [played("run", i, length=0, simulations=0, observations=[0]) for i in range(MAX_POINTS + 500)]
    summary = summarise(write_run(tmp_path / "run", episodes))
    figure = returns_figure(summary)
    counts = [len(trace["x"]) for trace in figure["data"]]
    assert all(count <= 2 * MAX_POINTS + 4 for count in counts)
    mean = next(trace for trace in figure["data"] if trace.get("name") == "mean so far")
    assert mean["x"][-1] == MAX_POINTS + 500


def test_histograms_count_everything() -> None:
    few = histogram_figure([1.0, 0.0, 1.0], "return")["data"][0]
    assert (few["x"], few["y"]) == (["0", "1"], [1, 2])
    many = histogram_figure([i / 7 for i in range(1000)], "return")["data"][0]
    assert sum(many["y"]) == 1000
    assert len(many["x"]) == 24


def test_a_timeline_draws_what_was_recorded() -> None:
    assert timeline_figures([]) == {}
    only_branches = timeline_figures(
        [RunMetric(0, branches=0), RunMetric(2, branches=30), RunMetric(2, branches=40)]
    )
    assert list(only_branches) == ["rate"]
    assert only_branches["rate"]["data"][0]["y"] == [None, 15, None]


def test_labels_are_escaped_for_plotly() -> None:
    assert plotly_text("<a href='x'>&amp;</a>\x1b") == "&lt;a href='x'&gt;&amp;amp;&lt;/a&gt;\\x1b"


def test_odd_observations_are_data(tmp_path: Path) -> None:
    box = spaces.Dict({"grid": spaces.Box(0, 9, (2, 2), dtype=int), "text": spaces.Text(40)})
    seen = [{"grid": [[t, 1], [2, 3]], "text": "</script>"} for t in range(2)]
    folder = write_run(
        tmp_path / "run", [played("run", 0, length=1, observations=seen)], observation_space=box
    )
    page = write_report(folder).read_text()
    moves = data_of(Reader(page))["episodes"][0]["moves"]
    shown = [move["observation"] for move in moves]
    assert shown == [f"{{grid: [{t}, 1, 2, 3], text: </script>}}" for t in range(2)]
    assert page.count("</script>") == 3


def test_a_page_that_cannot_be_written_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="cannot write the report"):
        write_report(folder, tmp_path / "missing" / "report.html")
    (tmp_path / "taken").mkdir()
    with pytest.raises(SinkError, match="cannot write the report"):
        write_report(folder, tmp_path / "taken")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_a_full_disk_leaves_the_earlier_page(folder: Path) -> None:
    earlier = write_report(folder).read_bytes()
    names = sorted(path.name for path in folder.iterdir())
    program = (
        "import resource, sys; from pathlib import Path; from rollout.report import write_report; "
        "from rollout.errors import SinkError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: write_report(Path(sys.argv[1]))\nexcept SinkError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True
    )
    assert "cannot write the report" in done.stdout
    assert (folder / "report.html").read_bytes() == earlier
    assert sorted(path.name for path in folder.iterdir()) == names


@pytest.mark.parametrize(
    ("economics", "shown"),
    [
        (
            {
                "clone": {"count": 1200, "seconds": 6.0, "saved_s": 60.0, "median_s": 0.004},
                "continue": {"count": 40, "seconds": 0.4, "saved_s": 0.24, "median_s": 0.009},
                "inherit": {"count": 2, "seconds": 0.014, "saved_s": 0.006, "median_s": 0.007},
                "replay": {"count": 3, "seconds": 0.3, "saved_s": -0.012},
            },
            [
                "clone of a checkpoint",
                "1,200",
                "5 ms",
                "4 ms",
                "1 min 00 s",
                "went on in the sandbox of its parent",
                "240 ms",
                "last child: inherited the sandbox of its parent",
                "7 ms",
                "evicted or not saved: played again from an ancestor",
                "-12 ms",
            ],
        ),
        ({"clone": {"count": "many", "seconds": None}, "reset": 3, "replay": {}}, []),
        ("dear", []),
        ({}, []),
    ],
)
def test_what_nodes_cost_is_shown_where_it_is_known(
    folder: Path, economics: object, shown: list[str]
) -> None:
    path = folder / "run.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(before), "summary": {"economics": economics}}))
        page = write_report(folder).read_text()
    finally:
        path.write_text(before)
    assert ("What nodes cost" in page) == bool(shown)
    for text in shown:
        assert f">{text}" in page
