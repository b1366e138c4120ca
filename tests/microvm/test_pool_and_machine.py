import asyncio
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.errors import BootError, ForkError, RolloutError
from rollout.sandbox.microvm.machine import MachineShape, Start, qemu_argv
from rollout.sandbox.microvm.pool import Demand, VmmPool
from rollout.sandbox.microvm.ready import Ready

START = Start(binary="qemu", ram=Path("/ram"), share=False, qmp_fd=100, guest_fd=101, state_fd=102)


@given(takes=st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50))), start_s=st.floats(0, 5))
def test_demand_stays_between_its_watermarks(takes: list[tuple[float, int]], start_s: float) -> None:
    demand = Demand(low=2, high=20)
    for now_s, count in sorted(takes):
        demand.note_take(now_s, count)
        demand.note_start(start_s)
        assert 2 <= demand.target(now_s) <= 20
    assert demand.target(1000.0) == 2


def test_demand_follows_rate_and_burst() -> None:
    demand = Demand(low=1, high=100, window_s=10, start_s=1.0)
    for now_s in range(10):
        demand.note_take(float(now_s), 4)
    assert demand.target(9.0) == 4, "4 a second, and a start takes a second"
    demand.note_take(9.5, 30)
    assert demand.target(9.5) == 30, "the largest burst of the window"


def test_what_shapes_device_state_changes_the_fingerprint() -> None:
    shape = MachineShape("tcg", 768)
    same = dataclasses.replace(shape, translation_mib=64)
    assert shape.fingerprint("7.2") == same.fingerprint("7.2")
    others = [
        shape.fingerprint("8.2"),
        dataclasses.replace(shape, accel="kvm").fingerprint("7.2"),
        dataclasses.replace(shape, memory_mib=512).fingerprint("7.2"),
        dataclasses.replace(shape, cpu_model="qemu64").fingerprint("7.2"),
    ]
    assert len({shape.fingerprint("7.2"), *others}) == 5


def test_a_clone_has_the_devices_of_its_base_and_no_kernel() -> None:
    shape = MachineShape("tcg", 768)
    disk = dataclasses.replace(START, disk=Path("/disk"))
    boot = dataclasses.replace(disk, share=True, kernel=Path("/vmlinuz"), initrd=Path("/initrd"))
    clone_argv, boot_argv = qemu_argv(shape, disk), qemu_argv(shape, boot)

    def devices(argv: list[str]) -> list[str]:
        return [argv[i + 1] for i, word in enumerate(argv) if word in ("-device", "-M", "-cpu", "-m")]

    assert devices(clone_argv) == devices(boot_argv)
    assert "-kernel" not in clone_argv
    assert clone_argv[-2:] == ["-incoming", "defer"]
    assert any("share=off" in word for word in clone_argv)


class FakeVmm:
    """As much of a VMM as a pool touches."""

    def __init__(self) -> None:
        self.is_killed = False
        self.child = self
        self.has_ended = False
        self.is_dormant = True

    def kill(self) -> None:
        self.is_killed = True


class FakeSource:
    """Starts such VMMs, and fails when it is told to."""

    def __init__(self, *, warms: bool = False) -> None:
        self.made: list[FakeVmm] = []
        self.failures: dict[int, RolloutError] = {}
        self._warms = warms

    async def start(self) -> Ready:
        await asyncio.sleep(0)
        if (failure := self.failures.get(len(self.made))) is not None:
            raise failure
        self.made.append(FakeVmm())
        return Ready(self.made[-1])  # type: ignore[arg-type]

    async def start_ahead(self) -> Ready:
        ready = await self.start()
        ready.vmm.is_dormant = not self._warms
        return ready

    async def start_dormant(self) -> Ready:
        return await self.start()


async def filled(pool: VmmPool, num_ready: int) -> None:
    while pool.num_ready < num_ready:
        await asyncio.sleep(0.001)


async def test_a_pool_refills_off_the_path_and_ends_what_it_holds() -> None:
    source = FakeSource()
    pool = VmmPool(source, Demand(low=3, high=5))
    first = (await pool.take()).vmm
    await filled(pool, 3)
    taken = [(await pool.take()).vmm for _ in range(3)]
    assert len({id(vmm) for vmm in (first, *taken)}) == 4, "one VMM was handed out twice"
    await pool.close()
    await pool.close()
    assert all(vmm.is_killed for vmm in source.made if vmm not in (first, *taken))
    for vmm in (first, *taken):
        vmm.kill()


async def test_a_pool_prefers_what_has_run_and_keeps_no_more_than_it_needs() -> None:
    source = FakeSource(warms=True)
    pool = VmmPool(source, Demand(low=2, high=2))
    used = [await pool.take() for _ in range(3)]
    await filled(pool, 2)
    for ready in used:
        pool.give_back(ready)
    assert pool.num_ready == 2
    assert [ready.vmm.is_killed for ready in used] == [True, False, False]
    assert (await pool.take(dormant=False)).vmm is used[2].vmm
    fresh = await pool.take(dormant=True)
    assert fresh.vmm not in [ready.vmm for ready in used]
    await pool.close()
    pool.give_back(Ready(fresh.vmm))
    used[2].vmm.kill()
    assert all(vmm.is_killed for vmm in source.made)


async def test_a_pool_takes_what_was_left_before_what_is_warm_and_that_before_what_never_ran() -> None:
    source = FakeSource(warms=True)
    pool = VmmPool(source, Demand(low=1, high=1))
    used = await pool.take()
    await filled(pool, 1)
    warm = source.made[-1]
    pool._demand.low = pool._demand.high = 2
    pool.give_back(used)
    source._warms = False
    assert (await pool.take()).vmm is used.vmm
    assert (await pool.take()).vmm is warm
    await filled(pool, 2)
    assert (await pool.take()).vmm.is_dormant
    await pool.close()
    for vmm in source.made:
        vmm.kill()


async def test_a_pool_goes_on_when_something_does_not_come_up() -> None:
    source = FakeSource(warms=True)
    source.failures = {2: ForkError("not this one")}
    pool = VmmPool(source, Demand(low=2, high=2))
    first = (await pool.take()).vmm
    await filled(pool, 1)
    assert pool._refill is not None
    await pool._refill
    assert pool.num_ready == 1
    second = (await pool.take()).vmm
    assert second is source.made[1]
    await pool.close()
    first.kill()
    second.kill()
    assert all(vmm.is_killed for vmm in source.made)


async def test_a_pool_hands_out_no_dead_vmm() -> None:
    source = FakeSource()
    pool = VmmPool(source, Demand(low=2, high=2))
    taken = [(await pool.take()).vmm]
    await filled(pool, 2)
    source.made[1].has_ended = source.made[2].has_ended = True
    taken.append((await pool.take()).vmm)
    assert not taken[1].has_ended
    assert source.made[1].is_killed
    assert source.made[2].is_killed
    await pool.close()
    for vmm in taken:
        vmm.kill()


async def test_a_pool_that_cannot_start_says_so_to_who_takes() -> None:
    source = FakeSource()
    source.failures = {0: BootError("no VMM today")}
    pool = VmmPool(source, Demand(low=1, high=1))
    with pytest.raises(BootError, match="today"):
        await pool.take()
    await pool.close()


async def test_a_pool_that_is_closed_meanwhile_hands_out_nothing() -> None:
    source = FakeSource()
    pool = VmmPool(source, Demand(low=1, high=1))
    taking = asyncio.create_task(pool.take())
    await asyncio.sleep(0)
    await pool.close()
    with pytest.raises(BootError, match="closed"):
        await taking
    assert all(vmm.is_killed for vmm in source.made)
