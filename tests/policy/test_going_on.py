"""What the configuration of a search reaches: trees that are gone on with, temperature, seeds, targets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from envs.gym import GymEnv
from rollout.branch import BranchJob, BranchResult
from rollout.config import RunConfig
from rollout.errors import EnvError, GuestError
from rollout.runner import Runner, episode_specs
from rollout.sandbox.branching import LocalBrancher
from rollout.sandbox.inline import InlineEngine
from rollout.testing import Fault, FaultPlan, FaultyEngine, comparable
from rollout.trajectory.rows import NodeRow, Trajectory
from rollout.types import Randomness


@pytest.fixture(scope="module")
def inline() -> Iterator[InlineEngine]:
    engine = InlineEngine(RunConfig().engine)
    yield engine
    asyncio.run(engine.close())


async def play(
    inline: InlineEngine,
    *,
    is_slippery: bool = False,
    plan: FaultPlan = lambda *_: None,
    max_steps: int = 5,
    seed: int = 0,
    **search: object,
) -> Trajectory:
    run = RunConfig.model_validate(
        {
            "seed": seed,
            "max_steps": max_steps,
            "env": {"args": {"env_id": "FrozenLake-v1", "kwargs": {"is_slippery": is_slippery}}},
            "engine": {"kind": "inline"},
            "search": {"simulations": 24, "wave": 4, "playout_horizon": 10, "discount": 0.9, **search},
        }
    )
    env = GymEnv(**run.env.args)
    engine = FaultyEngine(inline, plan)
    brancher = LocalBrancher(engine, env)
    trajectory = await Runner(env, brancher, run, engine="inline").play(
        episode_specs(run, "test", env.tasks())[0]
    )
    assert brancher.stats.checkpoints == 0, "every checkpoint of an episode is released at its end"
    assert engine.num_sandboxes == 0
    return trajectory


def trees(trajectory: Trajectory) -> list[dict[int, NodeRow]]:
    num_trees = len(trajectory.steps) - 1
    return [{n.node_id: n for n in trajectory.nodes if n.t == t} for t in range(num_trees)]


@pytest.mark.parametrize(
    "search",
    [
        {},
        {"algorithm": "puct"},
        {"algorithm": "gumbel"},
        {"ensemble": 3},
        {"transpositions": True},
        {"outcomes": "widening", "backup": "expectation"},
    ],
    ids=str,
)
async def test_the_next_tree_begins_with_the_exact_counts_of_the_one_before(
    inline: InlineEngine, search: dict[str, object]
) -> None:
    trajectory = await play(inline, tree_reuse=True, **search)
    assert trajectory.episode.failure is None
    went_on = 0
    for before, after, step in zip(trees(trajectory), trees(trajectory)[1:], trajectory.steps, strict=False):
        assert step.node_id is not None
        played = before[step.node_id]
        went_on += 1
        if "ensemble" in search:  # the root's visits are those of all members; a row shows one member's
            assert after[0].visits > 24
        else:
            assert after[0].visits == 24 + played.visits
        assert after[0].state_hash == played.state_hash
        assert after[0].parent_id is None
        evaluations = after[0].visits - sum(after[0].action_visits or ())
        if "outcomes" in search or "transpositions" in search:  # reached again, a state is evaluated again
            assert evaluations >= 1
        else:
            assert evaluations == search.get("ensemble", 1)
        for node in after.values():
            if node.node_id:
                assert node.parent_id is not None
                assert node.depth == after[node.parent_id].depth + 1
    assert went_on >= 2


async def test_kept_nodes_are_the_same_branches(inline: InlineEngine) -> None:
    trajectory = await play(inline, tree_reuse=True)
    first, second = trees(trajectory)[:2]
    seeds = {node.rng_seed: node for node in first.values() if node.node_id}
    kept = [node for node in second.values() if node.rng_seed in seeds]
    assert kept
    for node in kept:
        old = seeds[node.rng_seed]
        assert (node.action, node.state_hash, node.depth) == (old.action, old.state_hash, old.depth - 1)
        assert node.checkpoint_id == old.checkpoint_id
        assert node.visits >= old.visits


async def test_a_state_that_is_not_in_the_tree_begins_a_fresh_one(inline: InlineEngine) -> None:
    """With single outcomes on slippery ice, the real move often leads elsewhere than the tree's."""
    visits = set[bool]()
    for seed in range(6):
        trajectory = await play(inline, is_slippery=True, tree_reuse=True, seed=seed)
        for before, after, step in zip(
            trees(trajectory), trees(trajectory)[1:], trajectory.steps, strict=False
        ):
            assert step.node_id is not None
            is_there = before[step.node_id].state_hash == after[0].state_hash
            assert (after[0].visits > 25) == (is_there and before[step.node_id].visits > 1), (
                "counts are carried over where the state is the same, and nowhere else"
            )
            visits.add(is_there)
    assert visits == {True, False}


