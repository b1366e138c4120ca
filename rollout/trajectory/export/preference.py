"""What siblings teach, in TRL's forms: preference pairs, desirable completions, step labels, advantages.

All prompts are states of the episode as it was played: a node below holds no observation, so the children of
each move's root are what can be compared, and a path through a tree is a list of actions from such a state.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false
# The functions of pyarrow.compute are made when it is imported.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollout.trajectory.export.context import Context
from rollout.trajectory.export.files import ParquetWriter
from rollout.trajectory.export.source import Chunk
from rollout.trajectory.export.targets import advantages, candidates, leaf_paths, preference_pairs
from rollout.trajectory.export.text import MESSAGES, Conversations, Message
from rollout.trajectory.export.trees import MoveTree, move_trees
from rollout.trajectory.schema import list_of

__all__ = ["PREFERENCE_COLUMNS", "dpo_writer", "grpo_writer", "kto_writer", "prm_writer"]

PREFERENCE_COLUMNS = ("observation", "action")

_PLACE = [("episode_id", pa.string()), ("task_id", pa.string()), ("t", pa.int64())]
_DPO = pa.schema(
    [("prompt", MESSAGES), ("chosen", MESSAGES), ("rejected", MESSAGES), ("margin", pa.float64()), *_PLACE]
)
_KTO = pa.schema([("prompt", MESSAGES), ("completion", MESSAGES), ("label", pa.bool_()), *_PLACE])
_PRM = pa.schema(
    [
        ("prompt", pa.string()),
        ("completions", list_of(pa.string())),
        ("labels", list_of(pa.bool_())),
        *_PLACE,
    ]
)
_GRPO = pa.schema(
    [
        ("prompt", MESSAGES),
        ("completion", MESSAGES),
        ("reward", pa.float64()),
        ("group", pa.string()),
        ("group_size", pa.int64()),
        ("advantage", pa.float64()),
        ("advantage_leave_one_out", pa.float64()),
        ("advantage_tree", pa.float64()),
        ("visits", pa.int64()),
        *_PLACE,
    ]
)

_Rows = Callable[[Context, MoveTree, Conversations], Iterator[dict[str, Any]]]


def dpo_writer(folder: Path, context: Context) -> ParquetWriter:
    """The best child of a root as `chosen`, each clearly worse sibling as `rejected`."""
    return _writer(folder, context, _DPO, _dpo, depth=1)


def kto_writer(folder: Path, context: Context) -> ParquetWriter:
    """Each child of a root as a completion, desirable if it is no worse than the root's value."""
    return _writer(folder, context, _KTO, _kto, depth=1)


def prm_writer(folder: Path, context: Context) -> ParquetWriter:
    """Each path from a root to a leaf as steps, right where the state is no worse than the root's value."""
    return _writer(folder, context, _PRM, _prm, depth=context.options.max_depth)


def grpo_writer(folder: Path, context: Context) -> ParquetWriter:
    """Each child of a root with its advantages over its siblings: a group is a node."""
    return _writer(folder, context, _GRPO, _grpo, depth=1)


def _writer(
    folder: Path, context: Context, schema: pa.Schema, rows_of: _Rows, depth: int | None
) -> ParquetWriter:
    def make(chunk: Chunk, _: int) -> pa.Table:
        talk = Conversations.of(chunk, context.options.system, context.options.history)
        episode_ids, task_ids = (chunk.episodes[name].to_pylist() for name in ("episode_id", "task_id"))
        rows: list[dict[str, Any]] = []
        for move in move_trees(chunk, depth):
            if move.t >= chunk.step_offsets[move.episode + 1] - chunk.step_offsets[move.episode]:
                continue  # the episode failed in this move: its observation is not there
            place = {"episode_id": episode_ids[move.episode], "task_id": task_ids[move.episode], "t": move.t}
            rows += [{**row, **place} for row in rows_of(context, move, talk)]
        return pa.Table.from_pylist(rows, schema=schema)

    return ParquetWriter(folder, context, schema, make)


def _dpo(context: Context, move: MoveTree, talk: Conversations) -> Iterator[dict[str, Any]]:
    group = candidates(move.tree, context.discount, context.options.min_visits)
    pairs = list(preference_pairs(group, context.options.margin))
    prompt = talk.prompt(move.episode, move.t) if pairs else []
    for chosen, rejected in pairs:
        yield {
            "prompt": prompt,
            "chosen": _said(chosen.action),
            "rejected": _said(rejected.action),
            "margin": chosen.q - rejected.q,
        }


def _kto(context: Context, move: MoveTree, talk: Conversations) -> Iterator[dict[str, Any]]:
    if move.root_value is None:
        return
    prompt = talk.prompt(move.episode, move.t)
    for candidate in candidates(move.tree, context.discount, context.options.min_visits):
        yield {
            "prompt": prompt,
            "completion": _said(candidate.action),
            "label": candidate.q >= move.root_value,
        }


def _prm(context: Context, move: MoveTree, talk: Conversations) -> Iterator[dict[str, Any]]:
    threshold = move.root_value
    if threshold is None:
        return
    prompt = talk.prompt_text(move.episode, move.t)
    for path in leaf_paths(move.tree, context.options.min_visits):
        gained, scale = 0.0, 1.0
        labels: list[bool] = []
        for node in path:  # the return on the way and the value at its end, seen from the root
            gained += scale * (node.reward or 0.0)
            scale *= context.discount
            labels.append(gained + scale * (node.value or 0.0) >= threshold)
        yield {"prompt": prompt, "completions": [node.action for node in path], "labels": labels}


def _grpo(context: Context, move: MoveTree, talk: Conversations) -> Iterator[dict[str, Any]]:
    group = candidates(move.tree, context.discount, context.options.min_visits)
    if len(group) < 2:
        return
    prompt = talk.prompt(move.episode, move.t)
    episode_id = talk.chunk.episodes["episode_id"][move.episode].as_py()
    for candidate, advantage in zip(group, advantages(group, move.root_value), strict=True):
        yield {
            "prompt": prompt,
            "completion": _said(candidate.action),
            "reward": candidate.q,
            "group": f"{episode_id}/{move.t}",
            "group_size": len(group),
            "advantage": advantage.group,
            "advantage_leave_one_out": advantage.leave_one_out,
            "advantage_tree": advantage.tree,
            "visits": candidate.visits,
        }


def _said(action: str) -> list[Message]:
    return [{"role": "assistant", "content": action}]
