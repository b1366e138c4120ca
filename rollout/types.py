"""The small frozen values that cross floors, and the derivation of seeds. Standard library only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

from rollout.errors import RolloutError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "ExecResult",
    "Failure",
    "PlayoutRequest",
    "PlayoutResult",
    "Proposal",
    "Randomness",
    "RngPolicy",
    "Step",
    "Value",
    "derive_seed",
]

Value: TypeAlias = (
    "bool | int | float | str | bytes | list[Value] | dict[str, Value] | np.ndarray | np.generic | None"
)
"""What can cross the guest channel: msgpack's types, and numpy arrays and scalars."""


class RngPolicy(StrEnum):
    """What a clone does with the random generators that it inherited from its checkpoint."""

    UNIQUE = "unique"
    """Every clone differs: reseeded from fresh host entropy. The default of a fork."""
    SEEDED = "seeded"
    """Reseeded from a given seed: a reproducible branch. The default of a search."""
    INHERIT = "inherit"
    """An exact continuation of the checkpoint. A search that uses it sees the future."""


@dataclass(frozen=True, slots=True)
class Randomness:
    """The randomness of one branch; `seed` is set if and only if the policy is `seeded`."""

    policy: RngPolicy = RngPolicy.UNIQUE
    seed: int | None = None

    def __post_init__(self) -> None:
        if (self.policy is RngPolicy.SEEDED) != (self.seed is not None):
            raise ValueError(f"randomness policy {self.policy!r} with seed {self.seed!r}")

    @classmethod
    def seeded(cls, seed: int) -> Randomness:
        """A reproducible branch."""
        return cls(RngPolicy.SEEDED, seed)


@dataclass(frozen=True, slots=True)
class Step:
    """What an environment answers to a reset or an action, as in Gymnasium.

    Attributes:
        observation: A value of the observation space.
        reward: None where there is none (a reset, an ungraded step); never 0 in its place.
        terminated: The episode reached a terminal state of the task.
        truncated: The episode was cut short (a time limit); its value may be bootstrapped.
        info: What the environment adds.
        state_hash: Digest of the environment's state without its random generators; None if not asked for.
    """

    observation: Value
    reward: float | None = None
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Value] = field(default_factory=dict[str, "Value"])
    state_hash: str | None = None


@dataclass(frozen=True, slots=True)
class PlayoutRequest:
    """A random playout inside the guest: at most `horizon` uniformly random actions, drawn from `seed`."""

    horizon: int
    seed: int
    discount: float = 1.0


@dataclass(frozen=True, slots=True)
class PlayoutResult:
    """What a playout returned.

    Attributes:
        value: Discounted return from the playout's first step on (discount 1 on the first reward).
        num_steps: Steps played.
        terminated: It ended in a terminal state (otherwise at the horizon or a time limit).
        truncated: It was cut by the environment's own limit.
    """

    value: float
    num_steps: int
    terminated: bool
    truncated: bool


@dataclass(frozen=True, slots=True)
class ExecResult:
    """A finished command. A non-zero exit is data, not an exception.

    Attributes:
        exit_code: The exit status; -N when signal N ended it.
        stdout: Output, cut at the limit that the caller gave.
        stderr: As stdout.
        stdout_truncated: There was more.
        stderr_truncated: There was more.
        timed_out: The time limit killed its process group.
        duration_s: Seconds of guest time.
    """

    exit_code: int
    stdout: bytes
    stderr: bytes
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    timed_out: bool = False
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Proposal:
    """One action that a policy proposes; `tokens` and `logprobs` are a language model's own."""

    action: Value
    prior: float
    tokens: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed branch or episode, as it is recorded: never a reward of 0."""

    cause: str
    boundary: str
    retryable: bool

    @classmethod
    def of(cls, error: RolloutError) -> Failure:
        """The record of a typed error."""
        return cls(cause=error.message, boundary=error.boundary, retryable=error.retryable)


def derive_seed(*parts: int | str) -> int:
    """Mixes parts (a run seed, a node, a visit, a purpose) into a 63-bit seed.

    BLAKE2b over an unambiguous encoding: equal parts give equal seeds on every machine and Python version,
    and neighbouring parts give unrelated ones.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "little"))
        digest.update(text)
    return int.from_bytes(digest.digest(), "little") >> 1
