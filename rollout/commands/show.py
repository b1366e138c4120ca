"""`rollout show RUN [EPISODE]`: a run, or one of its episodes, in the terminal."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from rollout.commands.output import RUN_HELP, estimate_text, find_run, print_json, stdout_console, text_table
from rollout.errors import ConfigError
from rollout.report.summary import Episode, RunSummary, summarise
from rollout.report.text import duration_text, number_text, printable
from rollout.report.trees import Move, read_moves

__all__ = ["command", "episode_view", "find_episode", "run_view"]


def command(
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
    episode: Annotated[
        str | None, typer.Argument(help="Number of an episode, or the beginning of its id.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Most episodes or steps to list; 0 for all.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show a run, or the steps of one of its episodes."""
    summary = summarise(find_run(run))
    if episode is None:
        episodes = summary.episodes(0, limit or None)
        if json:
            print_json({**summary.to_json(), "listed": [asdict(entry) for entry in episodes]})
        else:
            stdout_console().print(*run_view(summary, episodes), sep="\n")
        return
    chosen = find_episode(summary, episode)
    moves = read_moves(summary.files.folder, [chosen.episode_id]).get(chosen.episode_id, [])
    if json:
        print_json({**asdict(chosen), "steps": [_move_json(move) for move in moves]})
    else:
        stdout_console().print(*episode_view(chosen, moves, limit), sep="\n")


def find_episode(summary: RunSummary, wanted: str) -> Episode:
    """The episode of a number (as listed) or of the beginning of an id (at least 6 characters).

    Raises:
        ConfigError: There is none, or more than one.
    """
    if wanted.isascii() and wanted.isdigit() and 1 <= int(wanted) <= summary.num_episodes:
        return summary.episodes(int(wanted) - 1, 1)[0]
    ids = summary.table.column("episode_id").to_pylist()
    matches = [
        index for index, episode_id in enumerate(ids) if len(wanted) >= 6 and episode_id.startswith(wanted)
    ]
    if len(matches) == 1:
        return summary.episodes(matches[0], 1)[0]
    if matches:
        raise ConfigError(f"{len(matches)} episodes begin with '{printable(wanted)}': give more of the id")
    raise ConfigError(
        f"there is no episode '{printable(wanted)}': give a number from 1 to {summary.num_episodes}, "
        "or at least 6 characters of an id"
    )


def run_view(summary: RunSummary, episodes: list[Episode]) -> list[RenderableType]:
    """What the terminal shows of a run."""
    committed = f"{summary.num_episodes:,}"
    if summary.num_planned is not None:
        committed += f" of {summary.num_planned:,} planned"
    facts = [
        ("run", printable(summary.files.run_id)),
        ("environment", printable(", ".join(summary.distinct("env_id"))) or "-"),
        (
            "engine, search",
            printable(", ".join(summary.distinct("engine") + summary.distinct("search"))) or "-",
        ),
        ("episodes", f"{committed}; {summary.num_failed:,} failed"),
        ("return", estimate_text(summary.mean_return)),
        ("length", estimate_text(summary.mean_length)),
        ("time", _speed_text(summary)),
    ]
    views: list[RenderableType] = [text_table(("", ""), facts)]
    if episodes:
        views.append(_episodes_table(summary, episodes))
    if summary.failures:
        rows = [
            (str(group.num_final), str(group.num_retried), group.boundary, printable(group.cause, 300))
            for group in summary.failures[:20]
        ]
        header = ("lost", "begun again", "boundary", "cause")
        views.append(text_table(header, rows, numbers=header[:2], title="Failures"))
    if summary.files.phases:
        rows = [
            (
                printable(p.phase, 40),
                duration_text(p.seconds),
                f"{p.calls:,}",
                duration_text(_per_call(p.seconds, p.calls)),
            )
            for p in summary.files.phases
        ]
        header = ("phase", "seconds", "calls", "a call")
        views.append(text_table(header, rows, numbers=header[1:], title="Where the time went"))
    views += [Text(f"note: {printable(note, 300)}", style="yellow") for note in summary.notes]
    return views


def episode_view(episode: Episode, moves: list[Move], limit: int) -> list[RenderableType]:
    """What the terminal shows of an episode."""
    facts = [
        ("episode", f"{episode.number}, {episode.episode_id}"),
        ("task, seed", f"{printable(episode.task_id, 80)}, {episode.seed}"),
        ("return", number_text(episode.return_) or "-"),
        ("ending", printable(f"{episode.ending} {episode.failure}".strip(), 300)),
        ("length, time", f"{episode.length}, {duration_text(episode.duration_s)}"),
    ]
    header = ("t", "observation", "action", "reward", "visits", "value", "visits by action", "")
    shown = moves[: limit or None]
    rows = [
        (
            str(move.t),
            printable(move.observation, 80),
            move.action or "",
            number_text(move.reward),
            number_text(move.visits),
            number_text(move.value),
            " ".join(f"{printable(action, 20)}:{count}" for action, count, _ in move.choices[:12]),
            move.ending,
        )
        for move in shown
    ]
    views: list[RenderableType] = [
        text_table(("", ""), facts),
        text_table(header, rows, numbers=("t", "reward", "visits", "value"), title="Steps"),
    ]
    if len(shown) < len(moves):
        views.append(Text(f"the first {len(shown)} of {len(moves)} rows; --limit 0 shows all"))
    return views


def _episodes_table(summary: RunSummary, episodes: list[Episode]) -> RenderableType:
    header = ("no.", "id", "task", "seed", "return", "length", "ending", "time", "attempt")
    rows = [
        (
            str(e.number),
            e.episode_id[:12],
            printable(e.task_id, 30),
            str(e.seed),
            number_text(e.return_) or "-",
            str(e.length),
            printable(f"{e.ending} {e.failure}".strip(), 120),
            duration_text(e.duration_s),
            str(e.attempt + 1),
        )
        for e in episodes
    ]
    count = len(episodes)
    title = (
        "Episodes"
        if count == summary.num_episodes
        else f"The first {count} of {summary.num_episodes} episodes"
    )
    return text_table(
        header, rows, numbers=("no.", "seed", "return", "length", "time", "attempt"), title=title
    )


def _speed_text(summary: RunSummary) -> str:
    if summary.wall_s is None:
        return "-"
    parts = [duration_text(summary.wall_s)]
    if summary.steps_per_s is not None:
        parts.append(f"{number_text(summary.steps_per_s, 3)} moves/s")
    if summary.branches_per_s is not None:
        parts.append(f"{number_text(summary.branches_per_s, 3)} branches/s")
    return ", ".join(parts)


def _per_call(seconds: float, calls: int) -> float | None:
    return seconds / calls if calls else None


def _move_json(move: Move) -> dict[str, object]:
    fields = asdict(move)
    del fields["tree"]  # it was not read
    return fields
