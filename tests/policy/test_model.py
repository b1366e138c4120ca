"""Evaluators that are functions: batches across trees, checked answers, honest failures."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from envs.gym import GymEnv
from rollout.branch import LookaheadResult
from rollout.config import RunConfig
from rollout.errors import ConfigError
from rollout.policy.evaluators import Leaf, TruncatedEvaluator, ZeroEvaluator, make_evaluator
from rollout.runner import Runner, episode_specs
from rollout.sandbox.branching import LocalBrancher
from rollout.sandbox.inline import InlineEngine
from rollout.testing import comparable
from rollout.trajectory.rows import Trajectory
from rollout.types import Step


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def inline() -> Iterator[InlineEngine]:
    engine = InlineEngine(RunConfig().engine)
    yield engine
    asyncio.run(engine.close())


def config(**search: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "episodes": 4,
            "max_steps": 3,
            "env": {"args": {"env_id": "FrozenLake-v1", "kwargs": {"is_slippery": True}}},
            "engine": {"kind": "inline"},
            "search": {"simulations": 12, "wave": 4, "algorithm": "puct", **search},
        }
    )


async def play(inline: InlineEngine, run: RunConfig, only: list[int] | None = None) -> list[Trajectory]:
    """All episodes of a run at once, or some of them."""
    env = GymEnv(**run.env.args)
    brancher = LocalBrancher(inline, env)
    runner = Runner(env, brancher, run, engine="inline")
    specs = episode_specs(run, "test", env.tasks())
    chosen = specs if only is None else [specs[index] for index in only]
    trajectories = await asyncio.gather(*(runner.play(spec) for spec in chosen))
    assert brancher.stats.checkpoints == 0
    return list(trajectories)


@pytest.mark.parametrize("name", ["heuristic", "later"])
async def test_a_function_values_leaves(inline: InlineEngine, name: str) -> None:
    for trajectory in await play(inline, config(evaluator=f"models:{name}")):
        assert trajectory.episode.failure is None
        assert trajectory.episode.policy == f"models:{name}"
        for node in trajectory.nodes:
            if node.node_id and node.visits == 1 and not node.terminated and not node.truncated:
                assert node.value in [cell / 15 for cell in range(16)]


async def test_arguments_come_from_the_configuration(inline: InlineEngine) -> None:
    [one, *_] = await play(inline, config(evaluator="models:heuristic", max_retries=0))
    arguments = {"scale": 2.0}
    [two, *_] = await play(inline, config(evaluator="models:heuristic", evaluator_args=arguments))
    first, second = ({n.node_id: n for n in t.nodes if n.t == 0 and n.visits == 1} for t in (one, two))
    common = [k for k in first.keys() & second.keys() if first[k].action == second[k].action]
    assert common
    assert sum(n.value or 0.0 for n in second.values()) > sum(n.value or 0.0 for n in first.values())


async def test_many_trees_share_one_call_and_change_nothing(inline: InlineEngine) -> None:
    import models

    models.calls.clear()
    together = await play(inline, config(evaluator="models:counted", evaluator_wait_s=60.0))
    shared = list(models.calls)
    assert max(shared) > 4, "more leaves in one call than one tree has in flight"
    models.calls.clear()
    run = config(evaluator="models:counted")
    alone = [(await play(inline, run, [index]))[0] for index in range(len(together))]
    assert max(models.calls) <= 4
    assert len(models.calls) > len(shared)
    assert [comparable(a) for a in alone] == [comparable(b) for b in together]


async def test_a_prior_reaches_the_rows(inline: InlineEngine) -> None:
    [trajectory, *_] = await play(inline, config(evaluator="models:counted"))
    priors = {node.prior for node in trajectory.nodes if node.node_id}
    assert {round(p, 6) for p in priors if p is not None} == {0.7, 0.1}


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("nan", "finite"),
        ("infinite", "finite"),
        ("text", "must give a value"),
        ("none", "must give a value"),
        ("sum", "sum to 1"),
        ("few", "1 priors for 4 actions"),
        ("negative", "a probability"),
        ("nan prior", "a probability"),
        ("triple", "must give a value"),
        ("raises", "out of memory"),
        ("short", "values for"),
        ("number", "one value per leaf"),
    ],
)
async def test_a_bad_answer_is_a_recorded_failure_and_no_number(
    inline: InlineEngine, how: str, says: str
) -> None:
    run = config(evaluator="models:bad", evaluator_args={"how": how}).model_copy(update={"episodes": 1})
    [trajectory] = await play(inline, run)
    failure = trajectory.episode.failure
    assert failure is not None
    assert failure.boundary == "policy"
    assert "models:bad" in failure.cause
    assert says in failure.cause
    assert trajectory.episode.return_ is None
    for row in (*trajectory.steps, *trajectory.nodes):
        assert row.value is None or math.isfinite(row.value)


@pytest.mark.parametrize(
    ("search", "says"),
    [
        ({"evaluator": "no_such_module:f"}, "cannot import 'no_such_module'"),
        ({"evaluator": "models:no_such_name"}, "has no 'no_such_name'"),
        ({"evaluator": "models:not_a_function"}, "is not a function"),
        ({"evaluator": "playouts"}, "unknown evaluator 'playouts'"),
        ({"evaluator": "truncated", "bootstrap": "playout"}, "search.bootstrap: unknown evaluator"),
    ],
)
def test_what_cannot_be_loaded_is_told_before_anything_is_played(search: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_evaluator(config(**search).search)


async def test_a_truncated_playout_is_bootstrapped_where_it_ends() -> None:
    class Ten(ZeroEvaluator):
        async def evaluate(self, leaves):  # type: ignore[no-untyped-def]
            assert all(leaf.step.observation == "end" for leaf in leaves)
            return [type(e)(10.0) for e in await super().evaluate(leaves)]

    evaluator = TruncatedEvaluator(3, 0.5, Ten())
    end, over = Step("end"), Step("over", terminated=True)
    leaves = [
        Leaf(Step("begin"), (0, 1), LookaheadResult(1.0, 3, end, (0,))),
        Leaf(Step("begin"), (0, 1), LookaheadResult(1.0, 2, over, ())),
        Leaf(Step("begin"), (0, 1), LookaheadResult(0.0, 1, Step("end", truncated=True), ())),
        Leaf(Step("end", truncated=True), ()),
    ]
    values = [evaluation.value for evaluation in await evaluator.evaluate(leaves)]
    assert values == [1.0 + 0.5**3 * 10, 1.0, 0.5 * 10, 10.0]


@pytest.mark.parametrize("bootstrap", ["zero", "models:heuristic"])
async def test_truncated_playouts_play(inline: InlineEngine, bootstrap: str) -> None:
    run = config(evaluator="truncated", playout_horizon=2, bootstrap=bootstrap)
    first, again = await play(inline, run), await play(inline, run)
    assert [comparable(t) for t in first] == [comparable(t) for t in again]
    assert {t.episode.failure for t in first} == {None}
    values = {n.value for t in first for n in t.nodes if n.visits == 1 and not n.terminated}
    assert (values == {0.0}) == (bootstrap == "zero")
