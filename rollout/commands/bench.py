"""`rollout bench sandbox|search|sink`: prints figures with medians, quartiles and the machine.

A table is printed as soon as its subject is measured; what is measured when a benchmark is interrupted is
still printed and written. Exit code 0 also when a target is missed: a benchmark measures, it does not judge.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.text import Text

from rollout.commands.bench_machine import describe_machine
from rollout.commands.bench_row import BenchRow, markdown_table
from rollout.commands.output import stderr_console, stdout_console, text_table
from rollout.errors import ConfigError, SinkError

__all__ = ["app"]

app = typer.Typer(help="Measure sandboxes, search or the trajectory sink.")

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")]
MarkdownFile = Annotated[
    Path | None, typer.Option("--markdown", help="Write them to this file as Markdown tables, too.")
]


@app.command()
def sandbox(
    engine: Annotated[
        list[str] | None, typer.Option(help="Engine to measure; may be given more than once. All by default.")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Measurements of each figure.")] = 30,
    cycles: Annotated[int, typer.Option(min=1, help="Create-and-destroy cycles of the leak count.")] = 200,
    live: Annotated[
        int, typer.Option(min=0, help="Sandboxes alive at once, 1,000 for instance; 0 leaves it out.")
    ] = 0,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Section to measure (`cycles`, `live-at-once`, ...); may be given more than once."),
    ] = None,
    json_file: JsonFile = None,
    markdown: MarkdownFile = None,
) -> None:
    """Clones, checkpoints and whole branches on each engine."""
    from rollout.commands.bench_engine import ENGINE_KINDS, EngineKind
    from rollout.commands.bench_sandbox import rows, section_names

    kinds: list[EngineKind] = [kind for kind in ENGINE_KINDS if not engine or kind in engine]
    if unknown := sorted(set(engine or ()) - set(ENGINE_KINDS)):
        raise ConfigError(f"there is no engine {unknown[0]!r}: there are {', '.join(ENGINE_KINDS)}")
    names = section_names(kinds)
    if unknown := sorted(set(only or ()) - set(names)):
        raise ConfigError(f"no engine here has a section {unknown[0]!r}: there are {', '.join(names)}")
    if "live-at-once" in (only or ()) and not live:
        raise ConfigError("live-at-once needs to know how many: --live 1000")
    measured = rows(kinds, samples=samples, cycles=cycles, live=live, only=only or ())
    _run("sandbox", measured, json_file, markdown)


@app.command()
def search(
    episodes: Annotated[
        int, typer.Option(min=1, help="Episodes of FrozenLake at each budget; 100 take half an hour.")
    ] = 20,
    games: Annotated[int, typer.Option(min=1, help="Games of tic-tac-toe.")] = 200,
    budget: Annotated[
        list[int] | None, typer.Option(min=1, help="Simulations a move; 200, 1000 and 5000 by default.")
    ] = None,
    exact_up_to: Annotated[
        int, typer.Option(min=0, help="Largest budget whose whole policy is valued, too.")
    ] = 200,
    json_file: JsonFile = None,
    markdown: MarkdownFile = None,
) -> None:
    """Simulations a second, cost and memory of nodes, quality of play."""
    from rollout.commands.bench_search import rows

    budgets = tuple(budget or (200, 1000, 5000))
    measured = rows(episodes=episodes, games=games, budgets=budgets, exact_up_to=exact_up_to)
    _run("search", measured, json_file, markdown)


@app.command()
def sink(json_file: JsonFile = None, markdown: MarkdownFile = None) -> None:
    """Rows a second of the trajectory sink, log and sync included, and of exports."""
    _run("sink", _rows_of("bench_sink"), json_file, markdown)


def _rows_of(module: str) -> Iterator[BenchRow]:
    return cast("Iterator[BenchRow]", importlib.import_module(f"rollout.commands.{module}").rows())


def _run(name: str, rows: Iterable[BenchRow], json_file: Path | None, markdown: Path | None) -> None:
    """Measures, prints, writes."""
    for path in (json_file, markdown):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"cannot write {path}: its folder does not exist")
    machine = describe_machine()
    console = stdout_console()
    console.print(Text(", ".join(f"{key} {value}" for key, value in machine.items())), soft_wrap=True)
    measured: list[BenchRow] = []
    num_printed = 0
    try:
        for row in _watched(rows):
            if measured and row.subject != measured[-1].subject:
                _print_table(measured[num_printed:])
                num_printed = len(measured)
            measured.append(row)
    finally:
        _print_table(measured[num_printed:])
        if json_file is not None:
            figures = [row.to_json() for row in measured]
            _write(
                json_file, json.dumps({"bench": name, "machine": machine, "rows": figures}, indent=2) + "\n"
            )
        if markdown is not None:
            _write(markdown, markdown_table(measured, machine))


def _watched(rows: Iterable[BenchRow]) -> Iterator[BenchRow]:
    """The rows as they come, while standard error says what was measured last."""
    with stderr_console().status("measuring") as status:
        for row in rows:
            status.update(f"measuring; {row.subject} {row.name}: {row.cells()[1]}")
            yield row


def _print_table(rows: list[BenchRow]) -> None:
    """The table of rows of one subject; nothing without rows."""
    if not rows:
        return
    header = (rows[0].subject or "what", "median", "quartiles", "target", "beside")
    table = text_table(header, [row.cells() for row in rows], numbers=("median", "target"))
    stdout_console().print(Text(""), table, sep="\n")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SinkError(f"cannot write {path}: {error.strerror}") from error
