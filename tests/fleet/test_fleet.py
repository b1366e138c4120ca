"""A fleet of hosts in this process: placement, back-pressure, lost hosts, draining."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from in_process import InProcessHost, run_config

from envs.gym import GymEnv
from rollout.branch import BranchJob, Opening
from rollout.config import RunConfig
from rollout.env import Task
from rollout.errors import BootError, CapacityError
from rollout.fleet.fleet import Fleet
from rollout.runner import Runner, episode_specs
from rollout.testing import comparable
from rollout.types import Randomness

TASK = Task("FrozenLake-v1")

Hosts = list[InProcessHost]


@asynccontextmanager
async def fleet_of(
    config: RunConfig, make: Callable[[int], InProcessHost] | None = None
) -> AsyncIterator[tuple[Fleet, Hosts]]:
    """A fleet and every host that it ever had."""
    hosts: Hosts = []

    def client() -> InProcessHost:
        hosts.append(make(len(hosts)) if make else InProcessHost(config))
        return hosts[-1]

    try:
        async with Fleet(config.fleet, [client]) as fleet:
            yield fleet, hosts
    finally:
        for host in hosts:
            await host.host.close()


def jobs(opening: Opening, n: int) -> list[BranchJob]:
    return [BranchJob(opening.checkpoint, (2,), Randomness.seeded(i)) for i in range(n)]


async def play(fleet: Fleet, config: RunConfig) -> list[dict[str, object]]:
    env = GymEnv(**config.env.args)
    env.learn(fleet.hosts[0].env_description)
    runner = Runner(env, fleet, config, engine="inline")
    specs = episode_specs(config, "test", env.tasks())
    return [comparable(each) for each in await asyncio.gather(*(runner.play(spec) for spec in specs))]


async def test_any_number_of_hosts_and_any_batch_plays_the_same() -> None:
    played: list[object] = []
    for changes in ({"hosts": 1}, {"hosts": 2, "batch": 1}, {"hosts": 3, "concurrent_branches": 1}):
        config = run_config(**changes)
        async with fleet_of(config) as (fleet, hosts):
            played.append(await play(fleet, config))
            assert all(host.num_runs for host in hosts), "every host had work"
            await fleet.refresh()
            assert fleet.stats().checkpoints == 0
            assert fleet.stats().failed_branches == 0
    assert played[0] == played[1] == played[2]


async def test_jobs_go_where_their_checkpoints_are() -> None:
    async with fleet_of(run_config(hosts=2)) as (fleet, hosts):
        first, second = await fleet.open(TASK, 1), await fleet.open(TASK, 2)
        mixed = [job for pair in zip(jobs(first, 3), jobs(second, 3), strict=True) for job in pair]
        results = await fleet.run(mixed)
        assert [result.failure for result in results] == [None] * 6
        assert [host.num_runs for host in hosts] == [1, 1]
        alone = await fleet.run(jobs(second, 3))
        assert [result.steps for result in alone] == [result.steps for result in results[1::2]]


async def test_senders_wait_for_room() -> None:
    async with fleet_of(run_config(concurrent_branches=2, batch=3)) as (fleet, hosts):
        opening = await fleet.open(TASK, 0)
        results = await asyncio.gather(*(fleet.run(jobs(opening, 5)) for _ in range(4)))
        assert {len(each) for each in results} == {5}
        assert all(result.failure is None for each in results for result in each)
        assert hosts[0].most_jobs <= 4


async def test_a_lost_host_is_replaced_and_what_it_held_is_gone() -> None:
    async with fleet_of(run_config()) as (fleet, hosts):
        opening = await fleet.open(TASK, 0)
        await fleet.run(jobs(opening, 3))
        await fleet.refresh()
        hosts[0].is_dead = True
        with pytest.raises(CapacityError, match="the host is gone") as caught:
            await fleet.run(jobs(opening, 1))
        assert caught.value.retryable
        with pytest.raises(CapacityError, match="no host holds") as caught:
            await fleet.run(jobs(opening, 1))
        assert caught.value.retryable
        await fleet.release([opening.checkpoint])
        again = await fleet.open(TASK, 0)
        assert again.step == opening.step
        assert fleet.num_lost_hosts == 1
        assert len(hosts) == 2
        assert fleet.stats().branches == 3, "counts do not go back"


async def test_episodes_on_a_host_that_dies_are_played_again() -> None:
    config = run_config(hosts=2)
    async with fleet_of(config) as (fleet, _):
        expected = await play(fleet, config)

    def dies_once(number: int) -> InProcessHost:
        host = InProcessHost(config)
        if number == 0:
            original = host.run

            async def run(epoch: int, key: str, batch: list[BranchJob]) -> object:
                host.is_dead = host.num_runs >= 3
                return await original(epoch, key, batch)

            host.run = run  # type: ignore[method-assign,assignment]
        return host

    async with fleet_of(config, dies_once) as (fleet, hosts):
        played = await play(fleet, config)
    assert len(hosts) == 3
    attempts = [each["episode"].pop("attempt") for each in played]
    for each in [*played, *expected]:
        each["episode"].pop("attempt", None)
        each["episode"].pop("earlier_failures")
    assert any(attempts)
    assert played == expected


async def test_a_host_that_does_not_answer_its_pulse_is_lost() -> None:
    async with fleet_of(run_config(lease_s=6.0)) as (fleet, hosts):
        opening = await fleet.open(TASK, 0)
        hosts[0].is_deaf = True
        await hosts[0].host.close()  # a real one would be ended by its reaper
        async with asyncio.timeout(30):
            while fleet.num_lost_hosts == 0:
                await asyncio.sleep(0.05)
        assert hosts[0].is_dead
        with pytest.raises(CapacityError):
            await fleet.run(jobs(opening, 1))
        await fleet.open(TASK, 0)


async def test_a_fleet_whose_hosts_cannot_be_replaced_is_broken() -> None:
    config = run_config()
    async with fleet_of(config, lambda number: InProcessHost(config, refuses_to_start=number > 0)) as (
        fleet,
        hosts,
    ):
        opening = await fleet.open(TASK, 0)
        hosts[0].is_dead = True
        with pytest.raises(CapacityError):
            await fleet.run(jobs(opening, 1))
        with pytest.raises(BootError, match="no such machine"):
            await fleet.open(TASK, 0)
        assert fleet.broken is not None
        assert len(hosts) == 4


async def test_hosts_that_cannot_all_start_are_all_ended() -> None:
    config = run_config(hosts=3)
    with pytest.raises(BootError, match="no such machine"):
        async with fleet_of(config, lambda number: InProcessHost(config, refuses_to_start=number == 1)):
            pytest.fail("the fleet must not start")


async def test_draining_lets_work_finish_and_takes_no_more() -> None:
    async with fleet_of(run_config()) as (fleet, hosts):
        opening = await fleet.open(TASK, 0)
        hosts[0].gate = asyncio.Event()
        running = asyncio.create_task(fleet.run(jobs(opening, 2)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        draining = asyncio.create_task(fleet.drain())
        await asyncio.sleep(0)
        with pytest.raises(CapacityError, match="draining"):
            await fleet.open(TASK, 1)
        assert not draining.done()
        hosts[0].gate.set()
        assert len(await running) == 2
        await draining


async def test_a_lease_is_room_on_the_host_that_holds_the_checkpoint() -> None:
    async with fleet_of(run_config(hosts=2, concurrent_branches=2)) as (fleet, _):
        opening = await fleet.open(TASK, 0)
        async with fleet.lease(opening.checkpoint, 4) as lease:
            assert lease.n == 4
            waiting = asyncio.create_task(fleet.run(jobs(opening, 1)))
            other = await fleet.open(TASK, 1)  # goes to the other host, which has room
            assert not waiting.done()
            async with fleet.lease(other.checkpoint, 1) as another:
                assert another.host != lease.host
        assert (await waiting)[0].failure is None
