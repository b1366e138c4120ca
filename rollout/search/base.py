"""The contract of a search: a pure state machine that is asked for trials and told their outcomes.

No I/O, no clock, no global random state. A search knows actions only by their index among the legal actions
of a node, and machines not at all: a trial names the earlier trial whose checkpoint it begins from, and
whoever carries it out keeps checkpoints by trial id. Everything that a model or an environment knows comes
in through `tell`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rollout.types import Failure

__all__ = ["OPEN_ENDED", "ROOT_TRIAL", "Commit", "NodeInfo", "Outcome", "Search", "TreeView", "Trial"]

ROOT_TRIAL = 0
"""The trial id that stands for the root: its checkpoint is the episode's current one."""

OPEN_ENDED = -1
"""As `num_actions`: actions are not listed but proposed, one more whenever a trial names a new index."""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What is known of a state from outside when it enters the tree.

    Attributes:
        num_actions: Number of actions; at least 1 unless the state is final, or `OPEN_ENDED`.
        value: Estimate of the discounted return from this state on.
        prior: One probability per action, summing to 1; None is uniform.
        state_hash: Digest of the state, for chance nodes and transpositions; None if unknown.
        mask: Which of the actions are legal, at least one; None is all. Illegal ones need a prior of 0.
    """

    num_actions: int
    value: float = 0.0
    prior: tuple[float, ...] | None = None
    state_hash: str | None = None
    mask: tuple[bool, ...] | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """One branch that the search wants: apply `action` to the state that trial `source` led to.

    Attributes:
        trial_id: Unique within the search, and above 0.
        source: The trial whose state it begins from; `ROOT_TRIAL` for the root.
        action: Index among that state's actions. In an open-ended state an index that no earlier trial from
            the same source had stands for a proposal that is still to be made.
        seed: Seed of the branch under the `seeded` policy: a function of the run's seed, the node and the
            visit.
        depth: Actions from the root, this one included.
    """

    trial_id: int
    source: int
    action: int
    seed: int
    depth: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a trial.

    Attributes:
        reward: Reward of the action.
        node: The state reached; its value is ignored when `terminated`.
        terminated: No further reward can follow: the value from here on is 0.
        truncated: Cut short: a leaf that is bootstrapped from `node.value` and never expanded.
        discount: Discount of this transition, from -1 to 1; None is the search's own. -1 where the other
            player moves next.
        proven: The value from here on is final (a won or lost game): it may be propagated as a proof.
    """

    reward: float
    node: NodeInfo
    terminated: bool = False
    truncated: bool = False
    discount: float | None = None
    proven: bool = False


@dataclass(frozen=True, slots=True)
class Commit:
    """What a told trial became, once the search has taken it in.

    Attributes:
        trial_id: The trial.
        node_id: The node that it led to; None when the trial failed.
        is_new: The node was made by this trial: later trials may name it as their source. Otherwise (a
            failure, or an outcome that the node had already) its checkpoint will never be asked for.
    """

    trial_id: int
    node_id: int | None
    is_new: bool


class TreeView(Protocol):
    """The tree of a search, read-only: one entry per node in each column; node 0 is the root."""

    def __len__(self) -> int: ...

    @property
    def visits(self) -> Sequence[int]:
        """N(s)."""
        ...

    @property
    def value(self) -> Sequence[float]:
        """V(s)."""
        ...

    @property
    def raw_value(self) -> Sequence[float]:
        """Mean of the evaluations from outside."""
        ...

    @property
    def depth(self) -> Sequence[int]:
        """Actions from the root."""
        ...

    @property
    def parent(self) -> Sequence[int]:
        """The node from which it was first reached; -1 for the root."""
        ...

    @property
    def action(self) -> Sequence[int]:
        """The action that first led to it; -1 for the root."""
        ...

    @property
    def prior(self) -> Sequence[float]:
        """Prior of that action; 1 for the root."""
        ...

    @property
    def reward(self) -> Sequence[float]:
        """Reward of that transition; 0 for the root."""
        ...

    @property
    def discount(self) -> Sequence[float]:
        """Discount of that transition, 0 at a terminal node; 1 for the root."""
        ...

    @property
    def trial(self) -> Sequence[int]:
        """The trial that made it."""
        ...

    @property
    def state_hash(self) -> Sequence[str | None]:
        """Digest of the state, or None."""
        ...

    @property
    def children(self) -> Sequence[Sequence[int]]:
        """For each action the node that it led to (the newest, where chance has several), or -1."""
        ...

    def action_visits(self, node: int) -> Sequence[int]:
        """N(s,·): visits of each action of a node."""
        ...


class Search(Protocol):
    """One search from one root."""

    @property
    def done(self) -> bool:
        """The budget is spent and nothing is in flight."""
        ...

    @property
    def tree(self) -> TreeView:
        """The tree so far, as public per-node columns; node 0 is the root."""
        ...

    def ask(self, n: int) -> list[Trial]:
        """At most n trials, to be carried out in any order.

        Fewer, or none, when the budget or the wave is spent, or all depends on trials
        in flight. A simulation that ends in a terminal node needs no branch and is backed up here.
        """
        ...

    def tell(self, trial_id: int, outcome: Outcome | Failure) -> Sequence[Commit]:
        """Takes in what came of a trial; in any order; telling one twice changes nothing.

        Returns:
            The trials taken in by this call, in order: none while the deterministic mode waits for an
            earlier one.

        Raises:
            SearchError: The trial is unknown, or the outcome is not finite, or its priors are no
                distribution.
        """
        ...

    def best(self) -> int:
        """The action to play at the root.

        Raises:
            SearchError: Every branch at the root failed.
        """
        ...

    def action_visits(self) -> Sequence[int]:
        """Visits of each root action."""
        ...

    def policy_target(self, node: int = 0) -> Sequence[float]:
        """The policy to train towards at a node that is not final: one probability per action."""
        ...

    def returns(self) -> Sequence[float]:
        """By node: the discounted return of the most visited actions from there on.

        The rewards along them, and the evaluation of the leaf that they end in.
        """
        ...

    def root_value(self) -> float:
        """The value of the root after the search."""
        ...

    def is_spent(self, node_id: int) -> bool:
        """Whether no later trial will begin from a node, so that its checkpoint can be released."""
        ...

    def closes(self, node_id: int, *, advances: bool) -> bool:
        """Whether no trial will begin from a node after those in flight, but for their retries.

        Args:
            node_id: The node.
            advances: The search may be advanced later, and begin from any node that can be drawn again.
        """
        ...

    def advance(self, action: int, state_hash: str | None, seed: int) -> bool:
        """Makes the state that a played action led to the root, with what is known below it.

        The rest of the tree is freed: checkpoints of trials that are no longer in `tree.trial` will never be
        asked for, and the new root's is `ROOT_TRIAL` from now on. The budget begins anew.

        Args:
            action: The action that was played at the root.
            state_hash: Digest of the state that it really led to; None only where actions have one outcome.
            seed: As the search's own.

        Returns:
            False, and nothing is changed, when that state is not in the tree or cannot be searched from.

        Raises:
            SearchError: Trials are in flight.
        """
        ...

    def stats(self) -> Mapping[str, float]:
        """Counters for the report: simulations, failures, retries, nodes, depth."""
        ...
