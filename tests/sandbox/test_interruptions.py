"""What is cancelled or overtaken half way: no slot is lost, no state made twice, none in use is given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from envs.gym import GymEnv
from rollout.branch import BranchJob
from rollout.config import EngineConfig
from rollout.env import Task
from rollout.errors import GuestError
from rollout.sandbox.base import Checkpoint, Sandbox
from rollout.sandbox.branching import LocalBrancher
from rollout.sandbox.holdings import Holdings, Pinned, Remade
from rollout.sandbox.inline import InlineEngine
from rollout.sandbox.lineage import OpeningOrigin, Origin
from rollout.testing import Fault, FaultyEngine, FaultySandbox
from rollout.types import Randomness

TASK = Task("only")
DEADLINE_S = 60.0


@pytest.fixture
async def inline() -> AsyncIterator[InlineEngine]:
    async with InlineEngine(EngineConfig()) as engine:
        yield engine


def carrier_over(engine: FaultyEngine, concurrency: int, ways: Sequence[str]) -> LocalBrancher:
    env = GymEnv(env_id="FrozenLake-v1")
    return LocalBrancher(engine, env, concurrency=concurrency, ways=ways, clock=lambda: 0.0)


def job(begin: Checkpoint, seed: int, *, is_last: bool = False) -> BranchJob:
    return BranchJob(begin, (seed % 2,), Randomness.seeded(seed), state_hash=True, is_last=is_last)


class SlowToEnd(FaultySandbox):
    """Ended once, it takes long to end again, until whoever waits for that is cancelled."""

    num_kills = 0

    def __init__(self, engine: FaultyEngine, sandbox: Sandbox, is_ending: asyncio.Event) -> None:
        super().__init__(engine, sandbox)
        self._is_ending = is_ending

    async def kill(self) -> None:
        await super().kill()
        self.num_kills += 1
        if self.num_kills == 2:
            self._is_ending.set()
            await asyncio.sleep(2 * DEADLINE_S)


class SlowEngine(FaultyEngine):
    """Its clones are slow to end while `is_slow`."""

    def __init__(self, engine: InlineEngine) -> None:
        super().__init__(engine, lambda *_: None, synchronous=False)
        self.is_slow = False
        self.is_ending = asyncio.Event()

    async def fork(
        self, checkpoint: Checkpoint, n: int = 1, *, randomness: Sequence[Randomness] | None = None
    ) -> list[Sandbox]:
        clones = await super().fork(checkpoint, n, randomness=randomness)
        return [SlowToEnd(self, clone, self.is_ending) for clone in clones] if self.is_slow else clones


async def test_a_run_that_is_cancelled_while_its_sandboxes_end_gives_its_slots_back(
    inline: InlineEngine,
) -> None:
    engine = SlowEngine(inline)
    carrier = carrier_over(engine, 2, ["clone"])
    opening = await carrier.open(TASK, 0)
    engine.is_slow = True
    async with asyncio.timeout(DEADLINE_S):
        for _ in range(2):
            engine.is_ending.clear()
            running = asyncio.create_task(carrier.run([job(opening.checkpoint, 1)]))
            await engine.is_ending.wait()
            running.cancel()
            [outcome] = await asyncio.gather(running, return_exceptions=True)
            assert isinstance(outcome, asyncio.CancelledError)
        engine.is_slow = False
        await carrier.open(TASK, 1)
    assert inline.num_sandboxes == 0


async def test_heirs_that_make_room_for_a_call_that_is_cancelled_are_ended_all_the_same(
    inline: InlineEngine,
) -> None:
    carrier = carrier_over(FaultyEngine(inline, lambda *_: None, synchronous=False), 4, ["continue"])
    openings = [(await carrier.open(TASK, seed)).checkpoint for seed in range(4)]
    assert inline.num_sandboxes == 4
    taking = asyncio.create_task(carrier._take_slots(2))  # pyright: ignore[reportPrivateUsage]
    await asyncio.sleep(0)  # two heirs are about to end
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    await carrier.release(openings)
    assert inline.num_sandboxes == 0
    async with asyncio.timeout(DEADLINE_S):
        for seed in range(4):  # whose heirs take all slots
            await carrier.open(TASK, seed)
    assert inline.num_sandboxes == 4


async def test_a_checkpoint_that_is_wanted_since_the_way_was_chosen_is_not_given_up(
    inline: InlineEngine,
) -> None:
    is_slow = False
    engine = FaultyEngine(
        inline,
        lambda phase, _: Fault(delay_s=0.01) if is_slow and phase == "fork" else None,
        synchronous=False,
    )
    carrier = carrier_over(engine, 4, ["inherit", "clone"])
    begin = (await carrier.open(TASK, 3)).checkpoint
    for seed in range(24):  # until it was seen to repeat
        [result] = await carrier.run([job(begin, seed)])
        assert result.checkpoint is not None
        await carrier.release([result.checkpoint])
    remade = carrier.stats.remade_checkpoints
    is_slow = True
    # Both choose while nobody uses the checkpoint; then the first clones it, which takes a while.
    [cloned], [last] = await asyncio.gather(
        carrier.run([job(begin, 0)]), carrier.run([job(begin, 1, is_last=True)])
    )
    assert cloned.failure is None
    assert last.failure is None
    assert carrier.stats.remade_checkpoints == remade
    ways = carrier.stats.ways
    assert "inherit" not in ways
    assert ways["continue"].count == 1, "it went on in the heir, and the checkpoint stayed"


async def test_who_comes_while_a_state_is_made_for_the_second_time_waits_for_it(inline: InlineEngine) -> None:
    num_made = 0
    may_fail, may_go_on = asyncio.Event(), asyncio.Event()

    async def replay(origin: Origin, parent: Checkpoint | Remade | None) -> Remade:
        nonlocal num_made
        num_made += 1
        if num_made == 1:
            await may_fail.wait()
            raise GuestError("the guest is gone")
        await may_go_on.wait()
        sandbox = await inline.boot("")
        return Remade(await sandbox.checkpoint(), sandbox)

    holdings = Holdings(inline, 1 << 30, replay, lambda _: 0.0)
    sandbox = await inline.boot("")
    checkpoint = await sandbox.checkpoint()
    await holdings.keep_opening(checkpoint, OpeningOrigin(TASK, 0))
    assert await holdings.give_up(checkpoint)
    first, second = (asyncio.create_task(holdings.pin(checkpoint)) for _ in range(2))
    await asyncio.sleep(0)
    may_fail.set()
    with pytest.raises(GuestError):
        await first
    while num_made < 2:
        await asyncio.sleep(0)
    third = asyncio.create_task(holdings.pin(checkpoint))
    await asyncio.sleep(0)
    may_go_on.set()
    pins: list[Pinned] = await asyncio.gather(second, third)
    assert num_made == 2
    assert pins[0].held == pins[1].held
    assert len(holdings) == 1
