from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from object_stores import s3_server
from trajectory_factory import ACTION_SPACE, OBSERVATION_SPACE, RUN_ID

from rollout.config import SinkConfig
from rollout.errors import SinkError
from rollout.trajectory.sink import TrajectorySink

__all__ = ["OpenSink", "open_sink", "run_dir", "s3_server"]

OpenSink = Callable[..., TrajectorySink]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def open_sink(run_dir: Path) -> Iterator[OpenSink]:
    """Opens sinks on the test's run; what the test leaves open is closed."""
    opened: list[TrajectorySink] = []

    def open_(where: Any = None, *, config: SinkConfig | None = None, **changes: Any) -> TrajectorySink:
        settings: dict[str, Any] = {
            "run_id": RUN_ID,
            "observation_space": OBSERVATION_SPACE,
            "action_space": ACTION_SPACE,
            **changes,
        }
        sink = TrajectorySink(run_dir if where is None else where, config=config, **settings)
        opened.append(sink)
        return sink

    yield open_
    for sink in opened:
        try:
            sink.close()
        except SinkError:
            continue  # the test made it fail; it is closed all the same
