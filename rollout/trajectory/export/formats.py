"""All formats by name, and the export itself.

An export is written beside its folder, as `.<name>.partial`, and takes its name when it is whole; whatever
stops it leaves the name as it was.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from rollout.errors import SinkError
from rollout.trajectory.export import arrays, chat, documents, minari, preference
from rollout.trajectory.export.context import Context, ExportOptions, make_context
from rollout.trajectory.export.files import Writer
from rollout.trajectory.export.source import Source, split_of
from rollout.trajectory.export.trees import NODE_COLUMNS
from rollout.trajectory.manifest import Problem
from rollout.trajectory.reader import open_run
from rollout.trajectory.storage import Location, sink_error

__all__ = ["FORMATS", "ExportReport", "Format", "export_run"]

TRAIN: str = "train"
TEST: str = "test"


@dataclass(frozen=True, slots=True)
class Format:
    """One format.

    Attributes:
        summary: One line.
        open: Makes the writer of a split.
        step_columns: What it reads of `steps`.
        node_columns: What it reads of `nodes`; empty for nothing.
    """

    summary: str
    open: Callable[[Path, Context], Writer]
    step_columns: tuple[str, ...]
    node_columns: tuple[str, ...] = ()


_PROMPTS = chat.PROMPT_COLUMNS
_SIBLINGS = preference.PREFERENCE_COLUMNS

FORMATS: dict[str, Format] = {
    "verl-rl": Format("verl, reinforcement learning: a prompt per move", chat.verl_rl_writer, _PROMPTS),
    "verl-sft": Format("verl, supervised: a conversation per episode", chat.sft_writer, chat.SFT_COLUMNS),
    "trl-sft": Format("TRL, supervised: a conversation per episode", chat.sft_writer, chat.SFT_COLUMNS),
    "trl-dpo": Format("TRL, preference pairs of siblings", preference.dpo_writer, _SIBLINGS, NODE_COLUMNS),
    "trl-kto": Format(
        "TRL, completions that are desirable or not", preference.kto_writer, _SIBLINGS, NODE_COLUMNS
    ),
    "trl-prm": Format(
        "TRL, step labels of the paths of a tree", preference.prm_writer, _SIBLINGS, NODE_COLUMNS
    ),
    "grpo": Format(
        "siblings as a group, with their advantages", preference.grpo_writer, _SIBLINGS, NODE_COLUMNS
    ),
    "alphazero": Format(
        "observation, visit distribution and value of each move",
        arrays.alphazero_writer,
        arrays.ALPHAZERO_COLUMNS,
    ),
    "skyrl": Format("SkyRL: a prompt per move", chat.skyrl_writer, _PROMPTS),
    "atif": Format("ATIF 1.8: a document per episode", documents.AtifWriter, documents.ATIF_COLUMNS),
    "minari": Format("Minari 0.5: a dataset of episodes", minari.MinariWriter, minari.MINARI_COLUMNS),
    "rllib": Format("RLlib: a row per transition", arrays.rllib_writer, arrays.RLLIB_COLUMNS),
    "jsonl": Format(
        "JSON lines: an episode with all that belongs to it",
        documents.json_lines_writer,
        documents.JSON_STEP_COLUMNS,
        documents.JSON_NODE_COLUMNS,
    ),
}
"""Every format that `rollout export` writes."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export came to.

    Attributes:
        folder: Where it is.
        num_episodes: Episodes that were selected.
        num_records: Records of each split.
        problems: What was skipped in the run.
    """

    folder: Path
    num_episodes: int
    num_records: dict[str, int]
    problems: tuple[Problem, ...]


def export_run(
    run: Location,
    format_name: str,
    out: Path,
    options: ExportOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> ExportReport:
    """Writes a run in a format; any size, in bounded memory, in an order that depends on the run alone.

    Args:
        run: Folder of the run.
        format_name: A key of `FORMATS`.
        out: Folder to make.
        options: What to export, and how.
        overwrite: Replace `out` if it is there.
        progress: Called with episodes done and in total.

    Raises:
        SinkError: There is no such format or run, `out` is in the way, or something cannot be read or
            written.
    """
    if format_name not in FORMATS:
        raise SinkError(f"there is no format {format_name!r}: there are {', '.join(FORMATS)}")
    form, options = FORMATS[format_name], options or ExportOptions()
    opened = open_run(run)
    source = Source(opened, options.selection, form.step_columns, form.node_columns)
    splits = [TRAIN, TEST] if options.test_fraction else [TRAIN]
    with _new_folder(out.absolute(), overwrite) as folder, contextlib.ExitStack() as stack:
        writers: dict[str, Writer] = {}
        for split in splits:
            writers[split] = form.open(folder, make_context(opened, options, split))
            stack.callback(writers[split].close)
        num_records = dict.fromkeys(splits, 0)
        num_done = 0
        for chunk in source.chunks():
            parts = [chunk]
            if TEST in splits:
                tasks = chunk.episodes["task_id"].to_pylist()
                parts = chunk.split(split_of(tasks, options.test_fraction, options.split_seed))
            for split, part in zip(splits, parts, strict=True):
                num_records[split] += writers[split].write(part)
            num_done += chunk.episodes.num_rows
            progress(num_done, source.num_episodes)
    return ExportReport(out, source.num_episodes, num_records, opened.problems)


@contextlib.contextmanager
def _new_folder(out: Path, overwrite: bool) -> Generator[Path, None, None]:
    """A folder that becomes `out` if all goes well, and is gone otherwise."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
            raise SinkError(f"{out} is there already: choose another folder, or overwrite it")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise sink_error(error, f"cannot make {out}") from error
    try:
        yield partial
        if out.is_dir():
            shutil.rmtree(out)
        elif out.exists():
            out.unlink()
        partial.replace(out)
    except OSError as error:
        raise sink_error(error, f"cannot write {out}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
