"""What sandboxes stand beside: the same environment in a plain process, forked bare, and started afresh.

Run as a program (`python -m rollout.commands.bench_rival SAMPLES`): it imports what a guest imports, makes
FrozenLake, says "ready" on a line of its own, measures, and prints one JSON object. A program of its own,
because a fork costs in proportion to the memory of the process that forks: measured in the benchmark's own
process it would be slower.

No wall, no handshake, no files of their own, no limits: this is the floor below which no engine on this
machine can get, not an alternative to one.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BareFigures", "measure_bare_fork", "measure_start", "private_mib"]

_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class BareFigures:
    """What the program measured.

    Attributes:
        fork_ms: From `fork` to the child's first byte in the parent. branch_ms: Fork, one step of
        FrozenLake, a second fork that stays behind as the checkpoint, both ended. private_mib: Private
        memory of an idle child.
    """

    fork_ms: tuple[float, ...]
    branch_ms: tuple[float, ...]
    private_mib: float


def measure_bare_fork(samples: int) -> BareFigures:
    """Runs the program and reads its figures."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(samples)], capture_output=True, check=True, timeout=_TIMEOUT_S
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    return BareFigures(tuple(figures["fork_ms"]), tuple(figures["branch_ms"]), figures["private_mib"])


def measure_start(samples: int) -> list[float]:
    """Milliseconds from starting the program to its first line, environment made."""
    times_ms: list[float] = []
    for _ in range(samples):
        start_s = time.perf_counter()
        with subprocess.Popen([sys.executable, "-m", __name__, "0"], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            times_ms.append((time.perf_counter() - start_s) * 1000)
            process.stdout.read()
    return times_ms


def main(samples: int) -> None:
    """The program."""
    import gymnasium

    env = gymnasium.make("FrozenLake-v1", is_slippery=False)
    env.reset(seed=0)
    print("ready", flush=True)
    if not samples:
        return

    def step() -> None:
        env.step(0)

    fork_ms = [_in_child(lambda: None) for _ in range(samples)]
    branch_ms = [_in_child(lambda: _freeze_after(step)) for _ in range(samples)]
    print(json.dumps({"fork_ms": fork_ms, "branch_ms": branch_ms, "private_mib": _idle_child_mib()}))


def _in_child(work: Callable[[], None]) -> float:
    """Milliseconds from forking a child that works, answers one byte and ends, to its answer and its end."""
    start_s = time.perf_counter()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        work()
        os.write(writer, b"!")
        os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    replied_s = time.perf_counter()
    os.close(reader)
    os.waitpid(child, 0)
    return (replied_s - start_s) * 1000


def _freeze_after(step: Callable[[], None]) -> None:
    """Plays a step and leaves a forked copy behind, which is ended as soon as it has reported."""
    step()
    reader, writer = os.pipe()
    frozen = os.fork()
    if frozen == 0:
        os.write(writer, b"!")
        signal.pause()  # it waits, as a checkpoint does, until it is killed
    os.read(reader, 1)
    os.kill(frozen, signal.SIGKILL)
    os.waitpid(frozen, 0)


def _idle_child_mib(children: int = 5) -> float:
    """Median private memory of children that did nothing but answer."""
    found: list[float] = []
    for _ in range(children):
        reader, writer = os.pipe()
        hold_reader, hold_writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(hold_writer)
            os.write(writer, b"!")
            os.read(hold_reader, 1)
            os._exit(0)
        os.read(reader, 1)
        found.append(private_mib(child))
        for descriptor in (reader, writer, hold_reader, hold_writer):
            os.close(descriptor)
        os.waitpid(child, 0)
    return statistics.median(found)


def private_mib(pid: int) -> float:
    """Memory that only this process has, in MiB (`Private_Clean` and `Private_Dirty` of smaps_rollup).

    Raises:
        OSError: The process is gone, or is not ours to look at.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    sizes = [line.split()[1] for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:"))]
    return sum(int(kib) for kib in sizes) / 1024


if __name__ == "__main__":
    main(int(sys.argv[1]))
