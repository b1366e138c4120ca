"""The error hierarchy: one type per boundary that can fail.

    RolloutError
    ├── ConfigError       a setting is unknown, mistyped or out of range
    ├── BootError         an image or base could not be built or booted
    ├── ForkError         a checkpoint could not become n sandboxes
    ├── CheckpointError   a sandbox could not be saved, or a saved one is damaged or foreign
    ├── GuestError        the guest agent is gone, late, or answers garbage
    ├── EnvError          the environment raised, or refused an action
    ├── PolicyError       a policy or evaluator failed
    ├── SearchError       a search was asked or told something that it cannot accept
    ├── SinkError         trajectories could not be written or read
    └── CapacityError     a budget (memory, sandboxes, disk, leases) is used up

Every error pickles, so that it crosses a Ray boundary unchanged, and says whether the same call may succeed
when it is made again (`retryable`).
"""

from __future__ import annotations

from typing import ClassVar, Self

__all__ = [
    "BootError",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "EnvError",
    "ForkError",
    "GuestError",
    "PolicyError",
    "RolloutError",
    "SearchError",
    "SinkError",
    "error_from_parts",
]


class RolloutError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        message: One line that names what is wrong and what to do about it.
        retryable: True when the same call may succeed if it is made again.
    """

    boundary: ClassVar[str] = "rollout"
    exit_code: int = 1
    """What a command that ends with this error exits with."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.retryable = retryable

    def __reduce__(self) -> tuple[object, ...]:
        return (error_from_parts, (type(self).__name__, self.message, self.retryable))

    @classmethod
    def wrap(cls, error: BaseException, context: str) -> Self:
        """Makes an error of this boundary out of a foreign one; `context` says what was being done."""
        return cls(f"{context}: {type(error).__name__}: {error}")


class ConfigError(RolloutError):
    """A setting is unknown, mistyped or out of range."""

    boundary = "config"
    exit_code = 2


class BootError(RolloutError):
    """An image or base could not be built or booted."""

    boundary = "boot"


class ForkError(RolloutError):
    """A checkpoint could not become n sandboxes; none of them exists."""

    boundary = "fork"


class CheckpointError(RolloutError):
    """A sandbox could not be saved, or a saved one is damaged, unknown or foreign."""

    boundary = "checkpoint"


class GuestError(RolloutError):
    """The guest agent is gone, late, or answers garbage. The sandbox must be killed."""

    boundary = "guest"


class EnvError(RolloutError):
    """The environment raised, does not exist, or refused an action."""

    boundary = "env"


class PolicyError(RolloutError):
    """A policy or an evaluator failed."""

    boundary = "policy"


class SearchError(RolloutError):
    """A search was asked or told something that it cannot accept."""

    boundary = "search"


class SinkError(RolloutError):
    """Trajectories could not be written or read."""

    boundary = "sink"


class CapacityError(RolloutError):
    """A budget (memory, sandboxes, disk, leases) is used up."""

    boundary = "capacity"


_BY_NAME: dict[str, type[RolloutError]] = {
    c.__name__: c
    for c in (
        RolloutError,
        ConfigError,
        BootError,
        ForkError,
        CheckpointError,
        GuestError,
        EnvError,
        PolicyError,
        SearchError,
        SinkError,
        CapacityError,
    )
}


def error_from_parts(name: str, message: str, retryable: bool) -> RolloutError:
    """Rebuilds an error from its type's name: from a pickle, or from a guest's reply.

    An unknown name, which only a foreign or newer peer can send, gives a plain `RolloutError`.
    """
    return _BY_NAME.get(name, RolloutError)(message, retryable=retryable)
