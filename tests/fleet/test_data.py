"""Ray Data reads what a scan reads, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from rollout.trajectory import EpisodeRow, StepRow, Trajectory, TrajectorySink, make_episode_id, scan

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

CODE = """
import json, sys
import numpy as np, pyarrow.compute as pc, ray
from pyarrow import fs
from rollout.fleet.data import to_ray
from rollout.trajectory import scan
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
ray.data.DataContext.get_current().enable_progress_bars = False
store = fs.SubTreeFileSystem(sys.argv[2], fs.LocalFileSystem())
found = {
    "count": to_ray(scan(sys.argv[1], "steps")).count(),
    "files": len(to_ray(scan(sys.argv[1], "steps")).input_files()),
    "projected": to_ray(scan(sys.argv[1], "steps", ["t", "action"])).schema().names,
    "filtered": to_ray(scan(sys.argv[1], "steps", ["t"], pc.field("t") > 1)).take_all(),
    "empty": to_ray(scan(sys.argv[1], "nodes")).count(),
    "empty_columns": len(to_ray(scan(sys.argv[1], "nodes")).schema().names),
    "both": sorted(row["seed"] for row in to_ray(scan("run", "episodes", filesystem=store)).take_all()),
}
batches = list(to_ray(scan(sys.argv[1], "steps", ["observation", "t"])).iter_batches(batch_size=None))
seen = np.concatenate([batch["observation"] for batch in batches])
found["shape"], found["dtype"], found["sum"] = seen.shape, str(seen.dtype), int(seen.sum())
lists = to_ray(scan(sys.argv[1], "steps", ["observation"]), tensors=False).take(1)
found["list"] = len(lists[0]["observation"])
ray.shutdown()
print(json.dumps(found))
"""


def trajectory(number: int) -> Trajectory:
    episode = EpisodeRow(
        episode_id=make_episode_id("run", "task", "task", number),
        task_id="task",
        group_id="task",
        env_id="Box-v0",
        engine="inline",
        search="random",
        policy="random",
        seed=number,
        return_=2.0,
        length=2,
        started_at=0.0,
        duration_s=1.0,
        sample=number,
    )
    observation: Any = np.full((2, 3), number, np.uint8)
    steps = [StepRow(t, observation, action=1, reward=1.0, terminated=False, truncated=False) for t in (0, 1)]
    return Trajectory(episode, [*steps, StepRow(2, observation)])


def sink(where: Any, **more: Any) -> TrajectorySink:
    box = spaces.Box(0, 255, (2, 3), np.uint8)
    return TrajectorySink(where, run_id="run", observation_space=box, action_space=spaces.Discrete(2), **more)


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as name:  # a short path, for Ray's sockets
        yield name


def test_ray_data_reads_what_a_scan_reads(tmp_path: Path, folder: str) -> None:
    from pyarrow import fs

    with sink(tmp_path / "run") as writer:
        writer.write_many([trajectory(number) for number in range(3)])
        writer.flush()
        writer.write_many([trajectory(number) for number in range(3, 5)])
    stores: list[fs.FileSystem] = []
    for name, numbers in (("a", (0, 1, 2)), ("b", (2, 3))):  # two writers that did not see each other
        (tmp_path / name).mkdir()
        stores.append(fs.SubTreeFileSystem(str(tmp_path / name), fs.LocalFileSystem()))
        with sink("run", filesystem=stores[-1], writer_id=name) as writer:
            writer.write_many([trajectory(number) for number in numbers])
    fs.copy_files("run", "run", source_filesystem=stores[1], destination_filesystem=stores[0])
    environment = os.environ | {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "run"), str(tmp_path / "a")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {
        "count": 15,
        "files": 2,
        "projected": ["t", "action"],
        "filtered": [{"t": 2}] * 5,
        "empty": 0,
        "empty_columns": len(scan(tmp_path / "run", "nodes").schema.names),
        "both": [0, 1, 2, 3],
        "shape": [15, 2, 3],
        "dtype": "uint8",
        "sum": 6 * 3 * (0 + 1 + 2 + 3 + 4),
        "list": 6,
    }


def test_importing_it_imports_no_ray() -> None:
    code = "import sys, rollout.fleet.data; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
