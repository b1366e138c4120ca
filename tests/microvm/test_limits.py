"""Limits by control groups: files of both versions, and real machines that run into them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import BootError, GuestError
from rollout.sandbox.control_groups import ControlGroups, MountedGroup, mounted_groups
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.sandbox import MicroVMSandbox

_missing = what_is_missing("microvm", ImageConfig())


def may_divide() -> bool:
    try:
        ControlGroups.make(["cpu", "memory"]).close()
    except BootError:
        return False
    return True


@pytest.fixture
def v2(tmp_path: Path) -> MountedGroup:
    """As a hierarchy of version 2 looks, without a kernel behind it."""
    return MountedGroup(2, frozenset({"cpu", "memory"}), tmp_path)


def test_version_2_is_written_as_its_manual_says(v2: MountedGroup) -> None:
    groups = ControlGroups.make(["cpu", "memory"], [v2])
    group = groups.new()
    [folder] = {folder for _, folder in group.folders.values()}
    group.add(42)
    group.limit_cpu(0.5)
    group.limit_memory(1 << 26)
    assert (folder / "cgroup.procs").read_text() == "42"
    assert (folder / "cpu.max").read_text() == "10000 20000"
    assert (folder / "memory.max").read_text() == str(1 << 26)
    group.limit_cpu(None)
    assert (folder / "cpu.max").read_text() == "max 20000"
    assert (v2.folder / "cgroup.subtree_control").read_text() == "+memory"


def test_where_no_group_can_be_made_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(BootError, match=r"limits of cpu need a control group .*systemd-run"):
        ControlGroups.make(["cpu"], [])
    gone = MountedGroup(1, frozenset({"cpu"}), tmp_path / "gone" / "deeper")
    with pytest.raises(BootError, match="may divide"):
        ControlGroups.make(["cpu"], [gone])


@pytest.mark.skipif(not may_divide(), reason="this process may not divide its control groups")
@pytest.mark.microvm
@pytest.mark.xdist_group("microvm")
@pytest.mark.skipif(_missing is not None, reason=_missing or "")
class TestMachines:
    async def test_a_boost_ends_and_the_steady_share_holds(self) -> None:
        config = EngineConfig(kind="microvm", cpu_share=0.1, boost_share=2.0, boost_s=1.0)
        async with MicroVMEngine(config, ImageConfig()) as engine:
            assert "cpu" in engine.capabilities.limits
            machine = await engine.boot("default")
            assert isinstance(machine, MicroVMSandbox)
            folder = group_of(machine, "cpu")
            assert int((folder / "cpu.cfs_quota_us").read_text()) == 40_000
            assert throttled(folder) == 0
            machine.keep_running(True)
            await asyncio.sleep(1.5)
            assert int((folder / "cpu.cfs_quota_us").read_text()) == 2_000
            await machine.exec(["sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"])
            assert throttled(folder) > 0
            checkpoint = await machine.checkpoint()
            [clone] = await engine.fork(checkpoint, 1)
            assert isinstance(clone, MicroVMSandbox)
            assert int((group_of(clone, "cpu") / "cpu.cfs_quota_us").read_text()) == 40_000
        assert not folder.exists()
        assert not folder.parent.exists()

    async def test_who_uses_too_much_memory_ends_alone(self) -> None:
        config = EngineConfig(kind="microvm", memory_ceiling_mib=96)
        async with MicroVMEngine(config, ImageConfig()) as engine:
            machine = await engine.boot("default")
            other = await engine.boot("default")
            fill = "head -c 300000000 /dev/zero | tr '\\0' 'x' > /dev/shm/much"
            with pytest.raises(GuestError):
                await machine.exec(["sh", "-c", fill])
            assert (await other.exec(["echo", "well"])).stdout == b"well\n"


def group_of(machine: MicroVMSandbox, controller: str) -> Path:
    """The group that the machine's VMM is in."""
    for line in Path(f"/proc/{machine.pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            [own] = [group for group in mounted_groups() if controller in group.controllers]
            return own.folder / Path(path).relative_to("/" + own_path(controller))
    raise AssertionError("no such controller")


def own_path(controller: str) -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return path.lstrip("/")
    raise AssertionError("no such controller")


def throttled(folder: Path) -> int:
    fields = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
    return int(fields["nr_throttled"])
