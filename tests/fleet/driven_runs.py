"""Whole runs as a user starts them: `rollout run` in a process of its own, and what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent.parent
ROLLOUT = str(Path(sys.executable).with_name("rollout"))
DEADLINE_S = 120.0
GONE_WITHIN_S = 30.0
NEWS_AFTER_S = 3.0
"""Hosts report with each renewal of their lease, every 2 s here; the timeline has a line a second."""

CONFIG = """
episodes = {episodes}
output = "{output}"
max_steps = 6

[env]
args = {{ env_id = "FrozenLake-v1" }}

[engine]
kind = "{engine}"

[search]
simulations = 12
wave = 4
playout_horizon = 5

[fleet]
lease_s = 6

[sink]
roll_s = 0.5
"""


@dataclass
class Run:
    """A `rollout run` that goes on."""

    process: subprocess.Popen[bytes]
    output: Path
    log: Path
    owned: dict[int, float] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        tmp_path: Path,
        engine: str,
        *,
        episodes: int,
        options: Sequence[str] = (),
        disk_kib: int | None = None,
        **environment: str,
    ) -> Run:
        """Starts it; with `disk_kib`, on a disk of that size, and then `whole: <episodes>` is printed."""
        output = tmp_path / "runs"
        config = tmp_path / "test.toml"
        config.write_text(CONFIG.format(episodes=episodes, output=output, engine=engine))
        command = [ROLLOUT, "run", str(config), "--no-report"]
        for option in options:
            command += ["--set", option]
        if disk_kib is not None:  # a mount of its own that nobody else sees and that goes with the process
            output.mkdir()
            check = f"import driven_runs, pathlib; [f] = pathlib.Path({str(output)!r}).iterdir(); "
            check += "print('whole:', driven_runs.assert_whole(f))"
            script = (
                f"mount -t tmpfs -o size={disk_kib}k none {output} && {{ {shlex.join(command)}; code=$?; "
            )
            script += f"{sys.executable} -c {shlex.quote(check)}; exit $code; }}"
            command = ["unshare", "--mount", "sh", "-c", script]
            environment["PYTHONPATH"] = str(Path(__file__).parent)
        log = tmp_path / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | environment
            )
        return cls(process, output, log)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def folder(self) -> Path:
        [folder] = self.output.iterdir()
        return folder

    def wait(self) -> int:
        return self.process.wait(timeout=DEADLINE_S)

    def wait_until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not what():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.05)
            self.note_descendants()

    def wait_for_commits(self, num_episodes: int = 1) -> None:
        """Until so many episodes are committed and more are being played."""
        self.wait_until(lambda: len(committed(self.output)) >= num_episodes)
        self.note_descendants()

    def note_descendants(self) -> None:
        """Notes what the driver and, where its cluster is not its own, its host have started."""
        roots = [self.process.pid]
        if (self.output.is_dir() and list(self.output.glob("*/run.json"))) and self.describe()["hosts"]:
            roots.append(self.host_pid())
        for root in roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(root)
                for each in [process, *process.children(recursive=True)]:
                    self.owned[each.pid] = each.create_time()
        self.owned.pop(self.process.pid, None)

    def host_pid(self) -> int:
        """The process of the first host that was started."""
        return self.describe()["hosts"][0]["pid"]

    def describe(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())

    def last_metric(self) -> dict[str, float]:
        """The newest whole line of the timeline."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        return json.loads([line for line in lines if line.endswith("\n")][-1])

    def wait_for_news(self) -> None:
        """Until the timeline tells of what has happened so far."""
        seen_s = self.last_metric()["t_s"]
        self.wait_until(lambda: self.last_metric()["t_s"] > seen_s + NEWS_AFTER_S)

    def left_overs(self) -> list[str]:
        """Everything of this run that still lives on the machine, its own output apart."""
        left = [f"process {pid}" for pid, started in self.owned.items() if _lives(pid, started)]
        for parent in (tempfile.gettempdir(), "/dev/shm"):
            for folder in Path(parent).glob("rollout-*"):
                if _is_of(folder, {self.process.pid, *self.owned}):
                    left.append(f"folder {folder}")
                    sockets = Path("/proc/net/unix").read_text()
                    left += [
                        f"socket {line.split()[-1]}" for line in sockets.splitlines() if str(folder) in line
                    ]
        return left

    def assert_nothing_is_left(self) -> None:
        deadline = time.monotonic() + GONE_WITHIN_S
        while left := self.left_overs():
            assert time.monotonic() < deadline, "\n".join(left)
            time.sleep(0.1)


def committed(output: Path) -> list[dict[str, Any]]:
    """The committed episodes of the run in `output`, as anyone would read them."""
    from rollout.errors import SinkError
    from rollout.trajectory import scan

    folders = list(output.iterdir()) if output.is_dir() else []
    if not folders:
        return []
    try:
        return scan(folders[0], "episodes").to_table().to_pylist()
    except SinkError:
        return []  # the sink has not been opened yet


def assert_whole(folder: Path) -> int:
    """Every committed episode has all its steps and every step its tree; returns how many there are."""
    from rollout.trajectory import scan

    episodes = scan(folder, "episodes").to_table().to_pylist()
    steps = scan(folder, "steps").to_table().to_pylist()
    nodes = scan(folder, "nodes").to_table().to_pylist()
    assert len({episode["episode_id"] for episode in episodes}) == len(episodes)
    for episode in episodes:
        mine = [step for step in steps if step["episode_id"] == episode["episode_id"]]
        assert sorted(step["t"] for step in mine) == list(range(episode["length"] + 1))
        trees = {node["tree_id"] for node in nodes if node["tree_id"].startswith(episode["episode_id"])}
        assert len(trees) == episode["length"]
    return len(episodes)


def _lives(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_of(folder: Path, pids: set[int]) -> bool:
    try:
        return int((folder / "owner").read_text().split()[0]) in pids
    except (OSError, ValueError, IndexError):
        return False
