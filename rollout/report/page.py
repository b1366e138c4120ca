"""Puts a run's report together as one HTML file.

The page is self-contained: plotly.js is inlined once. It is the full build that the plotly package ships,
because no partial build has the icicle trace; it and the page's data travel gzipped and in base64, which
takes 4.9 MB down to 1.9, and the browser unpacks them (`DecompressionStream`, in every browser since
2023). The tables are plain HTML and need no script.

Guest text is hostile. It is escaped where it is HTML, it is JSON inside base64 where it is data, and the
script puts it on the page as text. Behind that stands a content security policy that allows exactly the
two scripts of the page, by their hashes, and no request of any kind.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from rollout.errors import SinkError
from rollout.report.charts import (
    Figure,
    failures_figure,
    histogram_figure,
    phases_figure,
    returns_figure,
    timeline_figures,
)
from rollout.report.economics import economics_card
from rollout.report.sections import (
    card,
    config_card,
    cuts_text,
    episodes_card,
    explorer_section,
    failures_card,
    notes_block,
    subtitle,
    tiles,
)
from rollout.report.summary import RunSummary, summarise
from rollout.report.trees import DrawnTree, EpisodeDetail, Limits, Move, read_details
from rollout.trajectory.storage import Location, Storage

__all__ = ["PAGE_NAME", "render_page", "write_report"]

PAGE_NAME = "report.html"
_NUM_FIRST_CARDS = 2
"""Cards above the tree explorer: the returns."""
_TIMELINE = (
    ("live", "Sandboxes", "Alive over time."),
    ("checkpoints", "Checkpoints", "Held over time."),
    ("rate", "Speed", "Branches finished a second."),
    ("bytes", "Memory", "In MiB; shared pages count in each process."),
)
_FOOTER = (
    "Means are over episodes that did not fail, with 95% intervals: "
    "Wilson's for returns that are all 0 or 1, Student's t otherwise."
)


def write_report(
    run_dir: Location, output: Path | None = None, limits: Limits | None = None
) -> Path | Storage:
    """Writes the page of a run, whole or not at all, over an earlier one.

    Args:
        run_dir: The run's folder: a local path or a URI of `pyarrow.fs`.
        output: Where to; `report.html` in that folder when None.
        limits: How much of the run the page holds.

    Returns:
        The page's place: a path, unless it is in an object store.

    Raises:
        SinkError: The folder is no run, a committed file cannot be read, or the page cannot be written.
    """
    summary = summarise(run_dir)
    page = render_page(summary, read_details(summary, limits))
    folder, name = summary.files.folder, PAGE_NAME
    if output is not None:
        folder, name = Storage.of(output.parent), output.name
    page_place = folder.child(name)
    try:
        folder.put(name, page.encode(), "report")
    except SinkError as error:
        raise SinkError(f"cannot write the report {page_place}: {error.message}") from error
    return page_place if folder.local is None else Path(str(page_place))


def render_page(summary: RunSummary, details: Sequence[EpisodeDetail]) -> str:
    """The page as text; the same input gives the same page."""
    figures, cards = _charts(summary)
    plotly_code = get_plotlyjs()
    script = _resource("page.js")
    data = {
        "figures": figures,
        "episodes": [_episode_json(detail) for detail in details],
        "first": _first(details),
    }
    shown = {detail.episode.number for detail in details}
    return string.Template(_resource("page.html")).substitute(
        policy=_policy(plotly_code, script),
        title=html.escape(f"Run {summary.files.run_id}"),
        style=_resource("page.css"),
        heading=html.escape(", ".join(summary.distinct("env_id")) or summary.files.run_id),
        subtitle=html.escape(subtitle(summary)),
        tiles=tiles(summary),
        notes=notes_block(summary.notes),
        first_cards="\n".join(cards[:_NUM_FIRST_CARDS]),
        explorer=explorer_section(cuts_text(summary, details)) if details else "",
        cards="\n".join(
            [
                *cards[_NUM_FIRST_CARDS:],
                economics_card(summary),
                episodes_card(summary, shown),
                config_card(summary),
            ]
        ),
        footer=_FOOTER,
        data=_packed(json.dumps(data, allow_nan=False, separators=(",", ":"))),
        plotly=_packed(plotly_code),
        script=script,
    )


def _charts(summary: RunSummary) -> tuple[dict[str, Figure], list[str]]:
    """The figures by the id of their place, and the cards that hold these places."""
    figures: dict[str, Figure] = {}
    cards: list[str] = []

    def place(name: str, size: str, title: str, caption: str, figure: Figure | None, instead: str) -> None:
        chart_id = f"chart-{name}"
        if figure is None or not figure["data"]:
            body = f'<p class="empty">{html.escape(instead)}</p>'
        else:
            figures[chart_id] = figure
            body = f'<div class="chart" id="{chart_id}" role="img" aria-label="{html.escape(title)}"></div>'
        cards.append(card(size, title, caption, body))

    no_episode = "No episode was committed."
    no_return = "No episode has a return." if summary.num_episodes else no_episode
    lengths = summary.lengths
    timeline = timeline_figures(summary.files.metrics)
    no_timeline = "The run recorded no timeline."
    place(
        "returns",
        "two-thirds",
        "Returns",
        "Each episode, and the mean so far with its 95% interval.",
        returns_figure(summary) if summary.num_episodes else None,
        no_return,
    )
    place(
        "distribution",
        "third",
        "Distribution of returns",
        "Episodes that did not fail.",
        histogram_figure(summary.returns, "return") if summary.returns else None,
        no_return,
    )
    place(
        "phases",
        "half",
        "Where the time went",
        "Seconds by phase, summed over all that ran at the same time.",
        phases_figure(summary.files.phases) if summary.files.phases else None,
        "The run did not get to write its timings.",
    )
    place(
        "lengths",
        "half",
        "Episode lengths",
        "Actions of the episodes that did not fail.",
        histogram_figure(lengths, "actions") if lengths else None,
        no_episode,
    )
    for name, title, caption in _TIMELINE:
        place(name, "quarter", title, caption, timeline.get(name), no_timeline)
    if summary.failures:
        caption = "Attempts that were begun again, and episodes that were lost."
        place("failures", "third", "Failures by boundary", caption, failures_figure(summary.failures), "")
        cards.append(failures_card(summary))
    return figures, cards


def _episode_json(detail: EpisodeDetail) -> dict[str, Any]:
    episode = detail.episode
    return {
        "number": episode.number,
        "id": episode.episode_id,
        "task": episode.task_id,
        "return": episode.return_,
        "length": episode.length,
        "failure": episode.failure,
        "moves": [_move_json(move) for move in detail.moves],
    }


def _move_json(move: Move) -> dict[str, Any]:
    return {
        "t": move.t,
        "observation": move.observation,
        "action": move.action,
        "reward": move.reward,
        "ending": move.ending,
        "info": move.info,
        "node": move.node_id,
        "visits": move.visits,
        "value": move.value,
        "choices": move.choices,
        "played": move.played,
        "seconds": move.duration_s,
        "tree": None if move.tree is None else _tree_json(move.tree),
    }


def _tree_json(tree: DrawnTree) -> dict[str, Any]:
    return {column.name: getattr(tree, column.name) for column in fields(tree)}  # asdict would copy each node


def _first(details: Sequence[EpisodeDetail]) -> int:
    """Position of the episode that is open at first: the first one that has a tree."""
    for index, detail in enumerate(details):
        if any(move.tree is not None for move in detail.moves):
            return index
    return 0


def _policy(*scripts: str) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    rules: Mapping[str, str] = {
        "default-src": "'none'",
        "script-src": hashes,
        "style-src": "'unsafe-inline'",  # plotly sets styles on the elements that it draws
        "img-src": "data:",  # plotly looks which image formats the browser knows, by tiny images of its own
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _packed(text: str) -> str:
    """Gzipped, in base64: its letters can neither end a script element nor begin one."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _resource(name: str) -> str:
    return resources.files("rollout.report").joinpath(name).read_text(encoding="utf-8")
