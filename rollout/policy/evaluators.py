"""Leaf values: what a search is told of a state that it has just reached.

An evaluator has two halves. `request` goes along with the branch; `evaluate` looks at what came back, for a
whole wave of leaves at once, so that one that calls a model can do so in a batch.

| `search.evaluator` | the value of a leaf |
|---|---|
| `playout` | the return of one random playout, inside the guest |
| `truncated` | the rewards of `playout_horizon` random actions, and `bootstrap`'s value of where they lead |
| `zero` | 0 |
| `module:function` | what that function says, of a batch of leaves (see `rollout.policy.model`) |
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from rollout.branch import Lookahead, LookaheadResult
from rollout.config import SearchConfig
from rollout.errors import ConfigError
from rollout.policy.leaves import Evaluation, Leaf
from rollout.policy.model import ModelEvaluator
from rollout.types import PlayoutRequest, derive_seed

__all__ = [
    "Evaluation",
    "Evaluator",
    "Leaf",
    "PlayoutEvaluator",
    "TruncatedEvaluator",
    "ZeroEvaluator",
    "make_evaluator",
]


class Evaluator(Protocol):
    """Values leaves; holds no state of any one search, so one object serves all episodes."""

    @property
    def name(self) -> str:
        """As rows record it."""
        ...

    def searching(self) -> AbstractContextManager[None]:
        """Entered around each search: an evaluator that waits for several to ask knows for how many."""
        ...

    def request(self, seed: int) -> PlayoutRequest | Lookahead | None:
        """What shall be played at a leaf whose branch has `seed`; None for nothing."""
        ...

    async def evaluate(self, leaves: Sequence[Leaf]) -> list[Evaluation]:
        """One evaluation per leaf, in their order.

        Raises:
            PolicyError: A model failed.
        """
        ...


@dataclass(frozen=True, slots=True)
class PlayoutEvaluator:
    """The return of one uniformly random playout inside the guest.

    A truncated leaf has no playout, because the environment takes no further action; its value is 0, which
    makes the value of a state the return that is collected within the environment's time limit.
    """

    horizon: int
    discount: float
    name: str = "playout"

    def searching(self) -> AbstractContextManager[None]:
        """Nothing to know."""
        return nullcontext()

    def request(self, seed: int) -> PlayoutRequest | None:
        """At most `horizon` random actions."""
        return PlayoutRequest(self.horizon, derive_seed(seed, "playout"), self.discount)

    async def evaluate(self, leaves: Sequence[Leaf]) -> list[Evaluation]:
        """The playouts' discounted returns."""
        return [Evaluation(leaf.playout.value if leaf.playout is not None else 0.0) for leaf in leaves]


@dataclass(frozen=True, slots=True)
class TruncatedEvaluator:
    """The rewards of a few random actions, and another evaluator's value of where they lead.

    Attributes:
        horizon: Actions at most.
        discount: Of rewards, and of the value at the end.
        bootstrap: Values the state after them, also one that the environment has truncated. It is not asked
            where the episode has terminated.
    """

    horizon: int
    discount: float
    bootstrap: Evaluator
    name: str = "truncated"

    def searching(self) -> AbstractContextManager[None]:
        """As for the bootstrap."""
        return self.bootstrap.searching()

    def request(self, seed: int) -> Lookahead | None:
        """At most `horizon` random actions, and the state after them."""
        return Lookahead(self.horizon, derive_seed(seed, "playout"), self.discount)

    async def evaluate(self, leaves: Sequence[Leaf]) -> list[Evaluation]:
        """Discounted rewards, plus the discounted value of the last state.

        Raises:
            PolicyError: The bootstrap failed.
        """
        values, weights, ends = [0.0] * len(leaves), [0.0] * len(leaves), list[tuple[int, Leaf]]()
        for index, leaf in enumerate(leaves):
            played = leaf.playout
            if not isinstance(played, LookaheadResult):
                weights[index] = 1.0
                ends.append((index, leaf))
                continue
            values[index] = played.value
            if not played.last.terminated:
                weights[index] = self.discount**played.num_steps
                ends.append((index, Leaf(played.last, played.actions)))
        found = await self.bootstrap.evaluate([leaf for _, leaf in ends]) if ends else []
        for (index, _), evaluation in zip(ends, found, strict=True):
            values[index] += weights[index] * evaluation.value
        return [Evaluation(value) for value in values]


@dataclass(frozen=True, slots=True)
class ZeroEvaluator:
    """Values every leaf 0: the search sees only rewards that it reaches itself."""

    name: str = "zero"

    def searching(self) -> AbstractContextManager[None]:
        """Nothing to know."""
        return nullcontext()

    def request(self, seed: int) -> PlayoutRequest | None:
        """Nothing."""
        return None

    async def evaluate(self, leaves: Sequence[Leaf]) -> list[Evaluation]:
        """Zeros."""
        return [Evaluation(0.0)] * len(leaves)


def make_evaluator(config: SearchConfig) -> Evaluator:
    """The evaluator that a configuration names.

    Raises:
        ConfigError: There is none of that name, or the function that is named cannot be imported.
    """
    if config.evaluator == "playout":
        return PlayoutEvaluator(config.playout_horizon, config.discount)
    if config.evaluator == "truncated":
        bootstrap = _value_of_states(config, config.bootstrap, "bootstrap")
        return TruncatedEvaluator(config.playout_horizon, config.discount, bootstrap)
    return _value_of_states(config, config.evaluator, "evaluator")


def _value_of_states(config: SearchConfig, name: str, key: str) -> Evaluator:
    if name == "zero":
        return ZeroEvaluator()
    if ":" in name:
        return ModelEvaluator(
            name,
            config.evaluator_args,
            max_leaves=config.evaluator_batch,
            max_wait_s=config.evaluator_wait_s,
        )
    known = "'zero' and module:function"
    if key == "evaluator":
        known = "'playout', 'truncated', 'zero' and module:function"
    raise ConfigError(f"search.{key}: unknown evaluator {name!r}; there are {known}")
