"""Trainers load the exports with their own code: TRL, verl, SkyRL, RLlib; TRL and RLlib take a training step.

They need PyTorch, which is large: `scripts/test-loaders` installs them in a place of their own, and runs
these.
TRL 1.16 has no trainer of its own for `trl-prm` and `grpo`: these are loaded by `datasets` alone, elsewhere.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from trajectory_factory import length_of, make_trajectory

from rollout.trajectory import TrajectorySink
from rollout.trajectory.export.formats import export_run

VARIABLE = "ROLLOUT_LOADERS_PYTHON"
PROGRAMS = Path(__file__).parent / "loader_programs"
NUMBERS = range(9)
NUM_MOVES = sum(map(length_of, NUMBERS))

OpenSink = Callable[..., TrajectorySink]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(
        not os.environ.get(VARIABLE),
        reason="no trainers here, so their own loaders were not tried: run scripts/test-loaders",
    ),
]


def load(program: str, folder: Path) -> Any:
    """What a program says of the exports in a folder."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as short:  # for the names of Ray's sockets
        environment = {
            **os.environ,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "RAY_TMPDIR": short,
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": f"{PROGRAMS}:{Path(__file__).parents[2]}",
            "PYTHONWARNINGS": "ignore",
        }
        done = subprocess.run(
            [os.environ[VARIABLE], str(PROGRAMS / f"{program}.py")],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def exported(open_sink: OpenSink, run_dir: Path, tmp_path: Path) -> Path:
    with open_sink() as sink:
        sink.write_many([make_trajectory(number) for number in NUMBERS])
    for name in ("trl-sft", "trl-dpo", "trl-kto", "verl-rl", "verl-sft", "skyrl"):
        export_run(run_dir, name, tmp_path / name)
    return tmp_path


@pytest.fixture
def boxes(open_sink: OpenSink, run_dir: Path, tmp_path: Path) -> Path:
    """A run with observations that a network takes, and its transitions."""
    with open_sink(observation_space=spaces.Box(-10, 10, (4,), np.float32)) as sink:
        for number in NUMBERS:
            whole = make_trajectory(number)
            steps = [
                replace(step, observation=np.full(4, (number + step.t) / 4, np.float32))
                for step in whole.steps
            ]
            sink.write(replace(whole, steps=steps))
    export_run(run_dir, "rllib", tmp_path / "rllib")
    return tmp_path


def test_trl_trains_on_its_exports(exported: Path) -> None:
    found = load("trl_program", exported)
    assert {name: one["rows"] for name, one in found.items()} == {
        "trl-sft": 9,
        "trl-dpo": NUM_MOVES * 2,
        "trl-kto": NUM_MOVES * 3,
    }
    assert all(one["steps"] == 1 and math.isfinite(one["loss"]) for one in found.values())
    prompt = "<|im_start|>user\n0<|im_end|>\n<|im_start|>assistant\n"
    assert found["trl-sft"]["text"]["input_ids"] == prompt + "0<|im_end|>\n"
    pair = found["trl-dpo"]["text"]
    assert pair["prompt_ids"] == prompt
    assert {pair["chosen_ids"], pair["rejected_ids"]} <= {f"{action}<|im_end|>\n" for action in (1, 2, 3)}
    assert pair["chosen_ids"] != pair["rejected_ids"]


def test_verl_reads_its_exports(exported: Path) -> None:
    found = load("verl_program", exported)
    assert (found["prompts"], found["talks"]) == (NUM_MOVES, 9)
    assert found["prompt"][-1]["role"] == "user"
    assert found["reward_model"]["style"] == "rule"
    assert (found["data_source"], found["index"]) == ("Test-v0", 3)
    assert found["shape"] == [256]
    assert found["trained"] == "1<|im_end|>\n2<|im_end|>\n", "what the agent said, and nothing else"


def test_skyrl_reads_its_export(exported: Path) -> None:
    found = load("skyrl_program", exported)
    assert (found["rows"], found["env_class"], found["uid"]) == (NUM_MOVES, "Test-v0", "3")
    assert found["prompt"][-1]["role"] == "user"
    assert found["env_extras"]["reward_spec"]["method"] == "rule"
    assert found["env_extras"]["extra_info"]["index"] == 3


def test_rllib_trains_on_its_export(boxes: Path) -> None:
    found = load("rllib_program", boxes)
    assert (found["rows"], found["steps"]) == (NUM_MOVES, 8)
    assert math.isfinite(found["loss"])


def test_batches_become_tensors(boxes: Path) -> None:
    found = load("torch_program", boxes)
    num_rows = NUM_MOVES + len(NUMBERS)
    total = sum(number + t for number in NUMBERS for t in range(length_of(number) + 1))
    assert found["shape"] == found["ray_shape"] == [num_rows, 4]
    assert found["dtype"] == "torch.float32"
    assert found["sum"] == found["ray_sum"] == total
