"""States that are saved only when something begins there: the choice, and that no result depends on it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.gym import GymEnv
from rollout.branch import BranchJob, BranchResult, Opening
from rollout.config import EngineConfig
from rollout.env import Task
from rollout.errors import CheckpointError
from rollout.sandbox.base import Checkpoint, Sandbox
from rollout.sandbox.branching import LocalBrancher
from rollout.sandbox.deferral import NUM_PROBES, NUM_SAVED, Deferral
from rollout.sandbox.economics import WayEstimate, choose_way
from rollout.sandbox.inline import InlineEngine
from rollout.testing import Fault, FaultyEngine
from rollout.types import PlayoutRequest, Randomness, RngPolicy, Step, Value

TASK = Task("only")
NUM_BEFORE = 24
"""So many branches that the next are deferred, because that way was not tried yet."""

estimates = st.lists(
    st.builds(WayEstimate, st.sampled_from("abcd"), st.floats(0, 1e6), st.integers(0, 2000)),
    min_size=1,
    max_size=4,
    unique_by=lambda way: way.kind,
)


@given(estimates)
def test_the_cheapest_way_is_taken_unless_one_is_hardly_known(ways: list[WayEstimate]) -> None:
    chosen = next(way for way in ways if way.kind == choose_way(ways))
    num_choices = sum(way.num_tries for way in ways)
    least = min(way.num_tries for way in ways)
    if least >= 16 and least * 256 >= num_choices:
        assert chosen.expected_s == min(way.expected_s for way in ways)
    else:
        assert chosen.num_tries < 16 or chosen.num_tries * 256 < num_choices


@given(st.floats(0.001, 10), st.floats(0.001, 10))
def test_trying_the_dearer_way_is_bounded(first_s: float, second_s: float) -> None:
    tries = {"first": 0, "second": 0}
    costs = {"first": first_s, "second": second_s}
    for _ in range(2000):
        tries[choose_way([WayEstimate(kind, costs[kind], tries[kind]) for kind in costs])] += 1
    dearer = max(costs, key=lambda kind: (costs[kind], kind == "second"))
    assert 16 <= tries[dearer] <= 17


def test_no_way_is_an_error() -> None:
    with pytest.raises(ValueError, match="no way"):
        choose_way([])


def verified() -> Deferral:
    deferral = Deferral()
    for _ in range(NUM_SAVED):
        assert not deferral.defers(has_playout=True)
        assert not deferral.begins_probe()
        deferral.branched(1.0, has_playout=True, is_deferred=False)
    for _ in range(NUM_PROBES):
        assert not deferral.is_verified
        assert deferral.begins_probe()
        deferral.probed(1.0, is_same=True)
    assert deferral.is_verified
    assert not deferral.begins_probe()
    return deferral


@given(st.floats(0, 1), st.floats(0.01, 2.0), st.floats(0, 1))
def test_what_is_seldom_needed_is_deferred(deferred_s: float, again_s: float, share: float) -> None:
    deferral = verified()
    needed = 0.0
    for _ in range(1000):
        if not deferral.defers(has_playout=True):
            deferral.branched(1.0, has_playout=True, is_deferred=False)
            continue
        deferral.branched(deferred_s, has_playout=True, is_deferred=True)
        needed += share
        if needed >= 1.0:
            needed -= 1.0
            deferral.needed(again_s, has_playout=True)
    account = deferral._accounts[True]  # pyright: ignore[reportPrivateUsage]
    if deferred_s + max(share, 0.5) * max(again_s, 1.0) < 0.95:
        assert account.num_deferred > account.num_saved
    if deferred_s + min(share, 0.5) * min(again_s, 1.0) > 1.2:
        assert account.num_deferred < account.num_saved


def test_a_difference_forbids_for_good() -> None:
    deferral = verified()
    assert deferral.defers(has_playout=True)
    deferral.probed(0.1, is_same=False)
    assert not deferral.is_verified
    assert not deferral.defers(has_playout=True)


def test_what_is_too_dear_to_make_later_is_not_even_tried() -> None:
    deferral = verified()
    for _ in range(20):
        deferral.probed(2.5, is_same=True)
    assert not deferral.defers(has_playout=True)


def stopped() -> float:
    """A clock by which both ways cost the same, so that each is tried, however fast this machine is."""
    return 0.0


@pytest.fixture(scope="module")
def inline() -> Iterator[InlineEngine]:
    engine = InlineEngine(EngineConfig())
    yield engine
    asyncio.run(engine.close())


def branches(begin: Checkpoint, n: int, randomness: RngPolicy = RngPolicy.SEEDED) -> list[BranchJob]:
    playout = PlayoutRequest(horizon=20, seed=1)
    is_seeded = randomness is RngPolicy.SEEDED
    how = [Randomness.seeded(i) if is_seeded else Randomness(randomness) for i in range(n)]
    return [BranchJob(begin, (i % 2,), how[i], playout, state_hash=True) for i in range(n)]


def facts(result: BranchResult) -> object:
    return result.steps, result.playout, result.failure, result.checkpoint is None


def num_deferred(carrier: LocalBrancher) -> int:
    ways = carrier.stats.ways
    return ways["defer"].count if "defer" in ways else 0


async def grow(carrier: LocalBrancher, opening: Opening) -> list[BranchResult]:
    """Branches of the opening, of the last of these, and of the last of those."""
    results = await carrier.run(branches(opening.checkpoint, NUM_BEFORE))
    for _ in range(2):
        begin = [result.checkpoint for result in results if result.checkpoint is not None][-3:]
        for checkpoint in begin:
            results += await carrier.run(branches(checkpoint, 6))
    return results


@pytest.mark.parametrize("synchronous", [True, False])
async def test_results_do_not_depend_on_what_was_saved(inline: InlineEngine, synchronous: bool) -> None:
    found: list[list[object]] = []
    for defers in (False, True):
        engine = FaultyEngine(inline, lambda phase, n: None, synchronous=synchronous)
        carrier = LocalBrancher(engine, GymEnv(env_id="FrozenLake-v1"), concurrency=4, clock=stopped)
        if not defers:
            carrier._deferral.forbid()  # pyright: ignore[reportPrivateUsage]
        opening = await carrier.open(TASK, 3)
        results = await grow(carrier, opening)
        found.append([facts(result) for result in results])
        assert (num_deferred(carrier) > 0) == defers
        assert (carrier.stats.remade_checkpoints > 0) == defers
        await carrier.release([opening.checkpoint])
        await carrier.release([result.checkpoint for result in results if result.checkpoint is not None])
        assert carrier.stats.checkpoints == 0, "nothing is held for states that are gone"
        assert inline.num_sandboxes == 0
    assert found[0] == found[1]


async def deferring(
    inline: InlineEngine, env: GymEnv | None = None
) -> tuple[LocalBrancher, Opening, list[Checkpoint]]:
    """A carrier, and the unsaved states that it has left."""
    carrier = LocalBrancher(inline, env or GymEnv(env_id="FrozenLake-v1"), concurrency=1, clock=stopped)
    opening = await carrier.open(TASK, 3)
    saved = await carrier.run(branches(opening.checkpoint, NUM_BEFORE))
    made = [result.checkpoint for result in saved if result.checkpoint is not None]
    await carrier.release([each for each in made if each.private_bytes])
    return carrier, opening, [each for each in made if not each.private_bytes]


async def test_a_parent_outlives_its_release_while_a_state_would_be_made_from_it(
    inline: InlineEngine,
) -> None:
    carrier, opening, (first, second, *others) = await deferring(inline)
    await carrier.release(others)
    await carrier.release([opening.checkpoint])
    assert carrier.stats.checkpoints == 1
    [refused] = await carrier.run(branches(opening.checkpoint, 1))
    assert refused.failure is not None, "released is released"
    assert "released" in refused.failure.cause
    [result] = await carrier.run(branches(first, 1))
    assert result.failure is None
    assert carrier.stats.ways["replay"].count == 1
    await carrier.release([second])
    assert carrier.stats.checkpoints == 1 + (result.checkpoint is not None and not num_unsaved(result))
    [again] = await carrier.run(branches(first, 1))
    assert facts(again) == facts(result)
    assert carrier.stats.ways["replay"].count == 1, "it is held now"


def num_unsaved(result: BranchResult) -> int:
    return int(result.checkpoint is not None and result.checkpoint.private_bytes == 0)


@pytest.mark.parametrize("policy", [RngPolicy.INHERIT, RngPolicy.UNIQUE])
async def test_only_seeded_branches_are_deferred(inline: InlineEngine, policy: RngPolicy) -> None:
    carrier, opening, unsaved = await deferring(inline)
    assert unsaved
    before = num_deferred(carrier)
    for result in await carrier.run(branches(opening.checkpoint, 4, policy)):
        assert result.checkpoint is None or result.checkpoint.private_bytes > 0
    assert num_deferred(carrier) == before


async def test_an_environment_that_does_not_repeat_is_never_deferred(inline: InlineEngine) -> None:
    class Drifting(GymEnv):
        drawn = 0

        async def step(self, sandbox: Sandbox, action: Value, *, state_hash: bool = False) -> Step:
            type(self).drawn += 1
            return replace(
                await super().step(sandbox, action, state_hash=state_hash), state_hash=str(self.drawn)
            )

    carrier, opening, unsaved = await deferring(inline, Drifting(env_id="FrozenLake-v1"))
    assert not unsaved
    results = await carrier.run(branches(opening.checkpoint, 30))
    assert all(result.failure is None for result in results)
    assert num_deferred(carrier) == 0
    assert carrier.stats.is_replayable, "a probe decides about nothing else"


async def test_a_probe_that_fails_fails_nothing(inline: InlineEngine) -> None:
    seen: list[int] = []

    def fails_in_the_probe(phase: str, count: int) -> Fault | None:
        # After those of the prepared state, the opening, and the branches before the first probe.
        if (phase, count) == ("checkpoint", 2 + NUM_SAVED):
            seen.append(count)
            return Fault(CheckpointError("no room"))
        return None

    engine = FaultyEngine(inline, fails_in_the_probe)
    carrier = LocalBrancher(engine, GymEnv(env_id="FrozenLake-v1"), concurrency=1, clock=stopped)
    opening = await carrier.open(TASK, 3)
    results = await carrier.run(branches(opening.checkpoint, 40))
    assert seen
    assert all(result.failure is None for result in results)
    assert num_deferred(carrier) == 0
    assert inline.num_sandboxes == 0
