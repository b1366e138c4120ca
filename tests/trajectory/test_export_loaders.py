"""Exports load in the packages that they are made for: the real loaders, in a process of their own.

A process of their own, because these packages start threads, open sockets and warn as they please.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from trajectory_factory import episode_id, length_of, make_trajectory

from rollout.trajectory import TrajectorySink
from rollout.trajectory.export.formats import FORMATS, export_run

OpenSink = Callable[..., TrajectorySink]
NUMBERS = range(9)
NUM_MOVES = sum(map(length_of, NUMBERS))


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: its own loader was not tried")


@pytest.fixture
def run(open_sink: OpenSink, run_dir: Path) -> Path:
    with open_sink() as sink:
        sink.write_many([make_trajectory(number) for number in NUMBERS[:4]])
        sink.flush()
        sink.write_many([make_trajectory(number) for number in NUMBERS[4:]])
    return run_dir


def load(code: str, tmp_path: Path, **variables: str) -> Any:
    """What the code prints last, as JSON."""
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs("datasets")
def test_datasets_loads_every_table(run: Path, tmp_path: Path) -> None:
    """Hugging Face's loader, through which TRL, verl and SkyRL read their files."""
    names = [name for name in FORMATS if name not in ("atif", "minari")]
    for name in names:
        export_run(run, name, tmp_path / name)
    code = f"""
import json, datasets
found = {{}}
for name in {names!r}:
    kind = "json" if name == "jsonl" else "parquet"
    files = name + "/train." + ("jsonl" if name == "jsonl" else "parquet")
    dataset = datasets.load_dataset(kind, data_files=files, split="train")
    found[name] = [len(dataset), dataset.column_names, dataset[0]]
print(json.dumps(found, default=str))
"""
    found = load(code, tmp_path)
    assert {name: row[0] for name, row in found.items()} == {
        "verl-rl": NUM_MOVES,
        "verl-sft": 9,
        "trl-sft": 9,
        "trl-dpo": NUM_MOVES * 2,
        "trl-kto": NUM_MOVES * 3,
        "trl-prm": NUM_MOVES * 3,
        "grpo": NUM_MOVES * 3,
        "alphazero": NUM_MOVES,
        "skyrl": NUM_MOVES,
        "rllib": NUM_MOVES,
        "jsonl": 9,
    }
    first = {name: row[2] for name, row in found.items()}
    assert first["verl-sft"]["messages"] == [
        {"role": "user", "content": "0"},
        {"role": "assistant", "content": "0"},
    ]
    assert set(first["verl-rl"]) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
    assert first["verl-rl"]["reward_model"]["ground_truth"] == "0"
    assert set(first["skyrl"]) == {"data_source", "prompt", "env_class", "reward_spec", "extra_info"}
    assert set(found["trl-dpo"][1]) >= {"prompt", "chosen", "rejected"}
    assert first["trl-kto"]["completion"] == [{"role": "assistant", "content": "1"}]
    assert isinstance(first["trl-kto"]["label"], bool)
    assert first["trl-prm"]["completions"] == ["1"]
    assert isinstance(first["trl-prm"]["prompt"], str)
    assert isinstance(first["trl-prm"]["labels"][0], bool)


@needs("datasets")
def test_datasets_loads_the_tables_of_a_run_in_one_call(run: Path, tmp_path: Path) -> None:
    code = """
import json, datasets
found = {}
for table in ("episodes", "steps", "nodes"):
    dataset = datasets.load_dataset("parquet", data_files=f"run/{table}/*.parquet", split="train")
    found[table] = [len(dataset), dataset[0]["run_id"]]
print(json.dumps(found))
"""
    assert load(code, tmp_path) == {
        "episodes": [9, "run-1"],
        "steps": [NUM_MOVES + 9, "run-1"],
        "nodes": [NUM_MOVES * 4, "run-1"],
    }


@needs("atif")
def test_atif_validates_every_document(run: Path, tmp_path: Path) -> None:
    export_run(run, "atif", tmp_path / "atif")
    code = """
import json, pathlib
from atif import Trajectory
found = {}
for path in pathlib.Path("atif/train").iterdir():
    trajectory = Trajectory.model_validate_json(path.read_text())
    found[trajectory.trajectory_id] = [len(trajectory.steps), trajectory.steps[-1].extra["reward"]]
print(json.dumps(found))
"""
    assert load(code, tmp_path) == {episode_id(n): [length_of(n) + 1, 1.0] for n in NUMBERS}


SPACES: list[spaces.Space[Any]] = [
    spaces.Discrete(1000),
    spaces.Box(-1, 1, (2, 3), np.float32),
    spaces.Box(0, 255, (4, 4, 3), np.uint8),
    spaces.Dict(kind=spaces.Discrete(3, start=1), place=spaces.Box(0, np.inf, (2,))),
    spaces.Tuple([spaces.Discrete(2), spaces.MultiBinary(3), spaces.MultiDiscrete([2, 3])]),
    spaces.Text(5),
]


@needs("minari")
@pytest.mark.parametrize("space", SPACES, ids=lambda space: str(space)[:30])
def test_minari_loads_the_dataset(
    open_sink: OpenSink, run_dir: Path, tmp_path: Path, space: spaces.Space[Any]
) -> None:
    space.seed(0)
    written = []
    with open_sink(observation_space=space) as sink:
        for number in range(3):
            whole = make_trajectory(number)
            steps = [replace(step, observation=space.sample()) for step in whole.steps]
            written.append(steps)
            sink.write(replace(whole, steps=steps))
    export_run(run_dir, "minari", tmp_path / "data")
    code = """
import json, minari, numpy as np
dataset = minari.load_dataset("test-v0/train-v0")
def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return np.asarray(value).tolist()
episodes = [[plain(x) for x in (e.observations, e.actions, e.rewards, e.terminations)] for e in dataset]
spaces = [repr(dataset.observation_space), repr(dataset.action_space)]
print(json.dumps([*spaces, dataset.total_steps, episodes]))
"""
    found = load(code, tmp_path, MINARI_DATASETS_PATH=str(tmp_path / "data"))
    assert found[0] == repr(space)
    assert found[1] == "Discrete(4)"
    assert found[2] == sum(map(length_of, range(3)))
    for number, (observations, actions, rewards, terminations) in enumerate(found[3]):
        assert actions == [(number + t) % 4 for t in range(length_of(number))]
        assert rewards == [1.0] * length_of(number)
        assert terminations == [False] * (length_of(number) - 1) + [True]
        assert observations == _columns([step.observation for step in written[number]])


def _columns(values: list[Any]) -> Any:
    """Observations as Minari gives them back: dicts and tuples of columns."""
    if isinstance(values[0], dict):
        return {key: _columns([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], tuple):
        return [_columns([value[index] for value in values]) for index in range(len(values[0]))]
    return np.asarray(values).tolist()


@pytest.mark.ray
def test_ray_data_reads_the_files_of_a_run(run: Path, tmp_path: Path) -> None:
    export_run(run, "rllib", tmp_path / "rllib")
    code = """
import json, ray
from rollout.trajectory import scan
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
steps = ray.data.read_parquet(scan("run", "steps").files())
transitions = ray.data.read_parquet("rllib/train.parquet")
found = [steps.count(), transitions.count(), transitions.sum("rewards")]
ray.shutdown()
print(json.dumps(found))
"""
    with tempfile.TemporaryDirectory() as folder:  # a short path, for Ray's sockets
        found = load(code, tmp_path, RAY_TMPDIR=folder)
    assert found == [NUM_MOVES + 9, NUM_MOVES, float(NUM_MOVES)]
