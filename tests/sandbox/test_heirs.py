"""Children that go on in their parent's sandbox: the choice, equal results, heirs that die or must go."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from envs.gym import GymEnv
from rollout.branch import BranchJob, BranchResult, Lookahead
from rollout.config import EngineConfig, ImageConfig, RunConfig
from rollout.env import Task
from rollout.errors import CheckpointError, EnvError, ForkError, GuestError
from rollout.runner import Runner, episode_specs
from rollout.sandbox.base import Checkpoint, Engine
from rollout.sandbox.branching import LocalBrancher
from rollout.sandbox.economics import Economics
from rollout.sandbox.engines import make_engine, what_is_missing
from rollout.sandbox.heirs import WAYS, Heirs
from rollout.sandbox.inline import InlineEngine
from rollout.testing import Fault, FaultyEngine, comparable
from rollout.types import PlayoutRequest, Randomness, RngPolicy

TASK = Task("only")
DEADLINE_S = 60.0


def stopped() -> float:
    """A clock by which all ways cost the same, so that each is tried, however fast this machine is."""
    return 0.0


@pytest.fixture
async def inline() -> AsyncIterator[InlineEngine]:
    async with InlineEngine(EngineConfig()) as engine:
        yield engine


def carrier_over(
    engine: Engine, *, concurrency: int = 4, ways: Sequence[str] = WAYS, limits: EngineConfig | None = None
) -> LocalBrancher:
    env = GymEnv(env_id="FrozenLake-v1")
    return LocalBrancher(engine, env, limits=limits, concurrency=concurrency, ways=ways, clock=stopped)


def job(begin: Checkpoint, seed: int, *, is_last: bool = False) -> BranchJob:
    return BranchJob(begin, (seed % 2,), Randomness.seeded(seed), state_hash=True, is_last=is_last)


def facts(result: BranchResult) -> object:
    """What of a result depends on the job alone."""
    return result.steps, result.playout, result.failure, result.checkpoint is None


def count(carrier: LocalBrancher, way: str) -> int:
    ways = carrier.stats.ways
    return ways[way].count if way in ways else 0


def saved(results: Sequence[BranchResult]) -> list[Checkpoint]:
    return [result.checkpoint for result in results if result.checkpoint is not None]


# --- the choice


def checkpoint(name: str) -> Checkpoint:
    return Checkpoint(name, None, "inline", "", "", 0)


async def heirs_of(
    inline: InlineEngine, economics: Economics, names: str, ways: Sequence[str] = WAYS
) -> Heirs:
    heirs = Heirs(economics, ways)
    for name in names:
        heirs.put(name, await inline.boot(""))
    return heirs


def measured(clone_s: float, continue_s: float, inherit_s: float) -> Economics:
    economics = Economics()
    for kind, cost_s in (("clone", clone_s), ("continue", continue_s), ("inherit", inherit_s)):
        for _ in range(20):
            economics.add(kind, cost_s)
    return economics


async def test_one_child_of_each_checkpoint_goes_on_in_its_heir_the_last_if_it_is_there(
    inline: InlineEngine,
) -> None:
    heirs = await heirs_of(inline, Economics(), "abc")
    jobs = [job(checkpoint(name), 0, is_last=is_last) for name, is_last in
            [("a", False), ("b", False), ("a", True), ("d", True), ("b", False), ("c", True)]]  # fmt: skip
    assert heirs.claims(jobs, lambda _: True) == {2: "continue", 1: "continue", 5: "inherit"}
    assert heirs.claims(jobs, lambda _: False) == {2: "continue", 1: "continue", 5: "continue"}


@pytest.mark.parametrize(
    ("costs", "child", "last"),
    [
        ((3.0, 1.0, 2.0), "continue", "continue"),
        ((3.0, 2.0, 1.0), "continue", "inherit"),
        ((1.0, 2.0, 3.0), None, "continue"),
        ((2.0, 3.0, 1.0), None, "inherit"),
    ],
)
async def test_the_cheapest_way_is_taken_and_the_last_child_always_inherits(
    inline: InlineEngine, costs: tuple[float, float, float], child: str | None, last: str
) -> None:
    heirs = await heirs_of(inline, measured(*costs), "a")
    assert heirs.claims([job(checkpoint("a"), 0)], lambda _: True).get(0) == child
    assert heirs.claims([job(checkpoint("a"), 0, is_last=True)], lambda _: True).get(0) == last
    assert heirs.continues == (child == "continue")
    assert heirs.wants_one() == (min(costs) < costs[0])


async def test_the_oldest_makes_room_and_each_is_taken_once(inline: InlineEngine) -> None:
    heirs = await heirs_of(inline, Economics(), "abc")
    third = heirs.take("c")
    assert third is not None
    assert heirs.take("c") is None
    first = heirs.drop_oldest()
    assert first is not None
    assert heirs.drop("a") is None
    assert len(heirs) == 1
    assert heirs.drop_oldest() is not first
    assert heirs.drop_oldest() is None


async def test_where_hardly_a_child_comes_in_time_few_sandboxes_are_kept(inline: InlineEngine) -> None:
    heirs, sandbox = Heirs(Economics()), await inline.boot("")
    for _ in range(63):
        assert heirs.wants_one()
        heirs.put("a", sandbox)
        heirs.drop_oldest()
    assert sum(heirs.wants_one() for _ in range(160)) == 10
    for _ in range(4):
        heirs.put("a", sandbox)
        heirs.take("a")
    assert all(heirs.wants_one() for _ in range(160))


# --- results


def engine_kinds() -> list[object]:
    kinds: list[object] = ["inline"]
    for kind, marks in (
        ("process", [pytest.mark.process]),
        ("microvm", [pytest.mark.microvm, pytest.mark.xdist_group("microvm")]),
    ):
        missing = what_is_missing(kind, ImageConfig())
        marks.append(pytest.mark.skipif(missing is not None, reason=missing or ""))
        kinds.append(pytest.param(kind, marks=marks))
    return kinds


@pytest.mark.parametrize("kind", engine_kinds())
@pytest.mark.parametrize("search", [{"algorithm": "uct", "evaluator": "zero"}, {"algorithm": "random"}])
async def test_rows_do_not_depend_on_the_way_taken(kind: str, search: dict[str, str], tmp_path: Path) -> None:
    run = RunConfig.model_validate(
        {
            "env": {"args": {"env_id": "FrozenLake-v1", "kwargs": {"is_slippery": True}}},
            "search": {"simulations": 24, "wave": 3, **search},
            "max_steps": 3 if search["algorithm"] == "uct" else 40,
        }
    )
    found: list[object] = []
    async with make_engine(EngineConfig.model_validate({"kind": kind}), ImageConfig(), tmp_path) as engine:
        for ways in (["clone"], ["continue"], ["inherit"], WAYS):
            env = GymEnv(**run.env.args)
            carrier = LocalBrancher(engine, env, concurrency=4, ways=ways, clock=stopped)
            runner = Runner(env, carrier, run, engine="any")
            for name in "abcdefgh"[: 3 if search["algorithm"] == "uct" else 8]:
                trajectory = await runner.play(episode_specs(run, name, env.tasks())[0])
                assert trajectory.episode.failure is None
                assert carrier.stats.checkpoints == 0
                assert engine.num_sandboxes == 0
                found.append(comparable(trajectory))
            for way in ("continue", "inherit"):
                assert count(carrier, way) == 0 or way in ways
            if "continue" in ways:
                assert count(carrier, "continue") > 3
            if "inherit" in ways and search["algorithm"] == "random":
                assert count(carrier, "inherit") > 3
    assert all(each == found[0] for each in found)


async def grown(carrier: LocalBrancher) -> list[object]:
    """Facts of three generations of children, some of them siblings, the last one of each named as such."""
    opening = await carrier.open(TASK, 3)
    found: list[object] = [opening.step]
    generation = [opening.checkpoint]
    for depth in range(3):
        jobs = [job(begin, 10 * depth + i, is_last=i == 1) for begin in generation for i in range(2)]
        results = await carrier.run(jobs)
        found += [facts(result) for result in results]
        await carrier.release(generation)
        generation = saved(results)
    await carrier.release(generation)
    return found


@pytest.mark.parametrize("synchronous", [True, False])
@pytest.mark.parametrize("concurrency", [1, 2, 5])
async def test_heirs_never_hold_what_others_wait_for(
    inline: InlineEngine, synchronous: bool, concurrency: int
) -> None:
    """Many calls at once, of one to eight jobs each, on fewer sandboxes than their heirs would take."""
    expected = await grown(carrier_over(inline, ways=["clone"]))
    engine = FaultyEngine(inline, lambda phase, _: Fault(delay_s=0.0005), synchronous=synchronous)
    carrier = carrier_over(engine, concurrency=concurrency)
    await carrier.prepare()
    async with asyncio.timeout(DEADLINE_S):
        for found in await asyncio.gather(*(grown(carrier) for _ in range(6))):
            assert found == expected
    assert engine.most_sandboxes <= concurrency
    assert inline.num_sandboxes == 0
    assert carrier.stats.checkpoints == 0
    assert count(carrier, "continue") > 0
    assert carrier.stats.failed_branches == 0


async def test_a_fork_of_more_than_is_free_takes_the_place_of_heirs(inline: InlineEngine) -> None:
    engine = FaultyEngine(inline, lambda *_: None, synchronous=False)
    carrier = carrier_over(engine, concurrency=4)
    openings = [await carrier.open(TASK, seed) for seed in range(4)]
    assert inline.num_sandboxes == 4
    # Of the fifth all four children fork at once but one, which goes on in the opening's sandbox.
    async with asyncio.timeout(DEADLINE_S):
        opening = await carrier.open(TASK, 9)
        assert inline.num_sandboxes == 4, "the oldest made room"
        results = await carrier.run([job(opening.checkpoint, seed) for seed in range(8)])
        results += await carrier.run([job(openings[0].checkpoint, 0)])
    assert all(result.failure is None for result in results)
    assert engine.most_sandboxes == 4
    await carrier.release([*saved(results), opening.checkpoint, *(each.checkpoint for each in openings)])
    assert inline.num_sandboxes == 0


async def test_branches_that_are_played_again_have_the_place_that_an_heir_would_take(
    inline: InlineEngine,
) -> None:
    engine = FaultyEngine(inline, lambda *_: None, synchronous=False)
    carrier = carrier_over(engine, concurrency=1)
    opening = await carrier.open(TASK, 0)
    for seed in range(24):
        [result] = await carrier.run([job(opening.checkpoint, seed)])
        assert result.failure is None
    assert carrier._deferral.is_verified  # pyright: ignore[reportPrivateUsage]
    assert engine.most_sandboxes == 1


async def test_what_a_playout_has_spoilt_is_no_heir(inline: InlineEngine) -> None:
    carrier = carrier_over(inline)
    opening = await carrier.open(TASK, 0)
    inherit = Randomness(RngPolicy.INHERIT)
    for playout in (PlayoutRequest(5, 1), Lookahead(2, 1)):
        [result] = await carrier.run([BranchJob(opening.checkpoint, (0,), inherit, playout)])
        assert result.checkpoint is not None
        assert inline.num_sandboxes == 0
    [result] = await carrier.run([BranchJob(opening.checkpoint, (0,), inherit)])
    assert inline.num_sandboxes == 1


# --- heirs that are gone, or in the way


async def kill_all(inline: InlineEngine) -> None:
    for sandbox in list(inline._sandboxes.values()):  # pyright: ignore[reportPrivateUsage]
        await sandbox.kill()


@pytest.mark.parametrize("synchronous", [True, False])
async def test_a_child_whose_heir_has_died_is_cloned(inline: InlineEngine, synchronous: bool) -> None:
    engine = FaultyEngine(inline, lambda *_: None, synchronous=synchronous)
    carrier = carrier_over(engine)
    opening = await carrier.open(TASK, 0)
    await kill_all(inline)
    [result] = await carrier.run([job(opening.checkpoint, 1)])
    assert result.failure is None
    assert (count(carrier, "continue"), count(carrier, "clone")) == (0, 1)
    assert engine.counts["take_over"] == 1
    await carrier.release([opening.checkpoint, *saved([result])])
    async with asyncio.timeout(DEADLINE_S):  # all slots are free
        assert len(await carrier.run([job((await carrier.open(TASK, 1)).checkpoint, 1)] * 8)) == 8


@pytest.mark.process
@pytest.mark.skipif(what_is_missing("process", ImageConfig()) is not None, reason="needs bubblewrap")
async def test_a_process_that_was_killed_is_missed_by_nobody_but_its_children(tmp_path: Path) -> None:
    from process_helpers import keepers

    from rollout.sandbox.process.engine import ProcessEngine

    async with ProcessEngine(EngineConfig(kind="process"), tmp_path) as engine:
        carrier = carrier_over(engine)
        opening = await carrier.open(TASK, 0)
        before = {process.pid for process in keepers(engine)}
        inherit = Randomness(RngPolicy.INHERIT)
        [child] = await carrier.run([BranchJob(opening.checkpoint, (0,), inherit)])
        assert child.checkpoint is not None
        assert engine.num_sandboxes == 1
        [heir] = [process for process in keepers(engine) if process.pid not in before]
        heir.kill()  # a checkpoint of this engine is the stopped sandbox, so it is gone too
        heir.wait(DEADLINE_S)
        jobs = [BranchJob(begin, (0,), inherit) for begin in (child.checkpoint, opening.checkpoint)]
        lost, sibling = await carrier.run(jobs)
        assert lost.failure is not None
        assert lost.failure.boundary == "checkpoint"
        assert sibling.failure is None


async def test_a_handshake_that_fails_is_followed_by_a_clone(inline: InlineEngine) -> None:
    error = ForkError("it did not confirm", retryable=True)
    engine = FaultyEngine(inline, lambda phase, _: Fault(error) if phase == "take_over" else None)
    carrier = carrier_over(engine, concurrency=1)
    expected = await grown(carrier_over(inline, ways=["clone"]))
    assert await grown(carrier) == expected
    assert count(carrier, "continue") == 0
    assert carrier.stats.failed_branches == 0
    assert inline.num_sandboxes == 0


async def test_cancelling_a_run_ends_heirs_and_who_takes_them(inline: InlineEngine) -> None:
    is_taking = asyncio.Event()

    def hang(phase: str, _: int) -> Fault | None:
        if phase == "take_over":
            is_taking.set()
            return Fault(delay_s=60)
        return None

    engine = FaultyEngine(inline, hang, synchronous=False)
    carrier = carrier_over(engine, concurrency=3)
    first, second = await carrier.open(TASK, 0), await carrier.open(TASK, 1)
    running = asyncio.create_task(carrier.run([job(first.checkpoint, 1), job(first.checkpoint, 2)]))
    await is_taking.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert inline.num_sandboxes == 1, "the other opening's heir"
    assert carrier.stats.checkpoints == 2
    await carrier.release([second.checkpoint])
    assert inline.num_sandboxes == 0
    async with asyncio.timeout(DEADLINE_S):
        results = await carrier.run([job(first.checkpoint, seed) for seed in range(6)])
    assert all(result.failure is None for result in results)


async def test_an_heir_outlives_the_eviction_of_its_checkpoint(inline: InlineEngine) -> None:
    limits = EngineConfig.model_construct(**EngineConfig().model_dump() | {"checkpoint_budget_bytes": 1})
    expected = [facts(result) for result in await chained(carrier_over(inline, ways=["clone"]))]
    for ways in (["clone"], WAYS):
        carrier = carrier_over(inline, limits=limits, ways=ways)
        assert [facts(result) for result in await chained(carrier)] == expected
        assert carrier.stats.checkpoint_bytes <= 1
        assert inline.num_sandboxes == 0
        found = carrier.stats.remade_checkpoints
        assert found == 0 if "continue" in ways else found > 8


async def chained(carrier: LocalBrancher) -> list[BranchResult]:
    """Eight branches, each of the one before; `inherit`, so that none is played again as a probe."""
    opening = await carrier.open(TASK, 3)
    results: list[BranchResult] = []
    begin = opening.checkpoint
    for _ in range(8):
        [result] = await carrier.run([BranchJob(begin, (0,), Randomness(RngPolicy.INHERIT))])
        results.append(result)
        await carrier.release([begin])
        assert result.checkpoint is not None
        begin = result.checkpoint
    await carrier.release([begin])
    return results


async def test_closing_the_engine_ends_heirs() -> None:
    async with InlineEngine(EngineConfig()) as engine:
        carrier = carrier_over(engine)
        opening = await carrier.open(TASK, 0)
        assert engine.num_sandboxes == 1
    assert engine.num_sandboxes == 0
    [result] = await carrier.run([job(opening.checkpoint, 1)])
    assert result.failure is not None
    await carrier.release([opening.checkpoint])


async def verified(
    inline: InlineEngine, engine: Engine, ways: Sequence[str] = ("inherit",)
) -> tuple[LocalBrancher, Checkpoint]:
    """A carrier that was seen to repeat, and the state after so many steps, with its heir."""
    carrier = carrier_over(engine, ways=ways)
    begin = (await carrier.open(TASK, 3)).checkpoint
    for seed in range(24):
        [result] = await carrier.run([BranchJob(begin, (0,), Randomness.seeded(seed))])
        await carrier.release([begin])
        assert result.checkpoint is not None
        begin = result.checkpoint
    assert inline.num_sandboxes == 1
    return carrier, begin


async def test_a_last_child_that_fails_can_be_tried_again(inline: InlineEngine) -> None:
    is_broken = False

    def fails(phase: str, _: int) -> Fault | None:
        return (
            Fault(GuestError("the guest is gone", retryable=True))
            if is_broken and phase == "env.step"
            else None
        )

    engine = FaultyEngine(inline, fails)
    carrier, begin = await verified(inline, engine)
    held, inherited = carrier.stats.checkpoints, count(carrier, "inherit")
    is_broken = True
    [failed] = await carrier.run([job(begin, 5, is_last=True)])
    assert failed.failure is not None
    assert count(carrier, "inherit") == inherited + 1
    assert carrier.stats.checkpoints == held - 1, "the checkpoint was given up"
    is_broken = False
    [again] = await carrier.run([job(begin, 5, is_last=True)])
    assert again.failure is None
    assert carrier.stats.remade_checkpoints >= 1
    await carrier.release([begin, *saved([again])])
    assert carrier.stats.checkpoints == 0
    assert inline.num_sandboxes == 0


async def test_a_checkpoint_that_siblings_need_is_not_given_up(inline: InlineEngine) -> None:
    carrier, begin = await verified(inline, inline, WAYS)
    inherited, remade = count(carrier, "inherit"), carrier.stats.remade_checkpoints
    results = await carrier.run([job(begin, 0), job(begin, 1, is_last=True)])
    assert all(result.failure is None for result in results)
    assert count(carrier, "inherit") == inherited
    assert carrier.stats.remade_checkpoints == remade


async def test_an_heir_of_an_unsaved_state_is_saved_when_its_child_comes(inline: InlineEngine) -> None:
    carrier = carrier_over(inline, concurrency=2)
    opening = await carrier.open(TASK, 3)
    results = await carrier.run([job(opening.checkpoint, seed) for seed in range(24)])
    unsaved = [each for each in saved(results) if not each.private_bytes]
    assert unsaved
    held, kept = carrier.stats.checkpoints, inline.num_sandboxes
    assert kept > 0
    [late] = await carrier.run([job(unsaved[-1], 7)])
    assert late.failure is None
    assert count(carrier, "replay") == 0
    assert count(carrier, "continue") > 0
    assert carrier.stats.checkpoints >= held + 1
    plain = carrier_over(inline, ways=["clone"])
    same = await plain.open(TASK, 3)
    again = await plain.run([job(same.checkpoint, seed) for seed in range(24)])
    place = next(i for i, each in enumerate(results) if each.checkpoint is unsaved[-1])
    begin = again[place].checkpoint
    assert begin is not None
    [expected] = await plain.run([job(begin, 7)])
    assert facts(late) == facts(expected)


async def test_an_unsaved_state_whose_heir_cannot_be_saved_is_played_again(inline: InlineEngine) -> None:
    is_broken = False

    def fails(phase: str, _: int) -> Fault | None:
        nonlocal is_broken
        if is_broken and phase == "checkpoint":
            is_broken = False
            return Fault(CheckpointError("cannot be saved"))
        return None

    carrier = carrier_over(FaultyEngine(inline, fails), concurrency=2)
    opening = await carrier.open(TASK, 3)
    results = await carrier.run([job(opening.checkpoint, seed) for seed in range(24)])
    unsaved = [each for each in saved(results) if not each.private_bytes]
    is_broken = True
    [late] = await carrier.run([job(unsaved[-1], 7)])
    assert late.failure is None
    assert not is_broken
    assert count(carrier, "replay") == 1


async def test_an_opening_without_room_leaves_no_heir(inline: InlineEngine) -> None:
    class Broken(GymEnv):
        async def reset(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            raise EnvError("no episode")

    carrier = LocalBrancher(inline, Broken(env_id="FrozenLake-v1"), concurrency=1)
    for _ in range(2):
        with pytest.raises(EnvError):
            await carrier.open(TASK, 0)
    assert inline.num_sandboxes == 0


async def test_random_calls_keep_to_the_slots(inline: InlineEngine) -> None:
    """Opens, runs, releases and cancels in any order: at the end every slot is free, and nothing is left."""
    rng = random.Random(5)
    engine = FaultyEngine(inline, lambda *_: Fault(delay_s=rng.random() * 0.002), synchronous=False)
    carrier = carrier_over(engine, concurrency=3)
    await carrier.prepare()

    async def life(seed: int) -> None:
        own = random.Random(seed)
        opening = await carrier.open(TASK, seed)
        held = [opening.checkpoint]
        for _ in range(6):
            jobs = [job(own.choice(held), own.randrange(99)) for _ in range(own.randrange(1, 7))]
            running = asyncio.create_task(carrier.run(jobs))
            if own.random() < 0.3:
                await asyncio.sleep(own.random() * 0.01)
                running.cancel()
            [outcome] = await asyncio.gather(running, return_exceptions=True)
            if not isinstance(outcome, BaseException):
                assert all(result.failure is None for result in outcome)
                held += saved(outcome)
            assert inline.num_sandboxes <= 3
        await carrier.release(held)

    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*(life(seed) for seed in range(5)))
        assert inline.num_sandboxes == 0
        assert carrier.stats.checkpoints == 0
        results = await carrier.run([job((await carrier.open(TASK, 1)).checkpoint, 1)] * 6)
        assert all(result.failure is None for result in results)
