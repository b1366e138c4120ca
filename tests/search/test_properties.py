"""What must hold of every algorithm, on random worlds with random failures and completion orders."""

from __future__ import annotations

import random
from math import isfinite

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_worlds import ALGORITHMS, FINAL, PASSING, World, check_at_rest, config, drive, shape, trees_of

from rollout.config import SearchConfig
from rollout.errors import SearchError
from rollout.search.base import Search, Trial
from rollout.search.factory import make_search
from rollout.search.tree_json import tree_from_json, tree_to_json
from rollout.types import Failure

BASELINES = ("best_of_n", "beam", "revision", "breadth_first")
"""These can run out of things to try; a tree policy goes on visiting what it knows."""
SEEDS = st.integers(0, 10_000)
EXAMPLES = settings(max_examples=60, deadline=None)


@st.composite
def configs(draw: st.DrawFn, *, deterministic: bool | None = None) -> SearchConfig:
    algorithm = draw(st.sampled_from(ALGORITHMS))
    outcomes = draw(st.sampled_from(["single", "widening"]))
    return config(
        algorithm=algorithm,
        outcomes=outcomes,
        simulations=draw(st.integers(1, 80)),
        wave=draw(st.sampled_from([1, 3, 8, 64])),
        deterministic=draw(st.booleans()) if deterministic is None else deterministic,
        backup=draw(st.sampled_from(["auto", "mean", "max", "best", "mixed", "expectation"])),
        normalise=draw(st.sampled_from(["auto", "none", "siblings", "tree"])),
        first_play=draw(st.sampled_from(["lowest", "parent"])),
        tie_noise=draw(st.sampled_from([0.0, 1e-7])),
        in_flight=draw(st.sampled_from(["wu", "virtual_loss"])),
        return_bounds=(-20.0, 20.0),
        transpositions=algorithm in ("uct", "puct", "gumbel") and draw(st.booleans()),
        proofs=outcomes == "single" and draw(st.booleans()),
        action_k=draw(st.sampled_from([0.0, 1.0])),
        dirichlet_fraction=draw(st.sampled_from([0.0, 0.25])),
        outcome_k=draw(st.sampled_from([0.5, 1.0, 2.0])),
        ensemble=draw(st.sampled_from([1, 1, 1, 3])),
        max_retries=draw(st.integers(0, 2)),
        common_random_numbers=draw(st.booleans()),
    )


def worlds(config: SearchConfig, seed: int) -> World:
    return World(
        seed,
        stochastic=config.outcomes == "widening",
        proof_share=0.2 if config.proofs else 0.0,
        open_share=0.0 if config.algorithm == "gumbel" else 0.2,
    )


def failing(share: float, seed: int):
    """Fails some trials, half of them for good, by the trial's number."""

    def fails(trial: Trial) -> Failure | None:
        luck = random.Random(f"{seed}:{trial.trial_id}").random()
        if luck < share:
            return PASSING if luck < share / 2 else FINAL
        return None

    return fails


@EXAMPLES
@given(configs(), SEEDS, st.sampled_from([1, 2, 8, 64]), st.sampled_from([0.0, 0.1, 0.5]))
def test_counts_are_conserved_whatever_fails_and_whenever(
    config: SearchConfig, seed: int, workers: int, share: float
) -> None:
    world = worlds(config, seed)
    search = make_search(config, world.info(0), seed)
    commits = drive(
        search, world, workers=workers, order=random.Random(seed), fails=failing(share, seed), twice=True
    )
    stats, trees = search.stats(), trees_of(search)
    for tree in trees:
        check_at_rest(tree, joined=config.transpositions)
        assert tree_to_json(tree_from_json(tree_to_json(tree))) == tree_to_json(tree)
        assert all(isfinite(v) for v in [*tree.value, *tree.edge_value, *tree.raw_value])
    assert sum(tree.visits[0] for tree in trees) == stats["simulations"] + len(trees)
    assert stats["simulations"] + stats["given_up"] <= config.simulations
    assert len(commits) == stats["trials"] == len({commit.trial_id for commit in commits})
    new = [commit.node_id for commit in commits if commit.is_new]
    assert sorted(new, key=lambda node: node or 0) == list(range(1, len(search.tree)))
    if any(search.action_visits()):
        legal = world.info(0).mask
        best = search.best()
        assert search.action_visits()[best] > 0
        assert legal is None or legal[best]
        target = search.policy_target()
        assert sum(target) == pytest.approx(1.0)
        assert legal is None or all(
            p == 0.0 for p, is_legal in zip(target, legal, strict=True) if not is_legal
        )
        assert isfinite(search.root_value())
    else:
        with pytest.raises(SearchError, match="no branch at the root"):
            search.best()


