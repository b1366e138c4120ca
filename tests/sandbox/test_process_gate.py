"""The gate: shared users together, one alone, in order, whatever is cancelled."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.sandbox.process.gate import Gate


async def test_one_alone_waits_for_those_inside_and_holds_up_those_that_come_later():
    gate, log = Gate(), []
    leave = asyncio.Event()

    async def user(name, way_in, event=None):
        async with way_in():
            log.append(f"{name} in")
            if event is not None:
                await event.wait()
            log.append(f"{name} out")

    first = asyncio.create_task(user("first", gate.shared, leave))
    second = asyncio.create_task(user("second", gate.shared, leave))
    await asyncio.sleep(0)
    alone = asyncio.create_task(user("alone", gate.alone))
    late = asyncio.create_task(user("late", gate.shared))
    await asyncio.sleep(0)
    assert log == ["first in", "second in"]
    leave.set()
    await asyncio.gather(first, second, alone, late)
    assert log[2:4] == ["first out", "second out"]
    assert log[4:] == ["alone in", "alone out", "late in", "late out"]


async def test_an_error_inside_lets_the_next_in():
    gate = Gate()
    with pytest.raises(KeyError):
        async with gate.alone():
            raise KeyError
    async with gate.shared(), gate.shared():
        pass
    async with gate.alone():
        pass


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 4)), max_size=12))
def test_whatever_is_cancelled_nobody_is_locked_out_and_alone_is_alone(users):
    asyncio.run(play(users))


async def play(users):
    gate = Gate()
    inside: list[bool] = []

    async def use(alone, num_pauses):
        async with gate.alone() if alone else gate.shared():
            inside.append(alone)
            try:
                assert not (any(inside) and len(inside) > 1)
                for _ in range(num_pauses):
                    await asyncio.sleep(0)
            finally:
                inside.remove(alone)

    tasks = []
    for alone, num_pauses, cancel_after in users:
        tasks.append(asyncio.create_task(use(alone, num_pauses)))
        if cancel_after < 3:
            for _ in range(cancel_after):
                await asyncio.sleep(0)
            tasks[-1].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
    async with gate.alone():
        pass
