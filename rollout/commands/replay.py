"""`rollout replay RUN EPISODE`: plays an episode, or a tree of its searches, again and compares it."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from rollout.commands.output import RUN_HELP, find_run, print_json, stderr_console
from rollout.commands.show import find_episode
from rollout.config import RunConfig
from rollout.errors import ConfigError
from rollout.report.summary import summarise
from rollout.report.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rollout.replay import RecordedEpisode, Replay, Row

__all__ = ["command"]


def command(
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
    episode: Annotated[str, typer.Argument(help="Number of an episode, or the beginning of its id.")],
    move: Annotated[
        int | None, typer.Option(min=0, help="Play the search of this move again, branch by branch.")
    ] = None,
    node: Annotated[
        int | None, typer.Option(min=0, help="Only what is below this node of that search's tree.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="Play it on another engine: inline, process or microvm.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Play an episode again and compare it with its record; exit 1 at the first difference."""
    from rollout.fleet.record import read_description
    from rollout.fleet.resume import recorded_config
    from rollout.replay import read_episode, read_tree

    if node is not None and move is None:
        raise ConfigError("a node is one of the tree of a move: give --move too")
    folder = find_run(run)
    description = read_description(folder)
    config = _on_engine(recorded_config(description), engine)
    chosen = find_episode(summarise(folder), episode)
    recorded = read_episode(folder, chosen.episode_id)
    tree = None if move is None else read_tree(folder, chosen.episode_id, move)
    num_expected = recorded.episode["length"] if move is None else move + len(tree or ()) - 1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=stderr_console(), transient=True) as bar:
        task = bar.add_task("playing again", total=num_expected)
        replay, played_on = asyncio.run(
            _replay(config, recorded, tree, (move or 0, node or 0), lambda: bar.advance(task))
        )
    notes = _notes(description, recorded, played_on)
    if json:
        print_json(
            {
                "episode_id": chosen.episode_id,
                "engine": played_on["engine"],
                "equal": replay.difference is None,
                **asdict(replay),
                "notes": notes,
            }
        )
    else:
        _print(chosen.number, replay, played_on["engine"], notes)
    if replay.difference is not None:
        raise typer.Exit(1)


async def _replay(
    config: RunConfig,
    recorded: RecordedEpisode,
    tree: list[Row] | None,
    place: tuple[int, int],
    on_progress: Callable[[], None],
) -> tuple[Replay, dict[str, str]]:
    """What came of it, and what it was played on."""
    from rollout.fleet.local import prepared_brancher
    from rollout.loading import load_env
    from rollout.replay import Replayer

    env = load_env(config.env)
    async with prepared_brancher(config, env) as (brancher, prepared):
        replayer = Replayer(env, brancher, config.max_steps, on_progress)
        if tree is None:
            replay = await replayer.play_episode(recorded)
        else:
            replay = await replayer.play_tree(recorded, tree, *place)
    return replay, {"engine": prepared.engine, "image_digest": prepared.image_digest}


def _on_engine(config: RunConfig, kind: str | None) -> RunConfig:
    if kind is None:
        return config
    if kind not in ("inline", "process", "microvm"):
        raise ConfigError(f"there is no engine {printable(kind)!r}: there are inline, process and microvm")
    return config.model_copy(update={"engine": config.engine.model_copy(update={"kind": kind})})


def _notes(
    description: Mapping[str, Any], recorded: RecordedEpisode, played_on: Mapping[str, str]
) -> list[str]:
    """What may explain a difference."""
    from rollout.fleet.record import versions

    notes: list[str] = []
    was = {"engine": recorded.episode["engine"], "image_digest": recorded.episode["image_digest"]}
    for key, name in (("engine", "engine"), ("image_digest", "guest image")):
        if was[key] is not None and was[key] != played_on[key]:
            notes.append(f"the {name} was {was[key] or 'none'}, and is {played_on[key] or 'none'} now")
    for package, version in versions().items():
        if description["versions"].get(package) not in (version, None):
            notes.append(f"{package} was {description['versions'][package]}, and is {version} now")
    if any(step["rng_policy"] == "unique" for step in recorded.steps):
        notes.append("it was played with unique randomness, which cannot be had again")
    if recorded.episode["failure"] is not None:
        notes.append("the episode failed: it is played again as far as it is recorded")
    return notes


def _print(number: int, replay: Replay, engine: str, notes: list[str]) -> None:
    counts = f"{replay.num_moves} moves"
    if replay.num_branches or replay.num_left_out:
        counts += f" and {replay.num_branches} branches of a search"
    verdict = "all equal" if replay.difference is None else "equal before the first difference"
    print(f"episode {number}, played again on {engine}: {counts}, {verdict}")
    if replay.num_left_out:
        print(f"left out: {replay.num_left_out} branches that had failed")
    if (first := replay.difference) is not None:
        values = f"recorded {printable(first.recorded)}, played {printable(first.played)}"
        print(f"first difference: {first.where}, {first.what}: {values}")
    for note in notes:
        print(f"note: {printable(note)}")
