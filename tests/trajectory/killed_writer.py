"""A zygote that forks writers and has them killed: importing pyarrow takes longer than a whole run.

It reads one JSON object per line from stdin (see `_run`), and answers each with
`{"exit": waitstatus, "acknowledged": [numbers]}`. It starts no thread itself, so that its forks are clean.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import sys
import threading
import time
import traceback
from typing import Any

from pyarrow import fs
from trajectory_factory import ACTION_SPACE, OBSERVATION_SPACE, RUN_ID, make_trajectory

from rollout.config import SinkConfig
from rollout.trajectory import faults
from rollout.trajectory.batch import TrajectoryBatch
from rollout.trajectory.encode import TrajectoryEncoder
from rollout.trajectory.sink import TrajectorySink

MAX_EPISODES = 24


def open_sink(run_dir: str, log_folder: str = "", **settings: Any) -> TrajectorySink:
    """The sink of the kill tests; with a log folder the run's folder has neither append nor rename."""
    filesystem = fs.SubTreeFileSystem(run_dir, fs.LocalFileSystem()) if log_folder else None
    return TrajectorySink(
        "run" if log_folder else run_dir,
        run_id=RUN_ID,
        observation_space=OBSERVATION_SPACE,
        action_space=ACTION_SPACE,
        filesystem=filesystem,
        config=SinkConfig(log_folder=log_folder, **settings),
    )


def _write(order: dict[str, Any], batches: list[TrajectoryBatch], acknowledge: int) -> None:
    """Writes the episodes from two threads, each in its own order, and flushes now and then."""
    numbers: list[int] = order["numbers"]
    sink = open_sink(order["run_dir"], order["log_folder"], roll_rows=order["roll_rows"])

    def write_all(seed: int) -> None:
        generator = random.Random(seed)
        for count, number in enumerate(generator.sample(numbers, len(numbers))):
            sink.write_batch(batches[number])
            os.write(acknowledge, struct.pack("<I", number))
            if count % 7 == 6:
                sink.flush()

    other = threading.Thread(target=write_all, args=(order["seed"],))
    other.start()
    write_all(order["seed"] + 1)
    other.join()
    sink.close()


def _fork(order: dict[str, Any], batches: list[TrajectoryBatch], acknowledge: int) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _write(order, batches, acknowledge)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def _run(order: dict[str, Any], batches: list[TrajectoryBatch]) -> dict[str, Any]:
    """Runs writers of the same episodes at the same time; the first one may be killed."""
    read_end, write_end = os.pipe()
    os.environ[faults.VARIABLE] = order["fault"]
    victim = _fork(order, batches, write_end)
    del os.environ[faults.VARIABLE]
    others = [_fork({**order, "seed": 99 + n}, batches, write_end) for n in range(order["num_others"])]
    os.close(write_end)
    if order["kill_after_s"] is not None:
        time.sleep(order["kill_after_s"])
        os.kill(victim, signal.SIGKILL)
    with os.fdopen(read_end, "rb") as pipe:
        data = pipe.read()
    exits = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in (victim, *others)]
    numbers = {number for (number,) in struct.iter_unpack("<I", data)}
    return {"exit": exits[0], "other_exits": exits[1:], "acknowledged": sorted(numbers)}


if __name__ == "__main__":
    encoder = TrajectoryEncoder(OBSERVATION_SPACE, ACTION_SPACE)
    encoded = [encoder.encode([make_trajectory(number)]) for number in range(MAX_EPISODES)]
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line), encoded)), flush=True)
