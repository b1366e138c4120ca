"""The timeline of a run: appended on a disk, written again in an object store."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from pyarrow import fs

from rollout.errors import SinkError
from rollout.fleet.timeline import MAX_LINES, WRITE_INTERVAL_S, Timeline
from rollout.trajectory.storage import Storage


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    """A folder that is used as an object store is: it has no local path."""
    (tmp_path / "run").mkdir()
    return Storage(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "run")


def times(storage: Storage) -> list[float]:
    return [json.loads(line)["t_s"] for line in (storage.read_if_there("metrics.jsonl") or b"").splitlines()]


def add_last(timeline: Timeline, t_s: float) -> None:
    timeline.add(line(t_s))
    timeline.flush()


def line(t_s: float) -> dict[str, float]:
    return {"t_s": t_s, "branches": int(10 * t_s)}


def test_a_disk_has_every_line_at_once(tmp_path: Path, clock: Clock) -> None:
    storage = Storage.of(tmp_path)
    timeline = Timeline(storage, clock=clock)
    for number in range(3):
        timeline.add(line(number))
        assert times(storage) == list(range(number + 1))


def test_a_store_is_written_at_intervals_and_at_the_end(store: Storage, clock: Clock) -> None:
    timeline = Timeline(store, clock=clock)
    timeline.add(line(1))
    assert times(store) == []
    clock.now_s += WRITE_INTERVAL_S
    timeline.add(line(2))
    assert times(store) == [1, 2]
    timeline.add(line(3))
    assert times(store) == [1, 2]
    add_last(timeline, 4)
    assert times(store) == [1, 2, 3, 4]


def test_what_a_store_did_not_take_comes_with_the_next_write(
    store: Storage, tmp_path: Path, clock: Clock
) -> None:
    in_the_way = tmp_path / "run" / "metrics.jsonl"
    in_the_way.mkdir()
    timeline = Timeline(store, clock=clock)
    with pytest.raises(SinkError, match=r"cannot write run/metrics\.jsonl"):
        add_last(timeline, 1)
    in_the_way.rmdir()
    timeline.add(line(2))
    assert times(store) == [], "the next try waits for its turn"
    clock.now_s += WRITE_INTERVAL_S
    timeline.add(line(3))
    assert times(store) == [1, 2, 3]


def test_a_long_timeline_in_a_store_stays_bounded_and_even(store: Storage, clock: Clock) -> None:
    timeline = Timeline(store, clock=clock)
    num_seconds = 10 * MAX_LINES
    for second in range(num_seconds):
        timeline.add(line(second))
    add_last(timeline, num_seconds)
    found = times(store)
    assert MAX_LINES // 2 <= len(found) <= MAX_LINES
    assert (found[0], found[-1]) == (0, num_seconds)
    gaps = [after - before for before, after in itertools.pairwise(found[:-1])]
    assert max(gaps) <= 4 * num_seconds / MAX_LINES
    assert min(gaps) >= num_seconds / MAX_LINES


def test_a_timeline_in_a_store_goes_on_where_it_ended(store: Storage, clock: Clock) -> None:
    timeline = Timeline(store, clock=clock)
    add_last(timeline, 1)
    store.put("metrics.jsonl", store.read("metrics.jsonl") + b'{"t_s": 2, "bra', "copied from a disk")
    again, last = Timeline.resume(store, clock=clock)
    assert last == line(1)
    add_last(again, 3)
    assert times(store) == [1, 3]


def test_there_may_be_no_timeline_yet(store: Storage, tmp_path: Path) -> None:
    for storage in (store, Storage.of(tmp_path)):
        assert Timeline.resume(storage)[1] == {}
