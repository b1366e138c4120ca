"""Every engine keeps every promise of the contract, and the checks notice an engine that does not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from engines import ENGINES, EngineUnderTest

from rollout.config import EngineConfig
from rollout.sandbox import wire
from rollout.sandbox.base import Checkpoint, Engine, Sandbox
from rollout.sandbox.contract import CHECKS, Check, ContractViolation, seeded_trace
from rollout.sandbox.contract.episodes import check_inherit, check_seeded, check_unique
from rollout.sandbox.contract.forks import check_exactly_n, check_kill
from rollout.sandbox.inline import InlineEngine
from rollout.types import Randomness, RngPolicy


@pytest.fixture(params=[pytest.param(each, id=each.name, marks=each.marks) for each in ENGINES])
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Engine]:
    under_test: EngineUnderTest = request.param
    async with under_test.make(tmp_path) as made:
        yield made


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
async def test_contract(engine: Engine, check: Check) -> None:
    await check(engine)


async def test_seeds_give_the_same_as_inline(engine: Engine) -> None:
    async with InlineEngine(EngineConfig(kind="inline")) as reference:
        expected = await seeded_trace(reference)
    actual = await seeded_trace(engine)
    for index, (wanted, got) in enumerate(zip(expected, actual, strict=True)):
        assert wire.pack(wanted) == wire.pack(got), index


class BrokenEngine(InlineEngine):
    """Forks one clone too few, and all with one randomness."""

    policy = RngPolicy.INHERIT

    async def fork(
        self, checkpoint: Checkpoint, n: int = 1, *, randomness: Sequence[Randomness] | None = None
    ) -> list[Sandbox]:
        same = Randomness(self.policy)
        return await super().fork(checkpoint, max(1, n - 1), randomness=[same] * max(1, n - 1))


class ForgetfulEngine(BrokenEngine):
    policy = RngPolicy.UNIQUE

    def forget(self, sandbox: object) -> None:
        """Keeps counting what has ended."""


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (BrokenEngine, check_exactly_n),
        (BrokenEngine, check_seeded),
        (BrokenEngine, check_unique),
        (ForgetfulEngine, check_kill),
        (ForgetfulEngine, check_inherit),
    ],
)
async def test_a_broken_promise_is_noticed(kind: type[InlineEngine], check: Check) -> None:
    async with kind(EngineConfig(kind="inline")) as broken:
        with pytest.raises((ContractViolation, ValueError)):
            await check(broken)
