"""The parts of a page that are plain HTML: tiles, notes, tables. Pure; a run's text is escaped here."""

from __future__ import annotations

import html
import json
from collections.abc import Collection, Iterable, Sequence

from rollout.report.stats import Estimate
from rollout.report.summary import Episode, RunSummary
from rollout.report.text import duration_text, number_text, printable, size_text
from rollout.report.trees import EpisodeDetail

__all__ = [
    "card",
    "config_card",
    "cuts_text",
    "episodes_card",
    "explorer_section",
    "failures_card",
    "interval_text",
    "notes_block",
    "subtitle",
    "table",
    "tiles",
]

MAX_EPISODE_ROWS = 500
MAX_FAILURE_ROWS = 50
_MAX_CONFIG_CHARS = 100_000


def subtitle(summary: RunSummary) -> str:
    """One line that says what was run, with what, and when."""
    parts = [f"run {printable(summary.files.run_id)}"]
    for column, label in (("engine", "engine"), ("search", "search"), ("policy", "policy")):
        if values := summary.distinct(column):
            parts.append(f"{label} {printable(', '.join(values))}")
    if isinstance(seed := summary.files.config.get("seed"), int):
        parts.append(f"seed {seed}")
    if begun := summary.started_at:
        parts.append(f"{begun:%Y-%m-%d %H:%M} UTC")
    return " · ".join(parts)


def tiles(summary: RunSummary) -> str:
    """The figures at the top."""
    planned = f"of {summary.num_planned:,} planned" if summary.num_planned is not None else "committed"
    endings = f"{summary.num_terminated:,} terminated, {summary.num_truncated:,} truncated"
    final = sum(group.num_retried for group in summary.failures)
    moves_per_s = f"{number_text(summary.steps_per_s, 3) or 0} moves a second"
    entries = [
        ("Mean return", _mean_text(summary.mean_return), interval_text(summary.mean_return)),
        ("Episodes", f"{summary.num_episodes:,}", planned),
        ("Failed", f"{summary.num_failed:,}", f"{final:,} attempts begun again"),
        ("Mean length", _mean_text(summary.mean_length), endings),
        ("Time", duration_text(summary.wall_s) or "-", moves_per_s),
    ]
    rate = summary.branches_per_s
    if rate is not None:
        entries.append(("Branches a second", number_text(rate, 3), "over the whole run"))
    peak = max((m.rss_bytes for m in summary.files.metrics if m.rss_bytes is not None), default=None)
    if peak is not None:
        entries.append(("Peak memory", size_text(peak), "resident, summed over processes"))
    return "".join(
        f'<div class="tile"><div class="name">{html.escape(name)}</div>'
        f'<div class="figure">{html.escape(figure)}</div>'
        f'<div class="detail">{html.escape(detail)}</div></div>'
        for name, figure, detail in entries
    )


def interval_text(value: Estimate | None) -> str:
    """The interval of a mean in words."""
    if value is None:
        return "no episode to average"
    if value.low is None or value.high is None:
        return f"n = {value.count:,}, too few or too equal for an interval"
    return f"95%: {number_text(value.low, 3)} to {number_text(value.high, 3)}, n = {value.count:,}"


def notes_block(notes: Sequence[str]) -> str:
    """What is missing or damaged; nothing when there is nothing to say."""
    if not notes:
        return ""
    items = "".join(f"<li>{html.escape(printable(note, 300))}</li>" for note in notes)
    return f'<div class="note"><ul>{items}</ul></div>'


def card(size: str, title: str, caption: str, body: str) -> str:
    """A card; `body` is HTML, the rest is text."""
    caption_html = f'<p class="caption">{html.escape(caption)}</p>' if caption else ""
    return f'<div class="card {size}"><h2>{html.escape(title)}</h2>{caption_html}{body}</div>'


def cuts_text(summary: RunSummary, details: Sequence[EpisodeDetail]) -> str:
    """How much of the run the explorer holds."""
    moves = [move for detail in details for move in detail.moves]
    num_trees = sum(move.tree is not None for move in moves)
    num_searched = sum(bool(move.visits) for move in moves)
    text = f"{len(details):,} of {summary.num_episodes:,} episodes"
    if num_searched:
        text += f", with the trees of {num_trees:,} of their {num_searched:,} searched moves"
    num_cut = sum(move.tree is not None and move.tree.num_nodes > len(move.tree.node_id) for move in moves)
    return text + (f"; {num_cut:,} large trees are cut to their most visited nodes." if num_cut else ".")


