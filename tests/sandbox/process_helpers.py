"""What the tests of the process engine share: an engine that can import the rogue environment, for one."""

import contextlib
import os
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil

from rollout.config import EngineConfig
from rollout.sandbox.process.engine import ProcessEngine
from rollout.sandbox.process.sandbox import ProcessSandbox
from rollout.sandbox.process.walls import Limits

ROGUE = Path(__file__).parent / "rogue"
MIB = 1 << 20


def make_engine(limits: Limits | None = None, **settings: object) -> ProcessEngine:
    config = EngineConfig.model_validate({"python_path": [str(ROGUE)], **settings})
    return ProcessEngine(config, limits=limits)


@contextmanager
def at_most_processes(number: int) -> Generator[None]:
    """An engine that is started inside may have so many processes: the kernel refuses more."""
    others = 0  # root becomes a user that has none
    if os.geteuid() != 0:
        others = sum(p.num_threads() for p in psutil.process_iter() if p.uids().real == os.geteuid())
    before = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (others + number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NPROC, before)


async def boot_rogue(engine: ProcessEngine) -> ProcessSandbox:
    sandbox = await engine.boot()
    await sandbox.call("env.make", env_id="rogue_env:Rogue-v0")
    await sandbox.call("env.reset", seed=0)
    return sandbox


async def run_code(sandbox: ProcessSandbox, code: str, timeout_s: float = 30.0) -> str:
    """Runs code in the environment's process; the value of its variable `result`, as text."""
    step = await sandbox.call("env.step", action=code, timeout_s=timeout_s)
    assert isinstance(step, dict)
    observation = step["observation"]
    assert isinstance(observation, str)
    return observation


def processes_below(engine: ProcessEngine) -> list[psutil.Process]:
    assert engine.server_pid is not None
    return psutil.Process(engine.server_pid).children(recursive=True)


def namespace_pids(process: psutil.Process) -> list[int]:
    """A process's number in each pid namespace that knows it, this machine's first; empty if it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return [int(number) for number in line.split()[1:]]
    return []


def players(engine: ProcessEngine) -> list[psutil.Process]:
    """The processes that run environments: first of a pid namespace inside the engine's, oldest first.

    One that was killed does not count, also while nobody has reaped it.
    """
    found: list[psutil.Process] = []
    for process in processes_below(engine):
        numbers = namespace_pids(process)
        if len(numbers) > 2 and numbers[-1] == 1 and is_alive(process):
            found.append(process)
    return sorted(found, key=lambda process: namespace_pids(process)[1:])


def server_of(engine: ProcessEngine) -> psutil.Process:
    """The fork server itself."""
    (server,) = [process for process in processes_below(engine) if namespace_pids(process)[1:] == [1]]
    return server


def keepers(engine: ProcessEngine) -> list[psutil.Process]:
    """The keepers, oldest first; the first is the template."""
    found = [process for process in server_of(engine).children() if len(namespace_pids(process)) == 2]
    living = [process for process in found if is_alive(process)]
    return sorted(living, key=lambda process: namespace_pids(process)[1:])


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
