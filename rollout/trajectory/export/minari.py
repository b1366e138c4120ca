"""Minari datasets in its Parquet form (0.5): a folder per episode, below `<name>/data`.

With `MINARI_DATASETS_PATH` set to the export's folder, `minari.load_dataset("<environment>/<split>-v0")`
loads it. An episode has a row per observation; actions, rewards and flags of the last row are padding, as
Minari has it. Minari knows no missing reward: a null becomes NaN there. Infos are left out.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rollout.errors import SinkError
from rollout.trajectory.export.context import Context
from rollout.trajectory.export.source import Chunk
from rollout.trajectory.schema import ACTION, OBSERVATION
from rollout.trajectory.space_json import expand_bounds

__all__ = ["MINARI_COLUMNS", "MinariWriter"]

MINARI_COLUMNS = (OBSERVATION, ACTION, "reward", "terminated", "truncated")
_VERSION = "0.5.4"


class MinariWriter:
    """Writes one dataset per split.

    Args:
        folder: The export's folder.
        context: What the writer knows.

    Raises:
        SinkError: The run does not say what its spaces are, or Minari has no such space.
    """

    def __init__(self, folder: Path, context: Context) -> None:
        self._spaces = {name: _space(context, name) for name in (OBSERVATION, ACTION)}
        self._folder = folder
        self._split = context.split
        self._data: Path | None = None
        self._dataset_id = ""
        self._num_episodes = 0
        self._num_steps = 0

    def write(self, chunk: Chunk) -> int:
        """See `rollout.trajectory.export.files.Writer`."""
        observations = _column(self._spaces[OBSERVATION], chunk.steps[OBSERVATION].combine_chunks())
        actions = _column(self._spaces[ACTION], chunk.steps[ACTION].combine_chunks())
        columns = {
            "observations": observations,
            "actions": actions,
            "rewards": chunk.steps["reward"].fill_null(np.nan),
            "terminations": chunk.steps["terminated"].fill_null(False),
            "truncations": chunk.steps["truncated"].fill_null(False),
        }
        table = pa.table(columns)
        before = self._num_episodes
        for index, episode in enumerate(chunk.episodes.to_pylist()):
            first, stop = (int(offset) for offset in chunk.step_offsets[index : index + 2])
            if stop - first >= 2:
                self._write_episode(episode, table.slice(first, stop - first))
        return self._num_episodes - before

    def close(self) -> None:
        """See `rollout.trajectory.export.files.Writer`."""
        if self._data is None:
            return  # Minari has no empty dataset
        metadata = {
            "total_episodes": self._num_episodes,
            "total_steps": self._num_steps,
            "data_format": "parquet",
            "jpeg_encoding": False,
            "observation_space": json.dumps(self._spaces[OBSERVATION]),
            "action_space": json.dumps(self._spaces[ACTION]),
            "dataset_id": self._dataset_id,
            "minari_version": _VERSION,
        }
        (self._data / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")

    def _write_episode(self, episode: dict[str, Any], rows: pa.Table) -> None:
        if self._data is None:
            name = re.sub(r"[^A-Za-z0-9_]+", "-", str(episode["env_id"])).strip("-").lower() or "environment"
            self._dataset_id = f"{name}/{self._split}-v0"
            self._data = self._folder / name / f"{self._split}-v0" / "data"
            self._data.mkdir(parents=True)
        folder = self._data / str(self._num_episodes)
        folder.mkdir()
        last = rows.num_rows - 1
        rewards = rows["rewards"].to_numpy().copy()
        rewards[last] = 0.0
        rows = rows.set_column(rows.schema.get_field_index("rewards"), "rewards", pa.array(rewards))
        pq.write_table(rows.combine_chunks(), folder / "part-0.parquet", compression="zstd")
        metadata = {
            "id": self._num_episodes,
            "total_steps": last,
            "seed": episode["seed"],
            "episode_id": episode["episode_id"],
            "task_id": episode["task_id"],
        }
        (folder / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
        self._num_episodes += 1
        self._num_steps += last


def _space(context: Context, name: str) -> dict[str, Any]:
    text = context.run.spaces.get(name)
    if text is None:
        raise SinkError(f"the run does not say what its {name} space is: it was written by an older version")
    description = expand_bounds(json.loads(text))
    if '"Unknown"' in text:
        raise SinkError(f"Minari has no form for the {name} space: {text}")
    return description


def _column(space: dict[str, Any], column: pa.Array) -> pa.Array:
    """A column in Minari's layout: as ours, but a tuple's fields are numbered, and padding is no null."""
    match space["type"]:
        case "Dict":
            names = list(space["subspaces"])
            children = [_column(space["subspaces"][name], column.field(name)) for name in names]
            return pa.StructArray.from_arrays(children, names=names)
        case "Tuple":
            children = [_column(child, column.field(f"f{i}")) for i, child in enumerate(space["subspaces"])]
            return pa.StructArray.from_arrays(children, names=[str(i) for i in range(len(children))])
        case "Discrete":
            return column.fill_null(int(space["start"]))
        case "Text":
            return column
        case _:
            size = column.type.list_size
            present = column.flatten().to_numpy(zero_copy_only=False)
            values = np.zeros((len(column), size), present.dtype)
            values[column.is_valid().to_numpy(zero_copy_only=False)] = present.reshape(-1, size)
            return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), size)
