"""`metrics.jsonl`: the timeline of a run, a line about every second, as `rollout.report` describes it.

On a local disk a line is appended at once. An object store has no append, so there the object is written
again as a whole, every `WRITE_INTERVAL_S` and at the end, and holds at most `MAX_LINES`: when it is full, it
is thinned evenly to half as many. A run of any length thus writes less than 1 MB each time.

Not guaranteed: in an object store the timeline of a killed run lacks up to `WRITE_INTERVAL_S` of its end, and
that of a long run has a line every so many seconds instead of every one.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from rollout.errors import SinkError
from rollout.trajectory.storage import Storage

__all__ = ["MAX_LINES", "WRITE_INTERVAL_S", "Timeline"]

MAX_LINES = 4096
WRITE_INTERVAL_S = 30.0

_NAME = "metrics.jsonl"

Metric = Mapping[str, float]


class Timeline:
    """Writes the timeline of one run; every method may be called from any thread.

    Args:
        storage: The run's folder.
        metrics: What an object store's timeline holds already, oldest first.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        storage: Storage,
        metrics: Sequence[Metric] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage = storage
        self._metrics = list(metrics)
        self._clock = clock
        self._gap_s = 0.0
        self._num_unwritten = 0
        self._written_s = clock()
        self._lock = threading.Lock()

    @classmethod
    def resume(
        cls, storage: Storage, *, clock: Callable[[], float] = time.monotonic
    ) -> tuple[Self, Mapping[str, Any]]:
        """The timeline of a run that goes on, without a torn last line; and the last whole line.

        Raises:
            SinkError: It cannot be read or written.
        """
        data = storage.read_if_there(_NAME) or b""
        whole = data[: data.rfind(b"\n") + 1]
        if storage.local is not None and len(whole) < len(data):
            try:
                os.truncate(storage.local / _NAME, len(whole))
            except OSError as error:
                raise SinkError.wrap(error, f"cannot go on with {storage.path(_NAME)}") from error
        metrics = [metric for line in whole.splitlines() if (metric := _parse(line)) is not None]
        last = metrics[-1] if metrics else {}
        return cls(storage, metrics if storage.local is None else (), clock=clock), last

    def add(self, metric: Metric) -> None:
        """Adds a line; an object store gets it by `flush`, or after `WRITE_INTERVAL_S` with the next line.

        Raises:
            SinkError: It cannot be written. A later call writes what an object store lacks.
        """
        with self._lock:
            if self._storage.local is not None:
                self._append(metric)
                return
            self._keep(metric)
            self._num_unwritten += 1
            if self._clock() - self._written_s >= WRITE_INTERVAL_S:
                self._write()

    def flush(self) -> None:
        """Writes what an object store lacks; a disk lacks nothing.

        Raises:
            SinkError: It cannot be written.
        """
        with self._lock:
            if self._num_unwritten:
                self._write()

    def _write(self) -> None:
        self._written_s = self._clock()  # also of a try that fails: the next one has to wait too
        data = "".join(json.dumps(each) + "\n" for each in self._metrics)
        self._storage.put(_NAME, data.encode(), "metrics")
        self._num_unwritten = 0

    def _append(self, metric: Metric) -> None:
        assert self._storage.local is not None
        try:
            with (self._storage.local / _NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(metric) + "\n")
        except OSError as error:
            raise SinkError.wrap(error, f"cannot write {_NAME}") from error

    def _keep(self, metric: Metric) -> None:
        """The newest line is always there; the others are at least `_gap_s` apart."""
        kept = self._metrics
        if len(kept) > 1 and kept[-1]["t_s"] - kept[-2]["t_s"] < self._gap_s:
            kept.pop()
        kept.append(metric)
        if len(kept) > MAX_LINES:
            self._gap_s = 2 * (kept[-1]["t_s"] - kept[0]["t_s"]) / MAX_LINES
            thinned = [kept[0]]
            for each in kept[1:]:
                if each["t_s"] - thinned[-1]["t_s"] >= self._gap_s:
                    thinned.append(each)
            self._metrics = thinned if thinned[-1] is metric else [*thinned, metric]


def _parse(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        metric: dict[str, Any] = json.loads(line)
        return metric if float(metric["t_s"]) >= 0 and int(metric["branches"]) >= 0 else None
    return None