@EXAMPLES
@given(configs(deterministic=True), SEEDS)
def test_deterministic_mode_gives_one_tree_for_any_workers_and_timing(
    config: SearchConfig, seed: int
) -> None:
    world = worlds(config, seed)
    reference = None
    for workers, order in ((1, 0), (2, 1), (8, 2), (64, 3), (64, 4)):
        search = make_search(config, world.info(0), seed)
        drive(search, world, workers=workers, order=random.Random(order))
        trees = [vars(tree) for tree in trees_of(search)]
        reference = reference or trees
        if config.ensemble == 1:
            assert trees == reference
        else:  # which member is asked first depends on the workers, and with it only its trials' numbers
            assert [shape_of(columns) for columns in trees] == [shape_of(columns) for columns in reference]


def shape_of(columns: dict[str, object]) -> dict[str, object]:
    return {name: column for name, column in columns.items() if name != "trial"}


@EXAMPLES
@given(configs(deterministic=True), SEEDS, st.sampled_from([1, 3, 64]))
def test_a_failure_that_passes_leaves_no_trace(config: SearchConfig, seed: int, workers: int) -> None:
    config = config.model_copy(update={"max_retries": 2})
    world = worlds(config, seed)
    clean = make_search(config, world.info(0), seed)
    drive(clean, world, workers=workers, order=random.Random(1))
    attempts: dict[tuple[int, int, int], int] = {}

    def fails_twice(trial: Trial) -> Failure | None:
        key = (trial.seed, trial.depth, trial.action)
        attempts[key] = attempts.get(key, 0) + 1
        return PASSING if random.Random(trial.seed).random() < 0.3 and attempts[key] <= 2 else None

    shaken = make_search(config, world.info(0), seed)
    drive(shaken, world, workers=workers, order=random.Random(2), fails=fails_twice)
    if len(attempts) == clean.stats()["trials"]:  # siblings with common random numbers can share a key
        assert [shape(tree) for tree in trees_of(shaken)] == [shape(tree) for tree in trees_of(clean)]
        assert shaken.stats()["given_up"] == 0


@EXAMPLES
@given(configs(), SEEDS, SEEDS)
def test_in_flight_counts_are_the_trials_that_are_out(config: SearchConfig, seed: int, timing: int) -> None:
    """At every moment O(root) counts the simulations that wait, and each path adds one at each node."""
    config = config.model_copy(update={"ensemble": 1})
    world, rng = worlds(config, seed), random.Random(timing)
    search = make_search(config, world.info(0), seed)
    [tree] = trees_of(search)
    states, out = {0: 0}, list[Trial]()
    waiting = 0
    while not search.done:
        asked = search.ask(rng.randint(1, 5))
        out += asked
        if not config.deterministic:
            waiting += len(asked)
            assert tree.in_flight[0] == waiting <= config.wave
        if not out:
            break
        assert tree.in_flight[0] >= len(out)
        for node in range(len(tree)):
            below = sum(tree.edge_in_flight[edge] for edge in tree.edges(node) if edge >= 0)
            assert tree.in_flight[node] == below
        trial = out.pop(rng.randrange(len(out)))
        states[trial.trial_id], outcome = world.outcome(states[trial.source], trial.action, trial.seed)
        waiting -= 1
        search.tell(trial.trial_id, outcome)
    assert not any(tree.in_flight)


@EXAMPLES
@given(configs(), SEEDS, st.sampled_from([0.0, 0.3]))
def test_no_trial_begins_from_a_node_that_was_said_to_be_spent(
    config: SearchConfig, seed: int, share: float
) -> None:
    world, fails = worlds(config, seed), failing(share, seed)
    search = make_search(config, world.info(0), seed)
    states, nodes, spent = {0: 0}, {0: 0}, set[int]()
    while not search.done:
        for trial in search.ask(4):
            assert trial.source not in spent
            states[trial.trial_id], outcome = world.outcome(states[trial.source], trial.action, trial.seed)
            for commit in search.tell(trial.trial_id, fails(trial) or outcome):
                if commit.is_new and commit.node_id is not None:
                    nodes[commit.trial_id] = commit.node_id
        spent |= {trial_id for trial_id, node in nodes.items() if search.is_spent(node)}
    if config.outcomes == "single" and config.algorithm == "breadth_first" and _is_large(search, config):
        assert spent  # in a tree of single outcomes most inner nodes are


@EXAMPLES
@given(configs(), SEEDS, st.sampled_from([0.0, 0.3]), st.booleans())
def test_no_trial_but_a_retry_begins_from_a_node_that_the_trials_in_flight_have_closed(
    config: SearchConfig, seed: int, share: float, advances: bool
) -> None:
    world, fails = worlds(config, seed), failing(share, seed)
    search = make_search(config, world.info(0), seed)
    states, nodes = {0: 0}, {0: 0}
    closed: dict[int, set[tuple[int, int]]] = {}
    while not search.done:
        trials = search.ask(4)
        for trial in trials:
            may_be_retried = closed.get(trial.source)
            assert may_be_retried is None or (trial.action, trial.seed) in may_be_retried
        for source in {trial.source for trial in trials}:
            if search.closes(nodes[source], advances=advances):
                here = {(trial.action, trial.seed) for trial in trials if trial.source == source}
                closed[source] = closed.get(source, set()) | here
        for trial in trials:
            states[trial.trial_id], outcome = world.outcome(states[trial.source], trial.action, trial.seed)
            for commit in search.tell(trial.trial_id, fails(trial) or outcome):
                if commit.is_new and commit.node_id is not None:
                    nodes[commit.trial_id] = commit.node_id
    if config.outcomes == "single" and config.algorithm == "breadth_first" and _is_large(search, config):
        assert closed


