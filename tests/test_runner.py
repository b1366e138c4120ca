"""The runner over the inline engine: honest moves, whole records, failures that stay failures."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from envs.gym import GymEnv
from rollout.config import RunConfig
from rollout.env import Task
from rollout.errors import CapacityError, EnvError, ForkError
from rollout.policy import evaluators
from rollout.policy.evaluators import Evaluation, Leaf
from rollout.runner import Runner, episode_specs, play_locally
from rollout.sandbox.base import Sandbox
from rollout.sandbox.branching import LocalBrancher
from rollout.sandbox.inline import InlineEngine
from rollout.testing import Fault, FaultPlan, FaultyEngine, comparable
from rollout.trajectory.rows import Trajectory
from rollout.types import Step, Value, derive_seed


def config(**changes: object) -> RunConfig:
    """A small search on slippery FrozenLake; keys are written section__key."""
    values: dict[str, dict[str, object] | object] = {
        "episodes": 1,
        "env": {"args": {"env_id": "FrozenLake-v1", "kwargs": {"is_slippery": True}}},
        "engine": {"kind": "inline"},
        "search": {"simulations": 12, "wave": 3, "playout_horizon": 10},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if not name:
            values[section] = value
        else:
            values[section] = {**values.get(section, {}), name: value}  # type: ignore[dict-item]
    return RunConfig.model_validate(values)


@pytest.fixture(scope="module")
def inline() -> Iterator[InlineEngine]:
    """One for all tests: it examines an environment once, before it trusts copies of it."""
    engine = InlineEngine(config().engine)
    yield engine
    asyncio.run(engine.close())


class Stage:
    """A runner, and what is under it."""

    def __init__(
        self,
        inline: InlineEngine,
        run: RunConfig,
        plan: FaultPlan = lambda *_: None,
        env: GymEnv | None = None,
    ) -> None:
        self.engine = FaultyEngine(inline, plan)
        self.env = env or GymEnv(**run.env.args)
        self.brancher = LocalBrancher(self.engine, self.env)
        self.runner = Runner(self.env, self.brancher, run, engine="inline")
        self.specs = episode_specs(run, "test", self.env.tasks())

    async def play(self) -> Trajectory:
        trajectory = await self.runner.play(self.specs[0])
        assert self.brancher.stats.checkpoints == 0, "every checkpoint of an episode is released at its end"
        assert self.engine.num_sandboxes == 0
        return trajectory


async def test_an_episode_is_recorded_whole(inline: InlineEngine) -> None:
    run = config(search__discount=0.9)
    trajectory = await Stage(inline, run).play()
    episode, steps = trajectory.episode, trajectory.steps
    assert episode.failure is None
    assert (episode.env_id, episode.engine, episode.search, episode.policy) == (
        "FrozenLake-v1",
        "inline",
        "uct",
        "playout",
    )
    assert episode.length == len(steps) - 1
    assert [step.t for step in steps] == list(range(len(steps)))
    assert steps[-1].action is None
    assert steps[-2].terminated is episode.terminated is True
    assert episode.return_ == sum(step.reward for step in steps[:-1] if step.reward is not None)
    expected = 0.0
    for step in reversed(steps[:-1]):
        assert step.reward is not None
        expected = step.reward + 0.9 * expected
        assert step.n_step_return == expected
    for step in steps[:-1]:
        nodes = [node for node in trajectory.nodes if node.t == step.t]
        assert [node.node_id for node in nodes] == list(range(len(nodes)))
        assert nodes[0].visits == step.visits == 1 + run.search.simulations, "the root was evaluated too"
        assert step.action_visits is not None
        assert sum(step.action_visits) == run.search.simulations
        assert step.policy_target is not None
        assert math.isclose(sum(step.policy_target), 1.0)
        played = next(node for node in nodes if node.node_id == step.node_id)
        assert (played.parent_id, played.action) == (0, step.action)
        for node in nodes[1:]:
            assert node.parent_id is not None
            assert node.depth == nodes[node.parent_id].depth + 1
            assert node.rng_policy == "seeded"


async def test_the_real_move_has_a_seed_that_no_branch_of_a_search_had(inline: InlineEngine) -> None:
    trajectory = await Stage(inline, config(search__simulations=40)).play()
    searched = {node.rng_seed for node in trajectory.nodes if node.node_id != 0}
    played = [step.rng_seed for step in trajectory.steps[:-1]]
    assert None not in searched
    assert len(set(played)) == len(played)
    assert not searched & set(played)


async def test_equal_seeds_play_equal_episodes_whatever_the_run_is_called(tmp_path: Path) -> None:
    run = config(episodes=2)
    first = [comparable(trajectory) for trajectory in await play_locally(run, tmp_path)]
    assert [comparable(trajectory) for trajectory in await play_locally(run, tmp_path)] == first
    assert first[0] != first[1], "samples of a task differ"
    other = [
        comparable(trajectory) for trajectory in await play_locally(config(episodes=2, seed=1), tmp_path)
    ]
    assert other != first


@pytest.mark.parametrize("policy", ["unique", "inherit"])
async def test_other_randomness_is_recorded(inline: InlineEngine, policy: str) -> None:
    trajectory = await Stage(inline, config(search__randomness=policy)).play()
    rows = [*trajectory.steps[:-1], *(node for node in trajectory.nodes if node.node_id)]
    assert {(row.rng_policy, row.rng_seed) for row in rows} == {(policy, None)}


@pytest.mark.parametrize(
    "search",
    [
        {"algorithm": "puct"},
        {"algorithm": "gumbel"},
        {"algorithm": "ab_mcts"},
        {"algorithm": "best_of_n"},
        {"algorithm": "beam"},
        {"algorithm": "revision"},
        {"algorithm": "breadth_first"},
        {"outcomes": "widening", "backup": "expectation"},
        {"transpositions": True},
        {"ensemble": 3},
        {"deterministic": False},
        {"evaluator": "zero"},
    ],
    ids=str,
)
async def test_every_search_plays(inline: InlineEngine, search: dict[str, object]) -> None:
    run = config(max_steps=3, **{f"search__{key}": value for key, value in search.items()})
    trajectory = await Stage(inline, run).play()
    assert trajectory.episode.failure is None
    nodes = [node for node in trajectory.nodes if node.t == 0]
    assert len(nodes) > 4
    assert {node.parent_id for node in nodes if node.node_id} <= {node.node_id for node in nodes}
    if run.search.wants_state_hash:
        assert all(node.state_hash for node in nodes[1:])
        assert trajectory.steps[1].state_hash


async def test_random_play_needs_no_search(inline: InlineEngine) -> None:
    trajectory = await Stage(inline, config(search__algorithm="random")).play()
    assert trajectory.episode.policy == trajectory.episode.search == "random"
    assert trajectory.nodes == []
    assert trajectory.episode.terminated
    assert trajectory.steps[0].legal_actions is not None


async def test_max_steps_truncates(inline: InlineEngine) -> None:
    trajectory = await Stage(inline, config(max_steps=1)).play()
    assert (trajectory.episode.length, trajectory.episode.truncated, trajectory.episode.terminated) == (
        1,
        True,
        False,
    )
    assert trajectory.steps[0].truncated
    assert trajectory.episode.return_ == 0.0


async def test_a_failed_branch_is_a_row_and_changes_no_return(inline: InlineEngine) -> None:
    def some(phase: str, count: int) -> Fault | None:
        return Fault(EnvError("it raised")) if phase == "env.step" and count % 7 == 3 else None

    trajectory = await Stage(inline, config(max_steps=2, search__simulations=20), some).play()
    failed = [node for node in trajectory.nodes if node.failure is not None]
    assert failed
    assert trajectory.episode.failure is None
    for node in failed:
        assert node.failure is not None
        assert (node.failure.boundary, node.failure.cause) == ("env", "it raised")
        assert (node.value, node.reward, node.visits) == (None, None, 0)
        assert node.action is not None
    ids = [(node.t, node.node_id) for node in trajectory.nodes]
    assert len(set(ids)) == len(ids)


async def test_a_search_in_which_everything_fails_is_a_failed_episode(inline: InlineEngine) -> None:
    plan: FaultPlan = lambda phase, _: Fault(EnvError("no")) if phase == "env.step" else None  # noqa: E731
    trajectory = await Stage(inline, config(), plan).play()
    assert trajectory.episode.failure is not None
    assert trajectory.episode.failure.boundary == "search"
    assert trajectory.episode.return_ is None
    assert trajectory.episode.length == 0
    assert len(trajectory.steps) == 1, "what was seen before the failure is kept"


async def test_a_failed_move_is_tried_again_with_the_same_seed(inline: InlineEngine) -> None:
    run = config(search__algorithm="random", max_steps=3)
    expected = comparable(await Stage(inline, run).play())
    plan: FaultPlan = lambda phase, n: (  # noqa: E731
        Fault(ForkError("busy", retryable=True)) if phase == "fork" and n in (2, 3) else None
    )
    assert comparable(await Stage(inline, run, plan).play()) == expected


@pytest.mark.parametrize(("num_failures", "attempt", "fails"), [(1, 1, False), (2, 2, False), (3, 2, True)])
async def test_an_episode_is_begun_again(
    inline: InlineEngine, num_failures: int, attempt: int, fails: bool
) -> None:
    lost = CapacityError("the host is gone", retryable=True)
    plan: FaultPlan = lambda phase, n: Fault(lost) if phase == "env.reset" and n < num_failures else None  # noqa: E731
    trajectory = await Stage(inline, config(fleet__max_attempts=3), plan).play()
    episode = trajectory.episode
    assert episode.attempt == attempt
    assert [failure.cause for failure in episode.earlier_failures] == ["the host is gone"] * attempt
    assert (episode.failure is not None) == fails
    assert (episode.return_ is None) == fails


async def test_what_cannot_pass_is_not_tried_again(inline: InlineEngine) -> None:
    plan: FaultPlan = lambda phase, _: Fault(EnvError("no")) if phase == "env.reset" else None  # noqa: E731
    stage = Stage(inline, config(), plan)
    trajectory = await stage.play()
    assert trajectory.episode.attempt == 0
    assert trajectory.episode.failure is not None
    assert trajectory.episode.failure.cause == "no"
    assert stage.engine.counts["env.reset"] == 1
    assert trajectory.steps == []


async def test_an_ungraded_step_leaves_the_return_null(inline: InlineEngine) -> None:
    class Ungraded(GymEnv):
        async def step(self, sandbox: Sandbox, action: Value, *, state_hash: bool = False) -> Step:
            return replace(await super().step(sandbox, action, state_hash=state_hash), reward=None)

    run = config(max_steps=2)
    trajectory = await Stage(inline, run, env=Ungraded(**run.env.args)).play()
    assert trajectory.episode.failure is None
    assert trajectory.episode.return_ is None
    assert [step.reward for step in trajectory.steps] == [None] * len(trajectory.steps)
    assert {node.reward for node in trajectory.nodes} == {None}
    assert {step.n_step_return for step in trajectory.steps} == {None}


@pytest.mark.parametrize("algorithm", ["uct", "random"])
@pytest.mark.parametrize("reward", [math.nan, math.inf])
async def test_a_reward_that_is_no_number_fails_the_episode_and_reaches_no_row(
    inline: InlineEngine, algorithm: str, reward: float
) -> None:
    class Broken(GymEnv):
        async def step(self, sandbox: Sandbox, action: Value, *, state_hash: bool = False) -> Step:
            return replace(await super().step(sandbox, action, state_hash=state_hash), reward=reward)

    run = config(search__algorithm=algorithm)
    trajectory = await Stage(inline, run, env=Broken(**run.env.args)).play()
    assert trajectory.episode.failure is not None
    if algorithm == "random":
        assert f"a reward of {reward}" in trajectory.episode.failure.cause
        assert trajectory.episode.failure.boundary == "env"
    else:
        assert "no branch at the root has an outcome" in trajectory.episode.failure.cause
    assert trajectory.episode.return_ is None
    for row in (*trajectory.steps, *trajectory.nodes):
        assert row.reward is None or math.isfinite(row.reward)


async def test_a_cancelled_episode_releases_everything(inline: InlineEngine) -> None:
    is_playing = asyncio.Event()

    def hang(phase: str, count: int) -> Fault | None:
        if (phase, count) == ("env.step", 30):
            is_playing.set()
            return Fault(delay_s=60)
        return None

    stage = Stage(inline, config(), hang)
    playing = asyncio.create_task(stage.runner.play(stage.specs[0]))
    await is_playing.wait()
    playing.cancel()
    await asyncio.gather(playing, return_exceptions=True)
    assert playing.cancelled()
    assert stage.brancher.stats.checkpoints == 0
    assert stage.engine.num_sandboxes == 0


@pytest.mark.parametrize("values", [[], [0.0] * 9, [math.nan] * 3])
async def test_an_evaluator_that_misbehaves_fails_the_episode(
    inline: InlineEngine, monkeypatch: pytest.MonkeyPatch, values: list[float]
) -> None:
    async def evaluate(_: object, leaves: Sequence[Leaf]) -> list[Evaluation]:
        return [Evaluation(0.0)] if len(leaves) == 1 else [Evaluation(value) for value in values]

    monkeypatch.setattr(evaluators.ZeroEvaluator, "evaluate", evaluate)
    trajectory = await Stage(inline, config(search__evaluator="zero")).play()
    assert trajectory.episode.failure is not None
    assert trajectory.episode.failure.boundary in ("policy", "search")


def test_specs_take_tasks_in_turn_and_are_unique() -> None:
    specs = episode_specs(config(episodes=5), "run", [Task("a"), Task("b")])
    assert [(spec.task.id, spec.sample) for spec in specs] == [
        ("a", 0),
        ("b", 0),
        ("a", 1),
        ("b", 1),
        ("a", 2),
    ]
    assert len({spec.episode_id for spec in specs}) == 5
    assert len({spec.seed for spec in specs}) == 5
    again = episode_specs(config(episodes=5), "another run", [Task("a"), Task("b")])
    assert [spec.seed for spec in again] == [spec.seed for spec in specs]
    assert not {spec.episode_id for spec in again} & {spec.episode_id for spec in specs}
    assert specs[0].seed == derive_seed(0, "a", 0)