async def test_without_it_every_tree_is_fresh(inline: InlineEngine) -> None:
    trajectory = await play(inline)
    assert {step.visits for step in trajectory.steps[:-1]} == {25}


async def test_a_failed_episode_frees_the_tree_that_it_would_have_gone_on_with(inline: InlineEngine) -> None:
    def later(phase: str, count: int) -> Fault | None:
        return Fault(EnvError("it raised")) if phase == "env.step" and count >= 40 else None

    trajectory = await play(inline, plan=later, tree_reuse=True)
    assert trajectory.episode.failure is not None


async def test_equal_seeds_go_on_equally(inline: InlineEngine) -> None:
    first, again = [await play(inline, tree_reuse=True, is_slippery=True) for _ in range(2)]
    assert comparable(first) == comparable(again)


async def test_temperature_draws_moves(inline: InlineEngine) -> None:
    sharp = {(await play(inline, seed=s, max_steps=1, move="visits")).steps[0].action for s in range(12)}
    flat = [await play(inline, seed=s, max_steps=1, temperature=50.0) for s in range(12)]
    assert len({t.steps[0].action for t in flat}) > 2
    off_the_top = [
        t
        for t in flat
        if (t.steps[0].action_visits or [0])[int(t.steps[0].action)] < max(t.steps[0].action_visits or [0])  # type: ignore[arg-type]
    ]
    assert off_the_top, "a move that was not visited most"
    assert sharp


async def test_root_noise_reaches_the_priors_of_the_root_alone(inline: InlineEngine) -> None:
    trajectory = await play(inline, algorithm="puct", dirichlet_fraction=0.5, max_steps=1)
    [tree] = trees(trajectory)
    at_root = {node.prior for node in tree.values() if node.parent_id == 0}
    below = {node.prior for node in tree.values() if node.parent_id}
    assert len(at_root) > 1
    assert below == {0.25}


@pytest.mark.parametrize("is_common", [True, False])
async def test_common_random_numbers_give_siblings_equal_seeds(inline: InlineEngine, is_common: bool) -> None:
    trajectory = await play(inline, common_random_numbers=is_common, max_steps=1)
    [tree] = trees(trajectory)
    children = [node.rng_seed for node in tree.values() if node.parent_id == 0]
    assert len(children) == 4
    assert len(set(children)) == (1 if is_common else 4)


@pytest.mark.parametrize("search", [{}, {"algorithm": "gumbel"}, {"ensemble": 2}], ids=str)
async def test_every_node_that_was_expanded_has_targets(
    inline: InlineEngine, search: dict[str, object]
) -> None:
    trajectory = await play(inline, max_steps=2, **search)
    for tree in trees(trajectory):
        for node in tree.values():
            assert node.n_step_return is not None
            if any(node.action_visits or ()):
                assert node.policy_target is not None
                assert len(node.policy_target) == 4
                assert sum(node.policy_target) == pytest.approx(1.0)
            else:
                assert node.policy_target is None


async def test_a_nodes_return_is_that_of_its_most_visited_line(inline: InlineEngine) -> None:
    [tree, *_] = trees(await play(inline, evaluator="zero", simulations=300, max_steps=1, proofs=False))
    children: dict[int, list[NodeRow]] = {}
    for node in tree.values():
        if node.parent_id is not None:
            children.setdefault(node.parent_id, []).append(node)

    def expected(node: NodeRow) -> float:
        below = children.get(node.node_id, [])
        if not below:
            return 0.0
        visits = list(node.action_visits or ())
        action = visits.index(max(visits))
        [child] = [child for child in below if child.action == action]
        return (child.reward or 0.0) + 0.9 * expected(child)

    for node in tree.values():
        assert node.n_step_return == pytest.approx(expected(node))


