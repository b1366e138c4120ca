"""Rows of arrays: AlphaZero's training triples, and RLlib's transitions. Columns in, columns out.

`alphazero` has a row for each move that was searched: the observation, the legal actions, the share of visits
of each, the policy to train towards, the root's value and the return that followed.

`rllib` has a row for each action, with the observation before and after it. `action_logp` is the sum of a
language model's log-probabilities, or else the logarithm of the share that the search gave the action; null
where neither is known.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false
# The functions of pyarrow.compute are made when it is imported.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rollout.trajectory.export.context import Context
from rollout.trajectory.export.files import ParquetWriter
from rollout.trajectory.export.source import Chunk
from rollout.trajectory.schema import ACTION, OBSERVATION, list_of, readable_schema

__all__ = ["ALPHAZERO_COLUMNS", "RLLIB_COLUMNS", "alphazero_writer", "rllib_writer"]

ALPHAZERO_COLUMNS = (
    "t",
    OBSERVATION,
    ACTION,
    "legal_actions",
    "action_visits",
    "policy_target",
    "value",
    "n_step_return",
)
RLLIB_COLUMNS = (
    "t",
    OBSERVATION,
    ACTION,
    "reward",
    "terminated",
    "truncated",
    "info",
    "legal_actions",
    "policy_target",
    "logprobs",
)


def alphazero_writer(folder: Path, context: Context) -> ParquetWriter:
    """See this module."""
    steps = readable_schema("steps", context.run.schemas)
    schema = pa.schema(
        [
            pa.field("episode_id", pa.string()),
            pa.field("task_id", pa.string()),
            *(steps.field(name) for name in ("t", OBSERVATION, ACTION, "legal_actions")),
            pa.field("visit_policy", list_of(pa.float64())),
            *(steps.field(name) for name in ("policy_target", "value", "n_step_return")),
        ]
    )

    def make(chunk: Chunk, _: int) -> pa.Table:
        owners = _owners(chunk)
        steps = chunk.steps.append_column("owner", pa.array(owners))
        for name in (ACTION, "action_visits", "value"):
            steps = steps.filter(pc.is_valid(steps[name]))
        owner = steps["owner"]
        columns = [chunk.episodes["episode_id"].take(owner), chunk.episodes["task_id"].take(owner)]
        columns += [steps[name] for name in ("t", OBSERVATION, ACTION, "legal_actions")]
        columns.append(_shares(steps["action_visits"].combine_chunks()))
        columns += [steps[name] for name in ("policy_target", "value", "n_step_return")]
        return pa.Table.from_arrays(columns, schema=schema)

    return ParquetWriter(folder, context, schema, make)


def rllib_writer(folder: Path, context: Context) -> ParquetWriter:
    """See this module."""
    steps = readable_schema("steps", context.run.schemas)
    observation, action = steps.field(OBSERVATION), steps.field(ACTION)
    schema = pa.schema(
        [
            pa.field("eps_id", pa.string()),
            pa.field("t", pa.int64()),
            observation.with_name("obs"),
            action.with_name("actions"),
            pa.field("rewards", pa.float64()),
            observation.with_name("new_obs"),
            pa.field("terminateds", pa.bool_()),
            pa.field("truncateds", pa.bool_()),
            pa.field("infos", pa.string()),
            pa.field("action_logp", pa.float64()),
        ]
    )

    def make(chunk: Chunk, _: int) -> pa.Table:
        owners = _owners(chunk)
        is_last = np.ones(len(owners), dtype=bool)
        is_last[:-1] = owners[1:] != owners[:-1]
        rows = np.flatnonzero(pc.is_valid(chunk.steps[ACTION]).to_numpy() & ~is_last)
        steps = chunk.steps.take(pa.array(rows))
        columns = [
            chunk.episodes["episode_id"].take(pa.array(owners[rows])),
            steps["t"],
            steps[OBSERVATION],
            steps[ACTION],
            steps["reward"],
            chunk.steps[OBSERVATION].take(pa.array(rows + 1)),
            steps["terminated"],
            steps["truncated"],
            steps["info"],
            _log_probabilities(steps),
        ]
        return pa.Table.from_arrays(columns, schema=schema)

    return ParquetWriter(folder, context, schema, make)


def _owners(chunk: Chunk) -> npt.NDArray[np.int64]:
    """Index of the episode of each step, [num_steps]."""
    return np.repeat(np.arange(chunk.episodes.num_rows), np.diff(chunk.step_offsets))


def _shares(visits: pa.ListArray) -> pa.ListArray:
    """Each list divided by its sum; a list without visits stays all zeros."""
    flat = visits.flatten().to_numpy().astype(np.float64)
    lengths = pc.list_value_length(visits).to_numpy()
    owners = np.repeat(np.arange(len(lengths)), lengths)
    totals = np.bincount(owners, weights=flat, minlength=len(lengths))
    shares = flat / np.maximum(totals, 1.0)[owners]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(shares), type=list_of(pa.float64()))


def _log_probabilities(steps: pa.Table) -> pa.Array:
    """Of the actions that were played, [N], null where unknown."""
    found = np.full(steps.num_rows, np.nan)
    targets, legal = steps["policy_target"].combine_chunks(), steps["legal_actions"].combine_chunks()
    known = pc.and_(pc.is_valid(targets), pc.is_valid(legal)).to_numpy(zero_copy_only=False)
    if pa.types.is_integer(steps[ACTION].type) and known.any():
        rows = np.flatnonzero(known)
        places = pa.array(rows)
        lengths = pc.list_value_length(legal.take(places)).to_numpy()
        owners = np.repeat(rows, lengths)
        is_played = legal.take(places).flatten().to_numpy() == steps[ACTION].to_numpy()[owners]
        shares = targets.take(places).flatten().to_numpy()
        with np.errstate(divide="ignore"):
            found[owners[is_played]] = np.log(shares[is_played])
    spoken = steps["logprobs"].combine_chunks()
    if spoken.null_count < len(spoken):
        rows = np.flatnonzero(spoken.is_valid().to_numpy(zero_copy_only=False))
        lengths = pc.list_value_length(spoken.take(pa.array(rows))).to_numpy()
        owners = np.repeat(np.arange(len(rows)), lengths)
        flat = spoken.flatten().to_numpy().astype(np.float64)
        found[rows] = np.bincount(owners, weights=flat, minlength=len(rows))
    return pa.array(found, mask=~np.isfinite(found))
