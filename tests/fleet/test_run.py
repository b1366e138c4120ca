"""`rollout run` from end to end on a local Ray, and what is left when it is interrupted or killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import GuestCluster
from driven_runs import CONFIG, DEADLINE_S, ROOT, Run, assert_whole, committed

from rollout.config import ImageConfig
from rollout.sandbox.engines import what_is_missing
from rollout.trajectory import scan

RAY = str(Path(sys.executable).with_name("ray"))

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]

_no_microvm = what_is_missing("microvm", ImageConfig())
WALLED = [
    pytest.param("process", marks=pytest.mark.process),
    pytest.param(
        "microvm",
        marks=[
            pytest.mark.microvm,
            pytest.mark.skipif(_no_microvm is not None, reason=_no_microvm or ""),
        ],
    ),
]
"""The engines whose sandboxes are processes that must not outlive their run."""


def test_a_run_plays_everything_and_says_where_it_is(tmp_path: Path) -> None:
    run = Run.start(tmp_path, "inline", episodes=5, options=["fleet.hosts=2"])
    assert run.wait() == 0, run.text
    assert f"run: {run.folder}" in run.text
    assert "episodes        5 of 5" in run.text
    assert "wall: none" in run.text
    assert assert_whole(run.folder) == 5
    described = run.describe()
    assert described["status"] == "finished"
    assert described["config"]["search"]["simulations"] == 12
    assert described["config"]["engine"]["memory_mib"] == 768, "defaults are written out"
    assert described["engine"]["capabilities"]["trusted_only"] is True
    assert described["engine"]["fingerprint"]
    assert described["versions"]["ray"]
    assert len(described["hosts"]) == 2
    assert described["summary"]["episodes"] == 5
    assert described["summary"]["failed_episodes"] == 0
    assert described["summary"]["branches"] > 5 * 12
    assert (run.folder / "timings.json").exists()
    assert (run.folder / "metrics.jsonl").read_text().endswith("}\n")
    run.assert_nothing_is_left()


@pytest.mark.parametrize(("which", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_in_order(
    tmp_path: Path, guest_cluster: GuestCluster, which: signal.Signals, code: int
) -> None:
    environment = guest_cluster.environment | {"RAY_ADDRESS": guest_cluster.address}
    run = Run.start(tmp_path, "inline", episodes=10_000, **environment)
    run.wait_for_commits()
    run.process.send_signal(which)
    assert run.wait() == code, run.text
    last = run.text.splitlines()[-1]
    assert last.startswith(f"rollout: run error: interrupted by {which.name}")
    assert "Traceback" not in run.text
    assert run.describe()["status"] == "interrupted"
    assert assert_whole(run.folder) == run.describe()["summary"]["episodes"] > 0
    run.assert_nothing_is_left()


@pytest.mark.parametrize("engine", WALLED)
def test_a_killed_driver_leaves_nothing_but_readable_rows(tmp_path: Path, engine: str) -> None:
    run = Run.start(tmp_path, engine, episodes=10_000)
    run.wait_for_commits()
    assert len(run.owned) > 5
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    run.assert_nothing_is_left()
    assert run.describe()["status"] == "running", "it had no time to say otherwise"
    assert assert_whole(run.folder) >= 1


@pytest.mark.parametrize("engine", WALLED)
def test_a_killed_host_is_replaced_and_the_run_finishes(
    tmp_path: Path, guest_cluster: GuestCluster, engine: str
) -> None:
    environment = guest_cluster.environment | {"RAY_ADDRESS": guest_cluster.address}
    num_episodes = 8 if engine == "process" else 4
    run = Run.start(tmp_path, engine, episodes=num_episodes, **environment)
    run.wait_for_commits()
    host = run.host_pid()
    os.kill(host, signal.SIGKILL)
    assert run.wait() == 0, run.text
    assert run.describe()["summary"]["lost_hosts"] == 1
    episodes = committed(run.output)
    assert len(episodes) == assert_whole(run.folder) == num_episodes
    assert {episode["failure"] for episode in episodes} == {None}
    assert max(episode["attempt"] for episode in episodes) == 1
    run.assert_nothing_is_left()


@pytest.mark.microvm
@pytest.mark.skipif(_no_microvm is not None, reason=_no_microvm or "")
def test_killed_vmms_do_not_fail_a_run(tmp_path: Path, guest_cluster: GuestCluster) -> None:
    environment = guest_cluster.environment | {"RAY_ADDRESS": guest_cluster.address}
    run = Run.start(tmp_path, "microvm", episodes=16, **environment)
    run.wait_for_commits()
    host = psutil.Process(run.host_pid())
    # A VMM that waits for its next use is missed by nobody, so they are killed until one was at work.
    while run.last_metric()["failed_branches"] == 0:
        vmms = [child for child in host.children(recursive=True) if "qemu" in child.name()]
        for vmm in vmms:
            with contextlib.suppress(psutil.NoSuchProcess):
                vmm.kill()
        run.wait_for_news()
    assert run.wait() == 0, run.text
    assert run.describe()["summary"]["failed_branches"] > 0
    assert assert_whole(run.folder) == 16
    run.assert_nothing_is_left()


def test_a_silent_driver_loses_its_hosts_and_gets_new_ones(
    tmp_path: Path, guest_cluster: GuestCluster
) -> None:
    environment = guest_cluster.environment | {"RAY_ADDRESS": guest_cluster.address}
    run = Run.start(tmp_path, "inline", episodes=40, options=["fleet.lease_s=2"], **environment)
    run.wait_for_commits()
    host = psutil.Process(run.host_pid())
    run.process.send_signal(signal.SIGSTOP)
    host.wait(timeout=30)  # its reaper ends it when the lease has run out
    run.process.send_signal(signal.SIGCONT)
    assert run.wait() == 0, run.text
    assert run.describe()["summary"]["lost_hosts"] == 1
    assert assert_whole(run.folder) == 40
    run.assert_nothing_is_left()


@pytest.mark.parametrize("entry", [["rollout"], ["python", "-m", "rollout.cli"]])
def test_a_run_is_a_ray_job(tmp_path: Path, guest_cluster: GuestCluster, entry: list[str]) -> None:
    config = tmp_path / "test.toml"
    config.write_text(CONFIG.format(episodes=2, output=tmp_path / "runs", engine="inline"))
    command = [RAY, "job", "submit", "--address", guest_cluster.dashboard, "--working-dir", ".", "--"]
    command += [*entry, "run", str(config), "--no-report"]
    environment = os.environ | guest_cluster.environment
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "episodes        2 of 2" in done.stdout
    [folder] = (tmp_path / "runs").iterdir()
    assert assert_whole(folder) == 2


@pytest.mark.slow
def test_expert_iteration_is_a_ray_job(tmp_path: Path, guest_cluster: GuestCluster) -> None:
    command = [RAY, "job", "submit", "--address", guest_cluster.dashboard, "--working-dir", ".", "--"]
    command += ["python", "scripts/expert_iteration.py", "--output", str(tmp_path), "--no-slippery"]
    for name in ("iterations", "episodes", "simulations", "updates", "hidden"):
        command += [f"--{name}", "2"]
    environment = os.environ | guest_cluster.environment
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert [scan(run, "episodes", ["return"]).to_table().num_rows for run in runs] == [2, 2]
    points = json.loads((tmp_path / "curve-4x4.json").read_text())["points"]
    assert [point["iteration"] for point in points] == [0, 1, 2]
    learnt = np.load(tmp_path / "network-0.npz")["policy"]
    assert np.abs(learnt).max() > 0.0, "it trained on what the searches wrote"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_ends_the_run_and_spares_what_is_committed(
    tmp_path: Path, guest_cluster: GuestCluster
) -> None:
    run = Run.start(
        tmp_path,
        "inline",
        episodes=10_000,
        options=["search.simulations=64"],
        disk_kib=400,
        **guest_cluster.environment,
        RAY_ADDRESS=guest_cluster.address,
    )
    assert run.wait() == 1, run.text
    [line] = [line for line in run.text.splitlines() if line.startswith("rollout: ")]
    assert line.startswith("rollout: sink error: ")
    assert "the disk is full" in line
    assert "Traceback" not in run.text
    assert int(run.text.rsplit("whole: ", 1)[1]) >= 1, run.text


def test_an_environment_that_does_not_exist(tmp_path: Path, guest_cluster: GuestCluster) -> None:
    environment = guest_cluster.environment | {"RAY_ADDRESS": guest_cluster.address}
    run = Run.start(tmp_path, "inline", episodes=1, options=["env.args.env_id=FrozenLak-v1"], **environment)
    assert run.wait() == 1
    [line] = [line for line in run.text.splitlines() if line.startswith("rollout: ")]
    assert line.startswith("rollout: env error: ")
    assert "FrozenLake" in line, "the nearest one is named"
    assert not list(run.output.iterdir()), "a run that never began leaves no folder"


@pytest.mark.slow
def test_without_the_token_a_cluster_is_out_of_reach(tmp_path: Path, guest_cluster: GuestCluster) -> None:
    strangers_home = {
        "HOME": str(tmp_path),
        "RAY_AUTH_MODE": "disabled",
        "RAY_ADDRESS": guest_cluster.address,
    }
    run = Run.start(tmp_path, "inline", episodes=1, **strangers_home)
    assert run.wait() == 1, run.text
    assert "cannot reach the Ray at" in run.text
    assert "RAY_AUTH_MODE=token" in run.text
    assert "Traceback" not in run.text
    assert not list(run.output.iterdir()), "a run that never began leaves no folder"
