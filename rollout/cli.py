"""The command line: one line per error, and a command is imported when it is called, not before.

A command is a module in `rollout.commands` that has either `command`, a function with typer annotations, or
`app`, a `typer.Typer` with subcommands. Only the module of the command that was named is imported, so
`rollout --help` does not pay for Ray, Parquet or plots.

Exit codes: 0 done, 1 a `RolloutError`, 2 bad usage or a `ConfigError`, 130 interrupted, 143 terminated.
Commands raise; the only place that turns an error into a line on stderr is `main`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from rollout.errors import RolloutError

__all__ = ["main"]

COMMANDS = {
    "run": "Play episodes in sandboxes and write their trajectories.",
    "report": "Write a run as one self-contained HTML page.",
    "show": "Show a run, or one of its episodes, in the terminal.",
    "diff": "Compare two runs.",
    "runs": "List the runs in a folder.",
    "replay": "Play an episode again and compare it with its record.",
    "export": "Write a run's trajectories in a format that a trainer loads.",
    "image": "Build and list guest images.",
    "checkpoint": "Move checkpoints between machines.",
    "doctor": "Say what this machine can do, and what to do about the rest.",
    "bench": "Measure sandboxes, search or the trajectory sink.",
}
"""Every command with its line of help, in the order of `rollout --help`; one without a module is left out."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    Args:
        arguments: The words after the program's name; `sys.argv[1:]` when None.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    named = next((word for word in words if not word.startswith("-")), None)
    try:
        build_app(named)(args=words, prog_name="rollout")
    except RolloutError as error:
        if debug:
            traceback.print_exception(error)
        print(f"rollout: {error.boundary} error: {error.message}".replace("\n", " "), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("rollout: interrupted", file=sys.stderr)
        sys.exit(130)


def build_app(named: str | None) -> typer.Typer:
    """The command line with the command `named` in full, and all others as their line of help."""
    app = typer.Typer(
        help="RL rollouts and Monte Carlo tree search over machines that can be forked.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for name, summary in COMMANDS.items():
        if importlib.util.find_spec(f"rollout.commands.{name}") is None:
            continue
        if name != named:
            app.command(name, help=summary)(_never_called)
            continue
        module = importlib.import_module(f"rollout.commands.{name}")
        if isinstance(group := getattr(module, "app", None), typer.Typer):
            app.add_typer(group, name=name, help=summary, no_args_is_help=True)
        else:
            app.command(name)(module.command)
    return app


def _root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback when something fails; may stand anywhere.")
    ] = False,
) -> None:
    """Takes the options of all commands; `main` has taken `--debug` out already, this documents it."""


def _never_called() -> None:
    """Stands for a command that was not named on this command line."""


if __name__ == "__main__":
    main()
