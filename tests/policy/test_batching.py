"""The batching queue: who shares a call, who waits for whom, and what an error reaches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from rollout.errors import PolicyError
from rollout.policy.batching import BatchQueue

FOR_EVER_S = 3600.0


class Model:
    """Doubles; notes what it was called with. It waits for `gate`, and fails on a 13."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.running = self.most_running = 0

    async def __call__(self, items: list[int]) -> Sequence[int]:
        self.calls.append(items)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await self.gate.wait()
        self.running -= 1
        if 13 in items:
            raise ValueError("unlucky")
        return [2 * item for item in items]


def queue(model: Model, *, max_items: int = 100, max_wait_s: float = FOR_EVER_S) -> BatchQueue[int, int]:
    return BatchQueue(model, max_items=max_items, max_wait_s=max_wait_s)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def client(batches: BatchQueue[int, int], *requests: list[int]) -> list[Sequence[int]]:
    with batches.client():
        return [await batches.ask(request) for request in requests]


async def test_all_clients_that_wait_share_a_call_and_get_their_own_answers() -> None:
    model = Model()
    batches = queue(model)
    async with asyncio.timeout(10):
        answers = await asyncio.gather(*(client(batches, [i, 20 + i], [100 + i]) for i in range(4)))
    assert answers == [[[2 * i, 40 + 2 * i], [200 + 2 * i]] for i in range(4)]
    assert [sorted(call) for call in model.calls] == [
        [0, 1, 2, 3, 20, 21, 22, 23],
        [100, 101, 102, 103],
    ]


async def test_a_client_that_is_alone_waits_for_nobody() -> None:
    model = Model()
    batches = queue(model)
    async with asyncio.timeout(10):
        assert await client(batches, [1], [2]) == [[2], [4]]
    assert model.calls == [[1], [2]]


async def test_one_that_leaves_is_not_waited_for() -> None:
    model = Model()
    batches = queue(model)
    with batches.client():
        waiting = asyncio.create_task(client(batches, [1]))
        await settle()
        assert model.calls == [], "two are playing, one has asked"
    async with asyncio.timeout(10):
        assert await waiting == [[2]]


async def test_enough_items_are_a_call_at_once() -> None:
    model = Model()
    batches = queue(model, max_items=3)
    with batches.client(), batches.client(), batches.client():
        first = asyncio.create_task(batches.ask([1, 2]))
        await settle()
        assert model.calls == []
        second = asyncio.create_task(batches.ask([3]))
        async with asyncio.timeout(10):
            assert (await first, await second) == ([2, 4], [6])
    assert model.calls == [[1, 2, 3]]


async def test_nobody_waits_longer_than_the_limit() -> None:
    model = Model()
    batches = queue(model, max_wait_s=0.01)
    with batches.client(), batches.client():
        async with asyncio.timeout(10):
            assert await batches.ask([1]) == [2]
    assert model.calls == [[1]]


async def test_what_comes_during_a_call_makes_up_the_next() -> None:
    model = Model()
    batches = queue(model, max_items=1)
    model.gate.clear()
    asked = [asyncio.create_task(client(batches, [i])) for i in range(1, 5)]
    await settle()
    assert model.calls == [[1, 2, 3, 4]]
    late = [asyncio.create_task(client(batches, [i])) for i in (5, 6)]
    await settle()
    model.gate.set()
    async with asyncio.timeout(10):
        assert await asyncio.gather(*asked, *late) == [[[2 * i]] for i in range(1, 7)]
    assert model.calls == [[1, 2, 3, 4], [5, 6]]
    assert model.most_running == 1


async def test_an_error_reaches_the_requests_of_its_call_and_no_other() -> None:
    model = Model()
    batches = queue(model)
    async with asyncio.timeout(10):
        failed = await asyncio.gather(client(batches, [13]), client(batches, [1]), return_exceptions=True)
        assert [str(error) for error in failed] == ["unlucky"] * 2
        assert await client(batches, [2]) == [[4]]


async def test_a_wrong_number_of_answers_is_an_error() -> None:
    async def forgets(items: list[int]) -> list[int]:
        return items[1:]

    batches: BatchQueue[int, int] = BatchQueue(forgets, max_items=9, max_wait_s=0.0)
    with pytest.raises(PolicyError, match="1 answers for 2 items"):
        await batches.ask([1, 2])


async def test_a_request_that_is_cancelled_takes_nothing_from_the_others() -> None:
    model = Model()
    batches = queue(model)
    gone = asyncio.create_task(client(batches, [1]))
    stays = asyncio.create_task(client(batches, [2]))
    with batches.client():
        await settle()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
    async with asyncio.timeout(10):
        assert await stays == [[4]]
    assert model.calls == [[2]]


async def test_one_cancelled_during_its_call_too() -> None:
    model = Model()
    model.gate.clear()
    batches = queue(model)
    gone, stays = (asyncio.create_task(client(batches, [i])) for i in (1, 2))
    await settle()
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    model.gate.set()
    async with asyncio.timeout(10):
        assert await stays == [[4]]
    assert model.calls == [[1, 2]]
