"""Episodes as JSON documents: ATIF 1.8 (a file per episode), and plain JSON lines with everything.

In an ATIF trajectory the user says the first observation; each action of the agent is a call of the tool
`step`, and what the environment answered is that step's observation. The reward, and where the step stands in
its tree, is in `extra`. Steps that an episode shares with the one that it branched from are marked as copied
context.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from rollout import __version__
from rollout.trajectory.export.context import Context
from rollout.trajectory.export.files import LinesWriter
from rollout.trajectory.export.source import Chunk
from rollout.trajectory.export.text import to_texts, to_values
from rollout.trajectory.schema import ACTION, OBSERVATION

__all__ = ["ATIF_COLUMNS", "JSON_NODE_COLUMNS", "JSON_STEP_COLUMNS", "AtifWriter", "json_lines_writer"]

_ATIF_EXTRA = (
    "reward",
    "terminated",
    "truncated",
    "value",
    "visits",
    "node_id",
    "checkpoint_id",
    "state_hash",
    "rng_policy",
    "rng_seed",
)
ATIF_COLUMNS = ("t", OBSERVATION, ACTION, "tokens", "logprobs", "info", *_ATIF_EXTRA)

JSON_STEP_COLUMNS = (
    "t",
    OBSERVATION,
    ACTION,
    "reward",
    "terminated",
    "truncated",
    "info",
    "state_hash",
    "checkpoint_id",
    "node_id",
    "visits",
    "value",
    "legal_actions",
    "action_visits",
    "policy_target",
    "n_step_return",
    "rng_policy",
    "rng_seed",
    "tokens",
    "logprobs",
)
JSON_NODE_COLUMNS = (
    "t",
    "node_id",
    "parent_id",
    "depth",
    ACTION,
    "visits",
    "value",
    "prior",
    "reward",
    "terminated",
    "truncated",
    "checkpoint_id",
    "state_hash",
    "rng_policy",
    "rng_seed",
)


class AtifWriter:
    """A file `<split>/<episode id>.json` per episode.

    Args:
        folder: The export's folder.
        context: What the writer knows.
    """

    def __init__(self, folder: Path, context: Context) -> None:
        self._folder = folder / context.split
        self._folder.mkdir()
        self._run_id = context.run.run_id

    def write(self, chunk: Chunk) -> int:
        """See `rollout.trajectory.export.files.Writer`."""
        steps = {name: to_values(chunk.steps, name) for name in ATIF_COLUMNS}
        steps["said"], steps["seen"] = to_texts(chunk.steps, ACTION), to_texts(chunk.steps, OBSERVATION)
        count = 0
        for index, episode in enumerate(chunk.episodes.to_pylist()):
            first, stop = (int(offset) for offset in chunk.step_offsets[index : index + 2])
            if first == stop:
                continue  # it failed before its first observation: ATIF has no trajectory without a step
            document = self._document(episode, {name: column[first:stop] for name, column in steps.items()})
            path = self._folder / f"{episode['episode_id']}.json"
            path.write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")
            count += 1
        return count

    def close(self) -> None:
        """See `rollout.trajectory.export.files.Writer`."""

    def _document(self, episode: dict[str, Any], steps: dict[str, list[Any]]) -> dict[str, Any]:
        num_copied = len(episode["branch_path"] or ()) if episode["parent_episode_id"] else 0
        opening = {
            "step_id": 1,
            "timestamp": episode["started_at"].isoformat(),
            "source": "user",
            "message": steps["seen"][0],
            "extra": _known({"info": json.loads(steps["info"][0]), "state_hash": steps["state_hash"][0]}),
        }
        turns = [
            _agent_step(steps, t, is_copied=t < num_copied)
            for t, said in enumerate(steps["said"])
            if said is not None
        ]
        if num_copied:
            opening["is_copied_context"] = True
        extra = {
            name: episode[name]
            for name in (
                "env_id",
                "task_id",
                "group_id",
                "sample",
                "attempt",
                "seed",
                "engine",
                "search",
                "return",
                "terminated",
                "truncated",
                "failure",
                "parent_episode_id",
                "branch_path",
            )
        }
        return {
            "schema_version": "ATIF-v1.8",
            "session_id": self._run_id,
            "trajectory_id": episode["episode_id"],
            "agent": {
                "name": "rollout",
                "version": __version__,
                "model_name": episode["policy"],
            },
            "steps": [opening, *turns],
            "final_metrics": {"total_steps": 1 + len(turns)},
            "extra": _known(extra),
        }


def _agent_step(steps: dict[str, list[Any]], t: int, *, is_copied: bool) -> dict[str, Any]:
    call_id = f"step-{t}"
    step: dict[str, Any] = {
        "step_id": t + 2,
        "source": "agent",
        "message": "",
        "tool_calls": [
            {"tool_call_id": call_id, "function_name": "step", "arguments": {"action": steps[ACTION][t]}}
        ],
        "extra": {"t": t, **_known({name: steps[name][t] for name in _ATIF_EXTRA})},
    }
    if t + 1 < len(steps["seen"]):
        results = [{"source_call_id": call_id, "content": steps["seen"][t + 1]}]
        step["observation"] = {"results": results}
    metrics = _known({"completion_token_ids": steps["tokens"][t], "logprobs": steps["logprobs"][t]})
    if metrics:
        step["metrics"] = {"completion_tokens": len(steps["tokens"][t] or steps["logprobs"][t]), **metrics}
    if is_copied:
        step["is_copied_context"] = True
    return step


def json_lines_writer(folder: Path, context: Context) -> LinesWriter:
    """A line per episode: its row, `steps` and `nodes`, all columns, times as text."""
    options = context.options

    def make(chunk: Chunk) -> Iterator[dict[str, Any]]:
        steps = _records(chunk.steps)
        nodes = _records(chunk.nodes)
        for index, episode in enumerate(chunk.episodes.to_pylist()):
            first_step, stop_step = chunk.step_offsets[index : index + 2]
            first_node, stop_node = chunk.node_offsets[index : index + 2]
            yield {
                **episode,
                "started_at": episode["started_at"].isoformat(),
                "steps": [{**step, "info": json.loads(step["info"])} for step in steps[first_step:stop_step]],
                "nodes": [
                    node
                    for node in nodes[first_node:stop_node]
                    if node["visits"] >= options.min_visits
                    and (options.max_depth is None or node["depth"] <= options.max_depth)
                ],
            }

    return LinesWriter(folder, context, make)


def _records(table: pa.Table) -> list[dict[str, Any]]:
    columns = [to_values(table, name) for name in table.schema.names]
    return [dict(zip(table.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: value for name, value in fields.items() if value is not None}
