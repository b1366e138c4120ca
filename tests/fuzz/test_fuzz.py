"""Coverage-guided fuzzing of what the host takes from guests and from strangers, for a bounded time.

Each program runs in a process of its own, from inputs that it makes itself and with a random seed that
stays the same, so that the suite fails because of a change and not because of the day. To look further, for
longer and with another random seed each time, in a folder of its own: `python tests/fuzz/fuzz_channel.py
-max_total_time=600`. What it finds it leaves there as a file, which the program plays again when it gets it
as its argument.

That a program finds what it looks for is shown on copies of the package with a guard taken out.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from rollout.config import ImageConfig
from rollout.sandbox.engines import what_is_missing

HERE = Path(__file__).parent
PACKAGES = HERE.parent.parent
NUM_RUNS = 1500
MAX_TOTAL_TIME_S = 15
NUM_SEARCHES = 5
FOUND_SOMETHING = 77

_missing = what_is_missing("process", ImageConfig())  # which is run in namespaces of the same kind
pytestmark = [
    pytest.mark.process,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("atheris") is None,
        reason="atheris is not installed: there are builds of it for Python 3.11 to 3.13 only",
    ),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
]


@dataclass(frozen=True)
class Fuzzed:
    """What a program said at its end."""

    exit_code: int
    num_runs: int
    coverage: int
    text: str


def fuzz(name: str, folder: Path, *options: str, packages: Path = PACKAGES) -> Fuzzed:
    command = [sys.executable, str(HERE / f"fuzz_{name}.py"), f"-max_total_time={MAX_TOTAL_TIME_S}", *options]
    path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=300,
    )
    runs = re.findall(r"number_of_executed_units: (\d+)", done.stdout)
    coverage = re.findall(r"cov: (\d+)", done.stdout)
    assert runs, done.stdout
    return Fuzzed(done.returncode, int(runs[-1]), int([0, *coverage][-1]), done.stdout[-6000:])


@pytest.mark.parametrize("name", ["channel", "archives", "checkpoints", "layers"])
def test_nothing_is_found(name: str, tmp_path: Path) -> None:
    done = fuzz(name, tmp_path, f"-runs={NUM_RUNS}", "-seed=1")
    assert done.exit_code == 0, done.text
    assert done.num_runs > len(list((tmp_path / "corpus").glob("seed-*"))), done.text
    assert done.coverage > 50, done.text


@pytest.mark.parametrize(
    ("name", "module", "guard", "without"),
    [
        (
            "channel",
            "rollout/sandbox/client.py",
            "reply = self._pending.pop(call_id, None)",
            "reply = self._pending.pop(min(self._pending, default=0), None)",
        ),
        (
            "channel",
            "rollout/sandbox/client.py",
            "except GuestError as error:\n            self.fail(",
            "except EnvError as error:\n            self.fail(",
        ),
        (
            "channel",
            "rollout/sandbox/wire.py",
            'raise GuestError(f"a frame holds more than {MAX_ITEMS} items")',
            "pass",
        ),
        ("archives", "rollout/sandbox/archives.py", 'and ".." not in parts', ""),
        (
            "checkpoints",
            "rollout/sandbox/microvm/transfer.py",
            "_check_index(numbers, owners",
            "(numbers, owners",
        ),
        (
            "layers",
            "rollout/sandbox/image/layers.py",
            "path = root if link.is_absolute() else path.parent",
            "pass",
        ),
    ],
    ids=["channel-wrong-call", "channel-untyped", "channel-memory", "archives", "checkpoints", "layers"],
)
def test_a_guard_that_is_missing_is_found(
    name: str, module: str, guard: str, without: str, tmp_path: Path
) -> None:
    copy = tmp_path / "packages"
    for package in ("rollout", "envs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGES / package, copy / package, ignore=ignored)
    text = (copy / module).read_text()
    assert text.count(guard) == 1
    (copy / module).write_text(text.replace(guard, without))
    # Which way a search takes is chance, and a way that leads nowhere is left.
    for seed in range(1, NUM_SEARCHES + 1):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        done = fuzz(name, folder, f"-seed={seed}", packages=copy)
        if done.exit_code == FOUND_SOMETHING:
            break
    assert done.exit_code == FOUND_SOMETHING, done.text
    assert "Uncaught Python exception" in done.text
