"""Conversations: verl's and TRL's supervised datasets, and the prompt datasets of verl and SkyRL.

A supervised row is an episode. A prompt row is a move: the prompt is what was said until the observation, and
the ground truth is the action that was played, which is what the search settled on.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false
# The functions of pyarrow.compute are made when it is imported.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollout.trajectory.export.context import Context
from rollout.trajectory.export.files import ParquetWriter
from rollout.trajectory.export.source import Chunk
from rollout.trajectory.export.text import MESSAGES, Conversations

__all__ = ["PROMPT_COLUMNS", "SFT_COLUMNS", "sft_writer", "skyrl_writer", "verl_rl_writer"]

SFT_COLUMNS = ("observation", "action")
PROMPT_COLUMNS = ("t", "observation", "action", "value", "n_step_return")

_SFT = pa.schema(
    [
        ("messages", MESSAGES),
        ("episode_id", pa.string()),
        ("task_id", pa.string()),
        ("return", pa.float64()),
    ]
)
_EXTRA = pa.struct(
    [
        ("split", pa.string()),
        ("index", pa.int64()),
        ("episode_id", pa.string()),
        ("task_id", pa.string()),
        ("t", pa.int64()),
        ("value", pa.float64()),
        ("n_step_return", pa.float64()),
    ]
)
_ANSWER = [("ground_truth", pa.string())]
_VERL_RL = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", MESSAGES),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), *_ANSWER])),
        ("extra_info", _EXTRA),
    ]
)
_SKYRL = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", MESSAGES),
        ("env_class", pa.string()),
        ("reward_spec", pa.struct([("method", pa.string()), *_ANSWER])),
        ("extra_info", _EXTRA),
    ]
)


def sft_writer(folder: Path, context: Context) -> ParquetWriter:
    """`messages` of each episode with at least one action, which is their last word."""
    return ParquetWriter(folder, context, _SFT, functools.partial(_sft, context))


def verl_rl_writer(folder: Path, context: Context) -> ParquetWriter:
    """Verl's prompts for reinforcement learning, one per move."""

    def make(chunk: Chunk, first: int) -> pa.Table:
        rows = [
            {
                "data_source": row["env_id"],
                "prompt": row["prompt"],
                "ability": "agent",
                "reward_model": {"style": "rule", "ground_truth": row["answer"]},
                "extra_info": row["extra"],
            }
            for row in _prompts(context, chunk, first)
        ]
        return pa.Table.from_pylist(rows, schema=_VERL_RL)

    return ParquetWriter(folder, context, _VERL_RL, make)


def skyrl_writer(folder: Path, context: Context) -> ParquetWriter:
    """SkyRL's prompts, one per move."""

    def make(chunk: Chunk, first: int) -> pa.Table:
        rows = [
            {
                "data_source": row["env_id"],
                "prompt": row["prompt"],
                "env_class": row["env_id"],
                "reward_spec": {"method": "rule", "ground_truth": row["answer"]},
                "extra_info": row["extra"],
            }
            for row in _prompts(context, chunk, first)
        ]
        return pa.Table.from_pylist(rows, schema=_SKYRL)

    return ParquetWriter(folder, context, _SKYRL, make)


def _sft(context: Context, chunk: Chunk, _: int) -> pa.Table:
    talk = Conversations.of(chunk, context.options.system, None)
    played = [index for index in range(chunk.episodes.num_rows) if talk.num_moves(index)]
    episodes = chunk.episodes.take(pa.array(played, pa.int64()))
    messages = pa.array([talk.whole(index) for index in played], MESSAGES)
    columns = [messages, *(episodes[name] for name in ("episode_id", "task_id", "return"))]
    return pa.Table.from_arrays(columns, schema=_SFT)


def _prompts(context: Context, chunk: Chunk, first: int) -> list[dict[str, Any]]:
    talk = Conversations.of(chunk, context.options.system, context.options.history)
    moves = chunk.steps["t"].to_pylist()
    values = chunk.steps["value"].to_pylist()
    returns = chunk.steps["n_step_return"].to_pylist()
    columns = (chunk.episodes[name].to_pylist() for name in ("episode_id", "task_id", "env_id"))
    rows: list[dict[str, Any]] = []
    for episode, (episode_id, task_id, env_id) in enumerate(zip(*columns, strict=True)):
        start = int(chunk.step_offsets[episode])
        for t in range(talk.num_moves(episode)):
            row = start + t
            extra = {
                "split": context.split,
                "index": first + len(rows),
                "episode_id": episode_id,
                "task_id": task_id,
                "t": moves[row],
                "value": values[row],
                "n_step_return": returns[row],
            }
            prompt = talk.prompt(episode, t)
            rows.append({"env_id": env_id, "prompt": prompt, "answer": talk.actions[row], "extra": extra})
    return rows
