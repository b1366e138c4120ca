"""Processes that are forks of one that has their program loaded: that they are whole, and what goes wrong."""

from __future__ import annotations

import contextlib
import select
import shutil
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from rollout.errors import BootError
from rollout.sandbox.microvm.confinement import Filter, SystemCall
from rollout.sandbox.microvm.spawner import Child, Spawner
from rollout.sandbox.microvm.template import MAX_SCRIPT_BYTES, packed, stub_object

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
DEADLINE_S = 30.0
WAITS = "sleep"
ADDRESS = 0x7000_0000


@pytest.fixture
def program() -> str:
    return str(Path(shutil.which(WAITS) or f"/bin/{WAITS}").resolve())


@pytest.fixture
def spawner(program: str) -> Iterator[Spawner]:
    spawner = Spawner({}, programs=[program])
    yield spawner
    spawner.close()


def template_of(child: Child) -> psutil.Process:
    """The process that the child is a fork of: the other child of the launcher."""
    launcher = psutil.Process(child.pid).parent()
    assert launcher is not None
    others = [each for each in launcher.children() if each.pid != child.pid]
    [template] = [each for each in others if each.status() != psutil.STATUS_ZOMBIE]
    return template


def argument_of(child: Child, program: str) -> str:
    """What a program was started with, once it runs: before that, a child is the launcher's copy."""
    give_up_at_s = time.monotonic() + DEADLINE_S
    while (words := Path(f"/proc/{child.pid}/cmdline").read_text().split("\0"))[0] != program:
        assert time.monotonic() < give_up_at_s, words
        time.sleep(0.01)
    return words[1]


def living(processes: Sequence[psutil.Process]) -> set[int]:
    """Ids of those that have not ended."""
    found: set[int] = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
    return found


def end(child: Child) -> None:
    child.kill()
    assert select.select([child.pidfd], [], [], DEADLINE_S)[0]
    child.close()


@needs_bubblewrap
@pytest.mark.xdist_group("microvm")
def test_another_template_takes_the_place_of_one_that_was_killed(spawner: Spawner, program: str) -> None:
    first = spawner.spawn([program, "60"], [], {}, from_template=True)
    template = template_of(first)
    template.kill()
    second = spawner.spawn([program, "60"], [], {}, from_template=True)
    assert first.is_fork
    assert second.is_fork
    assert not first.has_ended, "what was forked lives on without its template"
    end(first)
    assert template_of(second).pid != template.pid
    end(second)


@needs_bubblewrap
@pytest.mark.xdist_group("microvm")
def test_forks_share_what_was_relocated(spawner: Spawner, program: str) -> None:
    executed = spawner.spawn([program, "60"], [], {})
    forked = [spawner.spawn([program, "60"], [], {}, from_template=True) for _ in range(2)]
    for child in (executed, *forked):
        assert argument_of(child, program) == "60"
    own, shared = (psutil.Process(child.pid).memory_full_info().uss for child in (executed, forked[0]))
    assert shared < own
    for child in (executed, *forked):
        end(child)


@needs_bubblewrap
@pytest.mark.xdist_group("microvm")
def test_a_program_that_no_template_can_hold_is_executed(tmp_path: Path, program: str) -> None:
    tmp_path.chmod(0o755)
    shutil.copy(program, tmp_path / WAITS)  # VMMs see it, but the launcher, which starts templates, does not
    spawner = Spawner({"/elsewhere": tmp_path}, programs=[program])
    try:
        for _ in range(2):
            child = spawner.spawn([f"/elsewhere/{WAITS}", "60"], [], {}, from_template=True)
            assert not child.is_fork
            assert not select.select([child.pidfd], [], [], 0.2)[0], child.log()
            end(child)
    finally:
        spawner.close()


def test_a_packet_points_into_itself() -> None:
    calls = [
        SystemCall("one", 157, (22, 2, Filter(b"12345678"), 0, 0)),
        SystemCall("two", 161, (b"/vmm\0",), may_fail=True),
    ]
    packet = packed(calls, 17, ADDRESS, control_fd=9, stays=True, afterwards=[SystemCall("three", 3, (7,))])
    first_at, third_at = 48, 48 + 2 * 64
    assert struct.unpack_from("6Q", packet) == (17, 9, 1, 2, 1, ADDRESS + third_at)
    number, _, _, header_at, *_, may_fail = struct.unpack_from("8Q", packet, first_at)
    assert (number, may_fail) == (157, 0)
    length, filter_at = struct.unpack_from("HxxxxxxQ", packet, header_at - ADDRESS)
    assert length == 1
    assert packet[filter_at - ADDRESS :][:8] == b"12345678"
    number, path_at, *_, may_fail = struct.unpack_from("8Q", packet, first_at + 64)
    assert (number, may_fail) == (161, 1)
    assert packet[path_at - ADDRESS :][:5] == b"/vmm\0"
    assert struct.unpack_from("2Q", packet, third_at) == (3, 7)


def test_a_packet_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="is longer than"):
        packed([SystemCall("one", 1, (bytes(MAX_SCRIPT_BYTES),))], 17, ADDRESS)


def test_the_stub_asks_for_no_executable_stack() -> None:
    stub = stub_object()
    assert stub.startswith(b"\x7fELF")
    segments = [struct.unpack_from("<II", stub, 64 + 56 * k) for k in range(4)]
    writable_and_executable = 2 | 1
    assert all(flags & writable_and_executable != writable_and_executable for _, flags in segments)
    assert 0x6474E551 in {kind for kind, _ in segments}, (
        "without this segment the linker makes stacks executable"
    )


@needs_bubblewrap
@pytest.mark.xdist_group("microvm")
def test_a_late_answer_is_not_taken_for_the_next_one(spawner: Spawner, program: str) -> None:
    first = spawner.spawn([program, "60"], [], {})
    launcher = psutil.Process(first.pid).parent()
    assert launcher is not None
    spawner._control.settimeout(0.3)
    launcher.suspend()
    with pytest.raises(BootError, match="launcher is gone"):
        spawner.spawn([program, "61"], [], {})
    launcher.resume()
    spawner._control.settimeout(DEADLINE_S)
    second = spawner.spawn([program, "62"], [], {})
    assert argument_of(second, program) == "62"
    give_up_at_s = time.monotonic() + DEADLINE_S
    while living(launcher.children()) != {first.pid, second.pid}:
        assert time.monotonic() < give_up_at_s, "what nobody waited for lives on"
        time.sleep(0.01)
    for child in (first, second):
        end(child)
