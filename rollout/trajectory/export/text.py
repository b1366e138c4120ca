"""Observations and actions as text, and episodes as conversations.

Text stays as it is; everything else becomes compact JSON, arrays in their shape. In a conversation the user
says the observations and the assistant the actions.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false
# The functions of pyarrow.compute are made when it is imported.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from rollout.trajectory.export.source import Chunk
from rollout.trajectory.schema import ACTION, OBSERVATION, SHAPE_KEY, list_of

__all__ = ["MESSAGES", "Conversations", "Message", "to_texts", "to_values"]

Message: TypeAlias = "dict[str, str]"
"""One message: `role` and `content`."""

MESSAGES = list_of(pa.struct([("role", pa.string()), ("content", pa.string())]))
"""Column type of a conversation."""


@dataclass(frozen=True)
class Conversations:
    """The conversations of a chunk.

    Attributes:
        chunk: The chunk; its steps have `observation` and `action`.
        observations: Text of each observation, one per step row.
        actions: Text of each action, one per step row; None in the last row of an episode.
        system: What the system says first; None for nothing.
        history: Moves before the current one that a prompt shows; None for all.
    """

    chunk: Chunk
    observations: Sequence[str]
    actions: Sequence[str | None]
    system: str | None = None
    history: int | None = None

    @classmethod
    def of(cls, chunk: Chunk, system: str | None, history: int | None) -> Conversations:
        """Those of a chunk."""
        observations = to_texts(chunk.steps, OBSERVATION)
        return cls(
            chunk, [text or "" for text in observations], to_texts(chunk.steps, ACTION), system, history
        )

    def num_moves(self, episode: int) -> int:
        """Actions of an episode that are there; a failed episode may have lost its last rows."""
        first, stop = self.chunk.step_offsets[episode : episode + 2]
        return sum(action is not None for action in self.actions[first:stop])

    def prompt(self, episode: int, t: int) -> list[Message]:
        """What was said until observation `t`, which is last."""
        begin = 0 if self.history is None else max(0, t - self.history)
        messages = self._turns(episode, begin, t)
        messages.append({"role": "user", "content": self.observations[self._row(episode, t)]})
        return messages

    def whole(self, episode: int) -> list[Message]:
        """All moves of an episode; the last word is the last action."""
        return self._turns(episode, 0, self.num_moves(episode))

    def prompt_text(self, episode: int, t: int) -> str:
        """As `prompt`, as one text: the observation alone if there is nothing before it."""
        messages = self.prompt(episode, t)
        if len(messages) == 1:
            return messages[0]["content"]
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)

    def _turns(self, episode: int, begin: int, stop: int) -> list[Message]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for t in range(begin, stop):
            row = self._row(episode, t)
            messages.append({"role": "user", "content": self.observations[row]})
            messages.append({"role": "assistant", "content": self.actions[row] or ""})
        return messages

    def _row(self, episode: int, t: int) -> int:
        return int(self.chunk.step_offsets[episode]) + t


def to_texts(table: pa.Table, name: str) -> list[str | None]:
    """A column as text; null is None."""
    return [
        value if value is None or isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for value in to_values(table, name)
    ]


def to_values(table: pa.Table, name: str) -> list[Any]:
    """A column as plain values: numbers, text, lists in their shape, dicts for structs; null is None."""
    return _values(table.schema.field(name), table.column(name).combine_chunks())


def _values(field: pa.Field, column: pa.Array) -> list[Any]:
    kind = field.type
    if pa.types.is_struct(kind):
        children = [kind.field(index) for index in range(kind.num_fields)]
        columns = [_values(child, column.field(index)) for index, child in enumerate(children)]
        rows = [
            dict(zip([child.name for child in children], row, strict=True))
            for row in zip(*columns, strict=True)
        ]
        return [
            row if valid else None for row, valid in zip(rows, column.is_valid().to_pylist(), strict=True)
        ]
    shape = json.loads((field.metadata or {}).get(SHAPE_KEY, b"[1]"))
    values = column.to_pylist()
    if len(shape) == 1:
        return values
    return [None if value is None else np.reshape(value, shape).tolist() for value in values]