def failures_card(summary: RunSummary) -> str:
    """Every cause of failure, most frequent first."""
    if not summary.failures:
        return ""
    shown = summary.failures[:MAX_FAILURE_ROWS]
    rows = [
        (f"{group.num_final:,}", f"{group.num_retried:,}", group.boundary, printable(group.cause, 500))
        for group in shown
    ]
    body = table(("episodes lost", "attempts begun again", "boundary", "cause"), rows, numbers=(0, 1))
    return card("two-thirds", "Causes of failure", _of(len(shown), len(summary.failures), "causes"), body)


def episodes_card(summary: RunSummary, explorable: Collection[int]) -> str:
    """The first episodes as a table; those in the explorer have a button that opens them there."""
    if not summary.num_episodes:
        return ""
    episodes = summary.episodes(0, MAX_EPISODE_ROWS)
    header = ("", "task", "seed", "return", "length", "ending", "time", "attempt")
    head = "".join(f"<th{_class(i in (0, 2, 3, 4, 6, 7))}>{name}</th>" for i, name in enumerate(header))
    body = "".join(_episode_row(episode, episode.number in explorable) for episode in episodes)
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return card("two-thirds", "Episodes", _of(len(episodes), summary.num_episodes, "episodes"), table)


def config_card(summary: RunSummary) -> str:
    """What `run.json` says, folded."""
    if not summary.files.description:
        return ""
    text = json.dumps(summary.files.description, indent=2, sort_keys=True, ensure_ascii=True)
    if len(text) > _MAX_CONFIG_CHARS:
        text = text[:_MAX_CONFIG_CHARS] + "\n..."
    size = "third" if summary.num_episodes else "whole"
    body = f"<details><summary>run.json</summary><pre>{html.escape(text)}</pre></details>"
    return card(size, "Configuration", "What was run, with which versions.", body)


def explorer_section(cuts: str) -> str:
    """The place where the script shows a move and its tree."""
    return f"""<section class="card whole" id="explorer">
  <h2>A move and its search tree</h2>
  <p class="caption">{html.escape(cuts)}</p>
  <div class="controls">
    <label for="episode">Episode</label><select id="episode"></select>
    <button id="previous" type="button">Back</button>
    <input type="range" id="step" min="0" value="0" aria-label="Step">
    <button id="next" type="button">Next</button>
    <span id="position"></span>
  </div>
  <p class="note" id="failure" hidden></p>
  <div class="explorer" id="move">
    <div>
      <h3>Observation</h3><pre id="observation"></pre>
      <div id="info-part"><h3>Info</h3><pre id="info"></pre></div>
      <h3>Move</h3><table id="facts"></table>
      <div id="choices-part"><h3>Visits by action</h3><table class="choices" id="choices"></table></div>
    </div>
    <div>
      <div class="legend" id="legend"></div>
      <p class="empty" id="no-tree" hidden></p>
      <div id="tree"></div>
    </div>
  </div>
</section>"""


def _mean_text(value: Estimate | None) -> str:
    return "-" if value is None else number_text(value.mean)


def _of(shown: int, total: int, what: str) -> str:
    return f"{total:,} {what}." if shown == total else f"The first {shown:,} of {total:,} {what}."


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int]) -> str:
    """A table that scrolls in its card; the columns in `numbers` are set to the right."""
    head = "".join(f"<th{_class(i in numbers)}>{html.escape(name)}</th>" for i, name in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(f"<td{_class(i in numbers)}>{html.escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _episode_row(episode: Episode, is_explorable: bool) -> str:
    name = str(episode.number)
    if is_explorable:
        name = f'<button class="link" type="button" data-episode="{episode.number}">{episode.number}</button>'
    why = f": {printable(episode.failure, 200)}" if episode.failure else ""
    cells = (
        (True, name),
        (False, html.escape(printable(episode.task_id, 80))),
        (True, str(episode.seed)),
        (True, html.escape(number_text(episode.return_)) or "-"),
        (True, f"{episode.length:,}"),
        (False, f'<span class="badge {episode.ending}">{episode.ending}</span>{html.escape(why)}'),
        (True, html.escape(duration_text(episode.duration_s))),
        (True, str(episode.attempt + 1)),
    )
    return "<tr>" + "".join(f"<td{_class(is_number)}>{cell}</td>" for is_number, cell in cells) + "</tr>"


def _class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""
