"""Starting the engine: as an unprivileged user, and where something is missing or forbidden."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from process_helpers import boot_rogue, make_engine, run_code

from rollout.errors import BootError
from rollout.sandbox.process.launch import as_unprivileged_user, path_inside
from rollout.sandbox.process.seccomp import filter_program

pytestmark = pytest.mark.process

HERE = Path(__file__).parent

USE_AN_ENGINE = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[1])
from process_helpers import boot_rogue, make_engine, processes_below, run_code

async def main():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        clones = await engine.fork(await sandbox.checkpoint(), 2)
        users = {process.uids().real for process in processes_below(engine)}
        assert users == {os.geteuid()} != {0}, users
        print(await run_code(clones[1], "result = 'fine'"))

asyncio.run(main())
"""


def run_as_somebody(*prefix):
    """Runs a program that uses an engine as a user without any right."""
    somebody = as_unprivileged_user("bwrap", [HERE]) if os.geteuid() == 0 else []
    python, here = (str(path_inside(path) if somebody else path) for path in (Path(sys.executable), HERE))
    return subprocess.run(
        [*somebody, *prefix, python, "-c", USE_AN_ENGINE, here],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": "/opt/rollout", "TMPDIR": "/dev/shm"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_works_for_an_unprivileged_user():
    done = run_as_somebody()
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_where_user_namespaces_are_forbidden_it_says_so_and_what_to_do():
    forbid = ("bwrap", "--dev-bind", "/", "/", "--unshare-user", "--disable-userns")
    done = run_as_somebody(*forbid)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "BootError: the fork server has ended: bwrap: " in last
    assert "sysctl -w kernel.unprivileged_userns_clone=1" in last


async def test_where_bubblewrap_is_missing_it_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    async with make_engine() as engine:
        with pytest.raises(BootError, match="apt-get install bubblewrap"):
            await engine.boot()
        monkeypatch.undo()
        assert await run_code(await boot_rogue(engine), "result = 'fine'") == "fine"


async def test_a_bubblewrap_that_does_nothing_is_not_waited_for(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\nexec sleep 1000\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with make_engine(boot_timeout_s=0.3) as engine:
        with pytest.raises(BootError, match="not ready within"):
            await engine.boot()


async def test_a_folder_of_modules_that_does_not_exist_is_named(tmp_path):
    async with make_engine(python_path=[str(tmp_path / "missing")]) as engine:
        with pytest.raises(BootError, match=r"python_path: there is no folder .*missing"):
            await engine.boot()


def test_the_filter_is_known_for_two_architectures_and_refused_for_others():
    assert filter_program("x86_64") != filter_program("aarch64")
    with pytest.raises(BootError, match="riscv64"):
        filter_program("riscv64")
