from __future__ import annotations

import asyncio

import pytest

from rollout.sandbox.slots import Slots


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_who_asked_first_is_served_first_even_if_the_next_would_fit() -> None:
    slots = Slots(2)
    await slots.take(1)
    order: list[str] = []

    async def want(name: str, n: int) -> None:
        await slots.take(n)
        order.append(name)

    both = asyncio.create_task(want("both", 2))
    one = asyncio.create_task(want("one", 1))
    await settle()
    assert order == []
    assert slots.num_waiting == 3
    slots.give_back(1)
    await settle()
    assert order == ["both"]
    slots.give_back(2)
    await asyncio.gather(both, one)
    assert order == ["both", "one"]


@pytest.mark.parametrize("is_granted", [False, True])
async def test_a_cancelled_wait_takes_nothing(is_granted: bool) -> None:
    slots = Slots(1)
    await slots.take(1)
    waiting = asyncio.create_task(slots.take(1))
    await settle()
    if is_granted:
        slots.give_back(1)  # granted in the same tick in which it is cancelled
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    if not is_granted:
        slots.give_back(1)
    async with asyncio.timeout(1):
        await slots.take(1)


async def test_who_waits_behind_a_cancelled_one_is_served() -> None:
    slots = Slots(4)
    await slots.take(2)
    many, one = asyncio.create_task(slots.take(4)), asyncio.create_task(slots.take(1))
    await settle()
    assert not one.done()
    many.cancel()
    await asyncio.gather(many, return_exceptions=True)
    async with asyncio.timeout(1):
        await one
    assert slots.num_free == 1