def _is_large(search: Search, config: SearchConfig) -> bool:
    """Whether some tree has more nodes than two full levels of the widest world."""
    return search.stats()["nodes"] > 20 * config.ensemble


@EXAMPLES
@given(configs(), SEEDS, st.integers(0, 4), st.booleans())
def test_advancing_keeps_exact_counts_and_frees_the_rest(
    config: SearchConfig, seed: int, pick: int, twice: bool
) -> None:
    config = config.model_copy(update={"ensemble": 1})
    world = worlds(config, seed)
    search = make_search(config, world.info(0), seed)
    drive(search, world, workers=3, order=random.Random(seed))
    [tree] = trees_of(search)
    candidates = [
        (action, node)
        for action, edge in enumerate(tree.edges(0))
        if edge >= 0
        for node in {tree.outcome_node[o] for o in tree.outcomes(edge)}
    ]
    action, node = candidates[pick % len(candidates)]
    before, kept = _subtree(tree, node), _below(tree, node)
    carried, old_trials = tree.visits[node], {tree.trial[n] for n in kept} - {tree.trial[node]}
    digest = tree.state_hash[node]
    can = config.algorithm in ("uct", "puct", "gumbel") and (tree.num_actions[node] or tree.open_ended[node])
    can = can and (digest is not None or config.outcomes == "single")
    noise_free = config.model_copy(update={"dirichlet_fraction": 0.0})
    assert search.advance(action, digest, seed + 1) == bool(can)
    if not can:
        assert _subtree(tree, node) == before
        return
    assert len(tree) == len(kept)
    assert set(tree.trial) == {0} | old_trials
    if noise_free == config:
        assert _subtree(tree, 0) == before
    check_at_rest(tree, joined=True)
    assert not search.done or tree.flags[0]
    assert search.ask(0) == []
    if not twice or tree.flags[0]:
        return
    states = _states_below(tree, world)
    while not search.done:
        for trial in search.ask(3):
            states[trial.trial_id], outcome = world.outcome(states[trial.source], trial.action, trial.seed)
            search.tell(trial.trial_id, outcome)
    check_at_rest(tree, joined=True)
    assert tree.visits[0] == carried + search.stats()["simulations"]


def _below(tree, root: int) -> set[int]:
    seen, stack = {root}, [root]
    while stack:
        for edge in tree.edges(stack.pop()):
            for outcome in tree.outcomes(edge) if edge >= 0 else ():
                if (node := tree.outcome_node[outcome]) not in seen:
                    seen.add(node)
                    stack.append(node)
    return seen


def _subtree(tree, node: int) -> object:
    """Everything below a node without row numbers, with depths from it on."""

    def edge_of(edge: int) -> object:
        if edge < 0:
            return edge
        outcomes = [
            (
                tree.outcome_draws[o],
                tree.outcome_visits[o],
                tree.outcome_reward[o],
                tree.outcome_discount[o],
                _subtree(tree, tree.outcome_node[o]),
            )
            for o in tree.outcomes(edge)
        ]
        return (
            tree.edge_visits[edge],
            tree.edge_value[edge],
            tree.edge_draws[edge],
            tree.edge_state[edge],
            outcomes,
        )

    return (
        tree.visits[node],
        tree.value[node],
        tree.raw_value[node],
        tree.evaluations[node],
        tree.flags[node],
        tree.state_hash[node],
        list(tree.node_priors(node)),
        [edge_of(edge) for edge in tree.edges(node)],
    )


def _states_below(tree, world: World) -> dict[int, int]:
    """Any world states for the kept trials: conservation does not depend on which they are."""
    return {trial: 1000 + trial for trial in tree.trial}


@EXAMPLES
@given(configs(), SEEDS)
def test_without_chance_every_state_is_evaluated_once(config: SearchConfig, seed: int) -> None:
    """Σ N(children) = N − 1 for every state that goes on, and the root holds every simulation."""
    config = config.model_copy(update={"outcomes": "single", "transpositions": False, "proofs": False})
    world = worlds(config, seed)
    search = make_search(config, world.info(0), seed)
    drive(search, world, workers=4, order=random.Random(seed))
    for tree in trees_of(search):
        for node in range(len(tree)):
            if not tree.flags[node]:
                assert sum(tree.action_visits(node)) == tree.visits[node] - 1
    assert search.stats()["simulations"] == config.simulations or config.algorithm in BASELINES
