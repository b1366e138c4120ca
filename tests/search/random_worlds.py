"""Random worlds for the properties of a search: states are integers, everything else a function of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from rollout.config import SearchConfig
from rollout.search.base import ROOT_TRIAL, Commit, NodeInfo, Outcome, Search, Trial
from rollout.search.ensemble import Ensemble
from rollout.search.tree import PROVEN, SETTLED, TERMINATED, TRUNCATED, Tree
from rollout.search.tree_search import TreeSearch
from rollout.types import Failure, derive_seed

PASSING = Failure("the guest was late", "guest", retryable=True)
FINAL = Failure("the environment raised", "env", retryable=False)


@dataclass(frozen=True)
class World:
    """A random decision process; few state hashes, so that outcomes merge and paths join.

    A negative `proof_share` is no proofs; a proven state is worth 0 on.
    """

    seed: int
    stochastic: bool = True
    masked: bool = True
    end_share: float = 0.15
    proof_share: float = 0.0
    open_share: float = 0.0

    def info(self, state: int) -> NodeInfo:
        rng = random.Random(derive_seed(self.seed, "state", state))
        digest = f"{derive_seed(self.seed, state) % 7}"
        value = rng.uniform(-1, 1)
        if rng.random() < self.open_share:
            return NodeInfo(-1, value, state_hash=None)
        # States with equal digests are one state, so what is known of them must be equal.
        rng = random.Random(derive_seed(self.seed, "digest", digest))
        count = rng.randint(1, 5)
        mask = tuple(rng.random() < 0.7 for _ in range(count)) if self.masked and rng.random() < 0.5 else None
        mask = mask if mask and any(mask) else None
        weights = [rng.random() * (mask is None or mask[a]) + 1e-9 * (mask is None) for a in range(count)]
        total = sum(weights)
        prior = tuple(w / total for w in weights) if total > 0 and rng.random() < 0.5 else None
        return NodeInfo(count, value, prior, digest, mask)

    def outcome(self, state: int, action: int, seed: int) -> tuple[int, Outcome]:
        luck = derive_seed(seed) % 3 if self.stochastic else 0
        after = derive_seed(self.seed, state, action, luck) % 100_000
        info = self.info(after)
        key = after if info.state_hash is None else info.state_hash
        rng = random.Random(derive_seed(self.seed, "end", key))
        end = rng.random()
        proven = rng.random() < self.proof_share
        terminated, truncated = end < self.end_share / 2, self.end_share / 2 <= end < self.end_share
        reward = random.Random(derive_seed(self.seed, "reward", state, action, after)).uniform(-1, 1)
        if proven:
            info = NodeInfo(info.num_actions, 0.0, info.prior, info.state_hash, info.mask)
        return after, Outcome(reward, info, terminated, truncated, proven=proven)


def drive(
    search: Search,
    world: World,
    *,
    workers: int,
    order: random.Random,
    fails: Callable[[Trial], Failure | None] = lambda trial: None,
    twice: bool = False,
) -> list[Commit]:
    """Runs a search to its end with `workers` at once that finish in random order."""
    states, running, commits = {ROOT_TRIAL: 0}, list[Trial](), list[Commit]()
    while not search.done:
        running += search.ask(workers - len(running))
        if not running:
            assert search.done
            break
        trial = running.pop(order.randrange(len(running)))
        states[trial.trial_id], outcome = world.outcome(states[trial.source], trial.action, trial.seed)
        told = fails(trial) or outcome
        commits += search.tell(trial.trial_id, told)
        if twice:
            assert not search.tell(trial.trial_id, told)
            assert not search.tell(trial.trial_id, PASSING)
    return commits


def trees_of(search: Search) -> list[Tree]:
    if isinstance(search, Ensemble):
        return [member.tree for member in search._members]
    assert isinstance(search, TreeSearch)
    return [search.tree]


def check_at_rest(tree: Tree, *, joined: bool = False) -> None:
    """Conservation, and nothing in flight."""
    assert not any(tree.in_flight)
    assert not any(tree.edge_in_flight)
    into = [0] * len(tree)
    for edge in range(len(tree.edge_visits)):
        outcomes = list(tree.outcomes(edge))
        assert tree.edge_visits[edge] == sum(tree.outcome_visits[o] for o in outcomes)
        assert sum(tree.outcome_draws[o] for o in outcomes) <= tree.edge_draws[edge]
    for outcome, node in enumerate(tree.outcome_node):
        assert tree.outcome_draws[outcome] >= 1
        into[node] += tree.outcome_visits[outcome]
    for node in range(len(tree)):
        assert tree.visits[node] == tree.evaluations[node] + sum(tree.action_visits(node))
        assert list(tree.action_begun(node)) == tree.action_visits(node)
        edges = [edge for edge in tree.edges(node) if edge >= 0]
        ready = [edge for edge in edges if tree.edge_visits[edge] and tree.edge_state[edge] <= SETTLED]
        assert tree.num_unready[node] == tree.num_actions[node] + tree.open_ended[node] - len(ready)
        if node and not joined:
            assert into[node] == tree.visits[node]
        if tree.flags[node] & (TERMINATED | TRUNCATED) or (
            tree.flags[node] & PROVEN and not tree.num_actions[node]
        ):
            assert not tree.num_actions[node]


def shape(tree: Tree) -> object:
    """Everything in a tree but the numbers of trials, which retries push up."""
    return {name: list(column) for name, column in vars(tree).items() if name != "trial"}


ALGORITHMS = ("uct", "puct", "gumbel", "ab_mcts", "best_of_n", "beam", "revision", "breadth_first")


def config(**settings: object) -> SearchConfig:
    return SearchConfig.model_validate({"simulations": 60, "wave": 4, **settings})