async def test_n_step_returns_are_bootstrapped_from_the_search(inline: InlineEngine) -> None:
    trajectory = await play(inline, n_step=2, max_steps=4, simulations=400)
    steps = trajectory.steps[:-1]
    assert len(steps) == 4
    for t, step in enumerate(steps):
        rewards = [s.reward or 0.0 for s in steps[t : t + 2]]
        value = steps[t + 2].value if t + 2 < len(steps) else 0.0
        assert value is not None
        expected = sum(0.9**k * r for k, r in enumerate(rewards)) + 0.9 ** len(rewards) * value
        assert step.n_step_return == pytest.approx(expected)
    assert any(step.n_step_return for step in steps)


@pytest.mark.parametrize("is_single", [True, False])
async def test_states_without_further_branches_give_their_checkpoints_back(
    inline: InlineEngine, is_single: bool
) -> None:
    """With single outcomes; where an action may be drawn again, every state may be branched from."""
    most = 0

    class Counting(LocalBrancher):
        async def run(self, jobs: Sequence[BranchJob]) -> list[BranchResult]:
            nonlocal most
            results = await super().run(jobs)
            most = max(most, self.stats.checkpoints)
            return results

    run = RunConfig.model_validate(
        {
            "max_steps": 1,
            "env": {"args": {"env_id": "FrozenLake-v1", "kwargs": {"is_slippery": False}}},
            "engine": {"kind": "inline"},
            "search": {
                "algorithm": "breadth_first",
                "simulations": 200,
                "wave": 4,
                "evaluator": "zero",
                "outcomes": "single" if is_single else "widening",
            },
        }
    )
    env = GymEnv(**run.env.args)
    brancher = Counting(inline, env)
    specs = episode_specs(run, "test", env.tasks())
    trajectory = await Runner(env, brancher, run, engine="inline").play(specs[0])
    assert trajectory.episode.failure is None
    assert brancher.stats.checkpoints == 0
    ids = [node.checkpoint_id for node in trajectory.nodes if node.checkpoint_id is not None]
    kept = sum(not checkpoint_id.startswith("unsaved-") for checkpoint_id in ids)
    inner = sum(min(node.action_visits or (0,), default=0) > 0 for node in trajectory.nodes if node.node_id)
    assert inner > 10
    if is_single:
        assert most <= len(ids) - inner + 8, "a wave late at most"
    else:
        assert most >= kept - 8


@pytest.mark.parametrize("tree_reuse", [False, True])
@pytest.mark.parametrize("algorithm", ["uct", "breadth_first", "random"])
async def test_after_the_last_child_only_what_failed_begins_there_again(
    inline: InlineEngine, algorithm: str, tree_reuse: bool
) -> None:
    seen: set[tuple[str, object, Randomness]] = set()
    closed: set[str] = set()

    class Watching(LocalBrancher):
        async def run(self, jobs: Sequence[BranchJob]) -> list[BranchResult]:
            for job in jobs:
                key = (job.checkpoint.id, job.actions, job.randomness)
                assert job.checkpoint.id not in closed or key in seen
                seen.add(key)
            closed.update(job.checkpoint.id for job in jobs if job.is_last)
            return await super().run(jobs)

    def fails_now_and_then(phase: str, count: int) -> Fault | None:
        passing = GuestError("the guest is gone", retryable=True)
        return Fault(passing) if phase == "env.step" and count % 3 == 1 else None

    run = RunConfig.model_validate(
        {
            "max_steps": 8 if algorithm == "random" else 3,
            "env": {"args": {"env_id": "FrozenLake-v1", "kwargs": {"is_slippery": False}}},
            "engine": {"kind": "inline"},
            "search": {
                "algorithm": algorithm,
                "simulations": 40,
                "wave": 3,
                "evaluator": "zero",
                "max_retries": 9,
                "tree_reuse": tree_reuse and algorithm == "uct",
            },
        }
    )
    env = GymEnv(**run.env.args)
    engine = FaultyEngine(inline, fails_now_and_then)
    brancher = Watching(engine, env)
    trajectory = await Runner(env, brancher, run, engine="inline").play(
        episode_specs(run, "test", env.tasks())[0]
    )
    assert trajectory.episode.failure is None
    assert len(closed) >= trajectory.episode.length + (0 if algorithm == "random" else 5)
    assert brancher.stats.failed_branches > 0
    assert engine.num_sandboxes == 0
