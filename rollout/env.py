"""The contract of an environment: a stateless player of sandboxes.

All episode state is inside the sandbox. An `Env` holds none, so forking a sandbox forks the episode,
wrappers, time limits and all, and one `Env` object serves any number of sandboxes.

What an environment is like (its spaces) may be known only in there: the host need not have it installed, and
must not run its code. So `prepare` learns it from the sandbox, and `description` carries it to the `Env`
object of another process, whose `learn` takes it in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from rollout.sandbox.base import Sandbox
from rollout.types import PlayoutRequest, PlayoutResult, Step, Value

if TYPE_CHECKING:
    import gymnasium

__all__ = ["Env", "Task"]


@dataclass(frozen=True, slots=True)
class Task:
    """One task of an environment: where an episode begins.

    Attributes:
        id: Unique among the environment's tasks; splits of a dataset go by it.
        args: What `Env.reset` needs to set it up.
    """

    id: str
    args: Mapping[str, Value] = field(default_factory=dict[str, "Value"])


class Env(Protocol):
    """Plays tasks in sandboxes; every method may be called for many sandboxes at once."""

    @property
    def id(self) -> str:
        """Name of the environment, as rows record it."""
        ...

    @property
    def description(self) -> Value:
        """What `learn` needs; None before the first `prepare` or `learn`, or if there is nothing to learn."""
        ...

    def learn(self, description: Value) -> None:
        """Takes in the `description` of an equal `Env` that has prepared a sandbox. Idempotent.

        Raises:
            EnvError: It is malformed, or differs from what is known already.
        """
        ...

    @property
    def observation_space(self) -> gymnasium.Space[Value]:
        """Types the observation column.

        Raises:
            EnvError: It is not known yet: nothing has been prepared or learnt.
        """
        ...

    @property
    def action_space(self) -> gymnasium.Space[Value]:
        """Types the action column.

        Raises:
            EnvError: It is not known yet: nothing has been prepared or learnt.
        """
        ...

    def tasks(self) -> Sequence[Task]:
        """The tasks; at least one."""
        ...

    def actions(self, step: Step) -> Sequence[Value]:
        """The legal actions after `step`, in a fixed order; their number may differ from step to step.

        Raises:
            EnvError: The action space cannot be enumerated (a search then needs a policy that proposes).
        """
        ...

    async def prepare(self, sandbox: Sandbox) -> None:
        """Makes the environment in a fresh sandbox (imports, construction); a checkpoint follows.

        Raises:
            EnvError: It does not exist or cannot be made, or is another than in the sandbox before.
        """
        ...

    async def reset(self, sandbox: Sandbox, task: Task, seed: int) -> Step:
        """Begins an episode in a prepared sandbox.

        Raises:
            EnvError: The environment raised.
        """
        ...

    async def step(self, sandbox: Sandbox, action: Value, *, state_hash: bool = False) -> Step:
        """Applies one action.

        Raises:
            EnvError: The action is outside the space, or the environment raised.
        """
        ...

    async def playout(self, sandbox: Sandbox, request: PlayoutRequest) -> PlayoutResult:
        """Plays random actions in the sandbox, which is spoilt by it.

        Raises:
            EnvError: The environment raised.
        """
        ...
