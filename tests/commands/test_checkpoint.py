"""`rollout checkpoint`: a node of a real run leaves one process and is restored by another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.config import ImageConfig
from rollout.sandbox.engines import what_is_missing

_missing = what_is_missing("microvm", ImageConfig())
pytestmark = [
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
]
CONFIG = """
seed = 3
episodes = 1
max_steps = 2
[env]
args = { env_id = "FrozenLake-v1", kwargs = { is_slippery = false } }
[engine]
kind = "KIND"
[search]
algorithm = "uct"
simulations = 6
wave = 2
playout_horizon = 2
"""


def rollout(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rollout.cli", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, **env},
    )


def test_a_node_of_a_run_moves(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.replace("KIND", "microvm"))
    runs, depot = tmp_path / "runs", tmp_path / "depot"
    played = rollout("run", config, "--set", f"output={runs}", "--no-report")
    assert played.returncode == 0, played.stderr
    [run] = runs.iterdir()
    place = ("--move", "1", "--node", "1", "--to", depot)
    exported = rollout("checkpoint", "export", run, "1", *place, "--json")
    assert exported.returncode == 0, exported.stderr
    told = json.loads(exported.stdout)
    assert (told["ancestors"], told["origin"]["move"], told["origin"]["node"]) == (1, 1, 1)
    listed = rollout("checkpoint", "list", depot).stdout.split()
    assert len(listed) == 2
    assert told["id"] in listed
    imported = rollout(
        "checkpoint", "import", depot, told["id"], "--json", ROLLOUT_CACHE=str(tmp_path / "cache")
    )
    assert imported.returncode == 0, imported.stderr
    found = json.loads(imported.stdout)
    assert (found["id"], found["ancestors_here"], found["origin"]) == (told["id"], 1, told["origin"])
    assert found["state_hash"]

    ambiguous = rollout("checkpoint", "import", depot)
    assert ambiguous.returncode == 2
    assert "has 2 checkpoints" in ambiguous.stderr
    missing = rollout("checkpoint", "export", run, "1", "--move", "1", "--node", "99", "--to", depot)
    assert missing.returncode == 2
    assert "no node 99" in missing.stderr
    record = depot / "checkpoints" / f"{told['id']}.json"
    record.write_text(record.read_text().replace("tcg", "kvm"))
    altered = rollout("checkpoint", "import", depot, told["id"])
    assert (altered.returncode, altered.stderr.count("\n")) == (1, 1)
    assert "damaged" in altered.stderr
