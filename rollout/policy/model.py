"""An evaluator that is a function of the user: a network, a heuristic, a call to a model elsewhere.

    def evaluate(leaves: Sequence[Leaf], **args) -> Sequence[...]

It gets the leaves of many trees at once, and `search.evaluator_args` as keyword arguments. For each leaf, in
order, it gives a value, or a pair of a value and a prior with one probability for each of `leaf.actions`, or
an `Evaluation`. A coroutine function is awaited; any other is called in a thread, one call at a time, so that
a slow model does not keep the rest of the run waiting.

Invariant: what it gives is checked before a search learns of it. A value that is not finite, or a prior that
is no distribution over the legal actions, fails the search that asked for it, and no other.

Not guaranteed: that a seed fixes the tree, where the answer for a leaf depends on the rest of its batch.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

from rollout.errors import ConfigError, PolicyError, RolloutError, SearchError
from rollout.loading import load_entry_point
from rollout.policy.batching import BatchQueue
from rollout.policy.leaves import Evaluation, Leaf
from rollout.search.base import NodeInfo
from rollout.search.checks import check_node
from rollout.types import PlayoutRequest

__all__ = ["ModelEvaluator"]


class ModelEvaluator:
    """Calls `module:function` with leaves of all searches that wait for values.

    Args:
        entry_point: The function.
        args: Its keyword arguments.
        max_leaves: Leaves of a call.
        max_wait_s: How long a search may wait for others to join the call.

    Raises:
        ConfigError: There is no such function.
    """

    def __init__(
        self, entry_point: str, args: Mapping[str, Any], *, max_leaves: int = 256, max_wait_s: float = 0.002
    ) -> None:
        function = load_entry_point(entry_point)
        if not callable(function):
            raise ConfigError(f"search.evaluator: {entry_point} is not a function")
        self.name = entry_point
        self._function = cast("Callable[..., Any]", function)
        self._args = dict(args)
        self.queue: BatchQueue[Leaf, object] = BatchQueue(
            self._call, max_items=max_leaves, max_wait_s=max_wait_s
        )

    def searching(self) -> AbstractContextManager[None]:
        """Around a search that uses this: others do not wait for it once it is left."""
        return self.queue.client()

    def request(self, seed: int) -> PlayoutRequest | None:
        """Nothing."""
        return None

    async def evaluate(self, leaves: Sequence[Leaf]) -> list[Evaluation]:
        """The function's values and priors.

        Raises:
            PolicyError: It raised, or what it gave cannot be accepted.
        """
        answers = await self.queue.ask(leaves)
        return [self._checked(leaf, answer) for leaf, answer in zip(leaves, answers, strict=True)]

    async def _call(self, leaves: list[Leaf]) -> Sequence[object]:
        try:
            if inspect.iscoroutinefunction(self._function):
                answers = await self._function(leaves, **self._args)
            else:
                answers = await asyncio.to_thread(self._function, leaves, **self._args)
        except RolloutError:
            raise
        except Exception as error:  # whatever a model raises
            raise PolicyError.wrap(error, f"the evaluator {self.name} raised") from error
        try:
            answers = list(answers)
        except TypeError:
            raise PolicyError(
                f"the evaluator {self.name} must give one value per leaf, not {_short(answers)}"
            ) from None
        if len(answers) != len(leaves):
            raise PolicyError(
                f"the evaluator {self.name} gave {len(answers)} values for {len(leaves)} leaves"
            )
        return cast("list[object]", answers)

    def _checked(self, leaf: Leaf, answer: object) -> Evaluation:
        evaluation = self._read(answer)
        prior = evaluation.prior if leaf.actions else None  # nothing is tried where an episode was cut
        node = NodeInfo(len(leaf.actions), evaluation.value, prior)
        try:
            check_node(node, is_final=not leaf.actions)
        except SearchError as error:
            raise PolicyError(f"the evaluator {self.name}: {error.message}") from error
        return Evaluation(evaluation.value, prior)

    def _read(self, answer: object) -> Evaluation:
        value: Any = answer
        prior: Any = None
        try:
            if isinstance(answer, Evaluation):
                value, prior = answer.value, answer.prior
            elif isinstance(answer, tuple):
                value, prior = cast("tuple[Any, Any]", answer)
            return Evaluation(float(value), None if prior is None else tuple(float(p) for p in prior))
        except (TypeError, ValueError):
            raise PolicyError(
                f"the evaluator {self.name} must give a value, or a value and a prior, not {_short(answer)}"
            ) from None


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
