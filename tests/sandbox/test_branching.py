"""The branch carrier over the inline engine: results, failures, deadlines, the checkpoint budget."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from envs.gym import GymEnv
from rollout.branch import BranchJob, BranchResult, Lookahead, LookaheadResult, Opening
from rollout.config import EngineConfig
from rollout.env import Task
from rollout.errors import CapacityError, CheckpointError, EnvError, ForkError, GuestError, RolloutError
from rollout.sandbox.base import Checkpoint, Sandbox
from rollout.sandbox.branching import LocalBrancher
from rollout.sandbox.heirs import WAYS
from rollout.sandbox.inline import InlineEngine
from rollout.testing import Fault, FaultPlan, FaultyEngine
from rollout.types import PlayoutRequest, PlayoutResult, Randomness, RngPolicy, Step, Value

TASK = Task("only")
CLONES = ("clone",)
DOWN, RIGHT = 1, 2


def no_faults(phase: str, count: int) -> Fault | None:
    return None


def fails(phase: str, count: int, error: RolloutError) -> FaultPlan:
    return lambda name, n: Fault(error) if (name, n) == (phase, count) else None


@pytest.fixture(scope="module")
def inline() -> Iterator[InlineEngine]:
    """One for all tests: it examines an environment once, before it trusts copies of it."""
    engine = InlineEngine(EngineConfig())
    yield engine
    asyncio.run(engine.close())


def env(is_slippery: bool = True) -> GymEnv:
    return GymEnv(env_id="FrozenLake-v1", kwargs={"is_slippery": is_slippery})


def brancher(
    inline: InlineEngine,
    plan: FaultPlan = no_faults,
    *,
    played: GymEnv | None = None,
    synchronous: bool = False,
    concurrency: int = 4,
    limits: EngineConfig | None = None,
    ways: Sequence[str] = WAYS,
) -> tuple[LocalBrancher, FaultyEngine]:
    engine = FaultyEngine(inline, plan, synchronous=synchronous)
    made = LocalBrancher(engine, played or env(), limits=limits, concurrency=concurrency, ways=ways)
    return made, engine


def jobs(opening: Opening, n: int = 6, actions: tuple[Value, ...] = (RIGHT,)) -> list[BranchJob]:
    playout = PlayoutRequest(horizon=20, seed=1)
    return [BranchJob(opening.checkpoint, actions, Randomness.seeded(i), playout) for i in range(n)]


def facts(result: BranchResult) -> object:
    """What of a result depends on the job alone."""
    return result.steps, result.playout, result.failure, result.checkpoint is None


@pytest.mark.parametrize("concurrency", [1, 3, 8])
async def test_results_depend_on_the_jobs_alone(inline: InlineEngine, concurrency: int) -> None:
    alone, _ = brancher(inline, synchronous=True)
    many, engine = brancher(inline, concurrency=concurrency)
    first = await alone.open(TASK, 7)
    expected = [facts(result) for result in await alone.run(jobs(first, 12))]
    second = await many.open(TASK, 7)
    assert first.step == second.step
    assert [facts(result) for result in await many.run(jobs(second, 12))] == expected
    assert len({str(fact) for fact in expected}) > 1, "slippery ice: seeds matter"
    assert engine.most_sandboxes <= concurrency
    assert inline.num_sandboxes == 0


async def test_a_branch_of_a_branch_goes_on(inline: InlineEngine) -> None:
    carrier, _ = brancher(inline, played=env(is_slippery=False))
    opening = await carrier.open(TASK, 0)
    [first] = await carrier.run([BranchJob(opening.checkpoint, (RIGHT,), Randomness.seeded(1))])
    assert first.checkpoint is not None
    [second] = await carrier.run([BranchJob(first.checkpoint, (RIGHT, DOWN), Randomness.seeded(2))])
    assert [step.observation for step in (*first.steps, *second.steps)] == [1, 2, 6]


async def test_after_the_end_nothing_is_played_or_kept(inline: InlineEngine) -> None:
    carrier, _ = brancher(inline, played=env(is_slippery=False))
    opening = await carrier.open(TASK, 0)
    job = BranchJob(opening.checkpoint, (RIGHT, DOWN, DOWN), Randomness(), PlayoutRequest(9, 9))
    [result] = await carrier.run([job])
    assert [step.observation for step in result.steps] == [1, 5]
    assert result.steps[-1].terminated
    assert result.checkpoint is None
    assert result.playout is None


@pytest.mark.parametrize("synchronous", [True, False])
@pytest.mark.parametrize(
    ("phase", "error"),
    [
        ("fork", ForkError("no clone", retryable=True)),
        ("env.step", EnvError("the environment raised")),
        ("checkpoint", CheckpointError("cannot be saved")),
        ("env.playout", GuestError("the guest is gone", retryable=True)),
    ],
)
async def test_a_failed_phase_is_a_result_and_nothing_of_it_is_kept(
    inline: InlineEngine, phase: str, error: RolloutError, synchronous: bool
) -> None:
    counts = {"fork": 1, "env.step": 0, "checkpoint": 2, "env.playout": 0}  # after those of prepare and open
    carrier, _ = brancher(inline, fails(phase, counts[phase], error), synchronous=synchronous, concurrency=2)
    opening = await carrier.open(TASK, 0)
    held = carrier.stats.checkpoints
    results = await carrier.run(jobs(opening, 4))
    failed = [result for result in results if result.failure is not None]
    assert len(failed) == 1
    assert failed[0].failure is not None
    assert (failed[0].failure.cause, failed[0].failure.boundary) == (error.message, error.boundary)
    assert failed[0].failure.retryable == error.retryable
    assert facts(failed[0]) == ((), None, failed[0].failure, True)
    kept = sum(result.checkpoint is not None for result in results)
    assert carrier.stats.checkpoints == held + kept
    assert carrier.stats.failed_branches == 1
    assert inline.num_sandboxes == 0


async def test_a_fork_of_several_fails_for_all_of_them(inline: InlineEngine) -> None:
    carrier, _ = brancher(inline, fails("fork", 1, ForkError("none")), concurrency=8, ways=CLONES)
    opening = await carrier.open(TASK, 0)
    results = await carrier.run(jobs(opening, 4))
    assert [result.failure is None for result in results] == [False] * 4


@pytest.mark.parametrize(
    ("phase", "limit", "boundary"),
    [
        ("fork", "fork_timeout_s", "fork"),
        ("env.step", "call_timeout_s", "guest"),
        ("env.playout", "call_timeout_s", "guest"),
        ("checkpoint", "checkpoint_timeout_s", "checkpoint"),
    ],
)
async def test_every_phase_has_a_deadline(
    inline: InlineEngine, phase: str, limit: str, boundary: str
) -> None:
    is_open = False

    def hang(name: str, _: int) -> Fault | None:
        return Fault(delay_s=60) if is_open and name == phase else None

    limits = EngineConfig.model_validate({limit: 0.05})
    carrier, _ = brancher(inline, hang, limits=limits, ways=CLONES)
    opening = await carrier.open(TASK, 0)
    is_open = True
    [result] = await carrier.run(jobs(opening, 1))
    assert result.failure is not None
    assert result.failure.boundary == boundary
    assert result.failure.retryable
    assert "longer than 0.05 s" in result.failure.cause
    assert inline.num_sandboxes == 0


async def test_cancelling_ends_every_clone(inline: InlineEngine) -> None:
    are_stepping = asyncio.Event()

    def hang(name: str, count: int) -> Fault | None:
        if (name, count) == ("env.step", 3):
            are_stepping.set()
        return Fault(delay_s=60) if name == "env.step" else None

    carrier, _ = brancher(inline, hang, ways=CLONES)
    opening = await carrier.open(TASK, 0)
    running = asyncio.create_task(carrier.run(jobs(opening, 12)))
    await are_stepping.wait()
    assert inline.num_sandboxes == 4
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert inline.num_sandboxes == 0
    assert carrier.stats.checkpoints == 1
    async with asyncio.timeout(10):  # the slots are free again
        await carrier.open(TASK, 1)


async def test_a_released_checkpoint_is_gone(inline: InlineEngine) -> None:
    carrier, _ = brancher(inline)
    opening = await carrier.open(TASK, 0)
    await carrier.release([opening.checkpoint])
    await carrier.release([opening.checkpoint])
    assert carrier.stats.checkpoints == 0
    [result] = await carrier.run(jobs(opening, 1))
    assert result.failure is not None
    assert result.failure.boundary == "checkpoint"
    assert not result.failure.retryable


async def chain(carrier: LocalBrancher, randomness: Randomness | None = None) -> list[BranchResult]:
    """Eight branches, each of the one before, then one of every second of them again."""
    opening = await carrier.open(TASK, 3)
    results: list[BranchResult] = []
    checkpoint: Checkpoint | None = opening.checkpoint
    held: list[Checkpoint] = []
    for depth in range(8):
        assert checkpoint is not None
        held.append(checkpoint)
        how = randomness or Randomness.seeded(depth)
        [result] = await carrier.run([BranchJob(checkpoint, (0,), how, state_hash=True)])
        results.append(result)
        checkpoint = result.checkpoint
    for checkpoint in held[::2]:
        how = randomness or Randomness.seeded(99)
        results += await carrier.run([BranchJob(checkpoint, (0,), how, state_hash=True)])
    return results


@pytest.mark.parametrize("randomness", [None, Randomness(RngPolicy.INHERIT)])
async def test_what_the_budget_evicts_is_made_again(
    inline: InlineEngine, randomness: Randomness | None
) -> None:
    roomy, _ = brancher(inline, ways=CLONES)
    expected = [facts(result) for result in await chain(roomy, randomness)]
    assert roomy.stats.evicted_checkpoints == 0
    limits = EngineConfig.model_construct(**EngineConfig().model_dump() | {"checkpoint_budget_bytes": 1})
    tight, _ = brancher(inline, limits=limits, ways=CLONES)
    assert [facts(result) for result in await chain(tight, randomness)] == expected
    assert tight.stats.evicted_checkpoints > 8
    assert tight.stats.remade_checkpoints > 8
    assert tight.stats.checkpoint_bytes <= 1
    assert roomy.stats.ways.keys() == {"clone"}
    assert roomy.stats.ways["clone"].count == 12
    assert tight.stats.ways.keys() == {"clone", "replay", "reset"}
    assert tight.stats.ways["clone"].count == 12
    replayed = tight.stats.ways["replay"].count + tight.stats.ways["reset"].count
    assert replayed == sum(1 + depth for depth in [*range(8), 0, 2, 4, 6])
    assert tight.stats.is_replayable
    assert inline.num_sandboxes == 0


async def test_what_cannot_be_made_again_is_never_evicted(inline: InlineEngine) -> None:
    roomy, _ = brancher(inline, ways=CLONES)
    opening = await roomy.open(TASK, 0)
    each_bytes = opening.checkpoint.private_bytes
    limits = EngineConfig.model_construct(
        **EngineConfig().model_dump() | {"checkpoint_budget_bytes": int(2.5 * each_bytes)}
    )
    tight, _ = brancher(inline, limits=limits, concurrency=1, ways=CLONES)
    opening = await tight.open(TASK, 0)
    unique = [BranchJob(opening.checkpoint, (0,), Randomness()) for _ in range(4)]
    results = await tight.run(unique)
    kept = [result.checkpoint for result in results if result.checkpoint is not None]
    refused = [result.failure for result in results if result.failure is not None]
    assert len(kept) == 2
    assert {failure.boundary for failure in refused} == {"capacity"}
    assert all("checkpoint_budget_bytes" in failure.cause for failure in refused)
    again = await tight.run([BranchJob(kept[0], (0,), Randomness.seeded(1), keep_checkpoint=False)])
    assert again[0].failure is None


async def test_a_state_that_comes_out_different_is_not_passed_off_as_the_same(inline: InlineEngine) -> None:
    class Drifting(GymEnv):
        drawn = 0

        async def step(self, sandbox: Sandbox, action: Value, *, state_hash: bool = False) -> Step:
            type(self).drawn += 1
            step = await super().step(sandbox, action, state_hash=state_hash)
            return replace(step, state_hash=str(self.drawn)) if state_hash else step

    limits = EngineConfig.model_construct(**EngineConfig().model_dump() | {"checkpoint_budget_bytes": 1})
    carrier, _ = brancher(inline, played=Drifting(env_id="FrozenLake-v1"), limits=limits)
    opening = await carrier.open(TASK, 0)
    [first] = await carrier.run([BranchJob(opening.checkpoint, (0,), Randomness.seeded(1), state_hash=True)])
    assert first.checkpoint is not None
    [second] = await carrier.run([BranchJob(first.checkpoint, (0,), Randomness.seeded(2))])
    assert second.failure is not None
    assert "does not repeat" in second.failure.cause
    assert not carrier.stats.is_replayable
    evicted = carrier.stats.evicted_checkpoints
    [third] = await carrier.run([BranchJob(first.checkpoint, (0,), Randomness.seeded(2))])
    assert third.failure is not None, "it is not tried again"
    assert "checkpoint_budget_bytes" in third.failure.cause
    with pytest.raises(CapacityError):  # nothing is evicted any more, and there is no room for it
        await carrier.open(TASK, 1)
    assert carrier.stats.evicted_checkpoints == evicted


async def test_an_environment_without_digests_is_told_by_what_it_shows(inline: InlineEngine) -> None:
    class Drifting(GymEnv):
        drawn = 0

        async def step(self, sandbox: Sandbox, action: Value, *, state_hash: bool = False) -> Step:
            type(self).drawn += 1
            step = await super().step(sandbox, action, state_hash=state_hash)
            return replace(step, observation=self.drawn)

    limits = EngineConfig.model_construct(**EngineConfig().model_dump() | {"checkpoint_budget_bytes": 1})
    carrier, _ = brancher(inline, played=Drifting(env_id="FrozenLake-v1"), limits=limits, ways=CLONES)
    opening = await carrier.open(TASK, 0)
    [first] = await carrier.run([BranchJob(opening.checkpoint, (0,), Randomness.seeded(1))])
    assert first.checkpoint is not None
    [second] = await carrier.run([BranchJob(first.checkpoint, (0,), Randomness.seeded(2))])
    assert second.failure is not None
    assert "does not repeat" in second.failure.cause
    assert inline.num_sandboxes == 0


async def test_preparing_fails_as_what_failed(inline: InlineEngine) -> None:
    carrier, _ = brancher(inline, fails("env.make", 0, EnvError("no such environment")))
    with pytest.raises(EnvError, match="no such environment"):
        await carrier.prepare()
    assert inline.num_sandboxes == 0
    await carrier.prepare()  # the next try begins anew
    assert (await carrier.open(TASK, 0)).step.observation == 0


async def test_a_playout_that_adds_up_to_no_number_is_a_failure(inline: InlineEngine) -> None:
    class Broken(GymEnv):
        async def playout(self, sandbox: Sandbox, request: PlayoutRequest) -> PlayoutResult:
            return replace(await super().playout(sandbox, request), value=float("nan"))

    carrier, _ = brancher(inline, played=Broken(env_id="FrozenLake-v1"))
    opening = await carrier.open(TASK, 0)
    for result in await carrier.run(jobs(opening, 3)):
        assert result.failure is not None
        assert result.failure.boundary == "env"
        assert "nan" in result.failure.cause
    assert carrier.stats.checkpoints == 1


@pytest.mark.parametrize("has_actions", [True, False])
async def test_a_lookahead_ends_in_an_observed_state(inline: InlineEngine, has_actions: bool) -> None:
    carrier, _ = brancher(inline, played=env(is_slippery=False))
    opening = await carrier.open(TASK, 0)
    request = Lookahead(3, 5, begin=None if has_actions else opening.step)
    job = BranchJob(opening.checkpoint, (RIGHT,) if has_actions else (), Randomness.seeded(1), request)
    [first], [again] = await carrier.run([job]), await carrier.run([job])
    found = first.playout
    assert isinstance(found, LookaheadResult)
    assert found == again.playout
    assert 1 <= found.num_steps <= 3
    assert bool(found.actions) != (found.last.terminated or found.last.truncated)
