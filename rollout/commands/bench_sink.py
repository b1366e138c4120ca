"""Figures of the trajectory sink, each beside raw pyarrow on the same rows in the same run.

- "rows": from Python dataclasses to committed Parquet files, log and fsync included, in writes of many
  episodes and of one. The raw side converts the same dataclasses to the same columns with the same code, and
  writes them with `pyarrow.parquet` (zstd level 3, like the sink): no log, no checksum, no fsync, no commit.
- "columns": the same from data that is in columns already, so that only what the sink adds is measured.
- "export": transitions for RLlib, against reading the same columns of the same files and writing them again.
- "memory": a writer, and then an export, of ten million steps, each in a process of its own.

Nothing is pinned to a core: where the machine is busy with other things, the ratios say more than the rates.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from rollout.commands.bench_episodes import (
    ACTIONS,
    MOVES,
    OBSERVATIONS,
    RUN_ID,
    SIMULATIONS,
    make_episodes,
    renamed,
    step_batch,
)
from rollout.commands.bench_row import BenchRow, Rival, at_least, at_most
from rollout.config import SinkConfig
from rollout.trajectory.batch import TrajectoryBatch, concat_tables
from rollout.trajectory.encode import TrajectoryEncoder
from rollout.trajectory.export.arrays import RLLIB_COLUMNS
from rollout.trajectory.export.formats import export_run
from rollout.trajectory.reader import scan
from rollout.trajectory.rows import Trajectory
from rollout.trajectory.schema import TABLES
from rollout.trajectory.sink import TrajectorySink

__all__ = ["main", "rows"]

BRANCHES_PER_S = 300
EPISODES_A_WRITE = 20
COLUMN_REPEATS = 8
EXPORT_STEPS = 1_000_000
ROWS_A_FILE = 200_000
_SINK = SinkConfig(roll_rows=ROWS_A_FILE, roll_s=1000.0)


def rows(*, num_episodes: int = 400, samples: int = 5, memory_steps: int = 10_000_000) -> Iterator[BenchRow]:
    """Measures; a figure is yielded as soon as it is there.

    Args:
        num_episodes: Episodes (of 530 rows) in a sample of "rows" and "columns".
        samples: Measurements of each figure; raw and sink take turns.
        memory_steps: Rows of the memory figure; 0 leaves it out.
    """
    episodes = make_episodes(num_episodes)
    folder = Path(tempfile.mkdtemp(prefix="bench-sink-"))
    try:
        yield from _row_figures(folder, episodes, samples)
        yield from _column_figures(folder, episodes, samples)
        yield _overhead(folder, episodes, samples)
        yield _size(folder, episodes)
        yield from _export_figures(folder, samples)
        if memory_steps:
            yield from _memory(folder, memory_steps)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _row_figures(folder: Path, episodes: Sequence[Trajectory], samples: int) -> Iterator[BenchRow]:
    encoder = TrajectoryEncoder(OBSERVATIONS, ACTIONS)
    batch = encoder.encode(episodes)
    many, single, raw, ratio_many, ratio_single = [], [], [], [], []

    def write_in(size: int) -> Callable[[TrajectorySink], None]:
        chunks = [episodes[start : start + size] for start in range(0, len(episodes), size)]
        return lambda sink: _write_all(sink.write_many, chunks)

    for _ in range(samples):
        raw_s, _ = _timed(lambda: _write_raw(folder / "raw", _raw_tables(encoder, episodes), 1))
        raw.append(batch.num_rows / raw_s)
        many.append(batch.num_rows / _sink_s(folder, write_in(EPISODES_A_WRITE))[0])
        single.append(batch.num_rows / _sink_s(folder, write_in(1))[0])
        ratio_many.append(many[-1] / raw[-1])
        ratio_single.append(single[-1] / raw[-1])
    rival = Rival.of("raw pyarrow", raw)
    yield BenchRow.of(f"{EPISODES_A_WRITE} episodes a write", many, "rows/s", subject="rows", rivals=[rival])
    yield BenchRow.of("one episode a write", single, "rows/s", subject="rows", rivals=[rival])
    yield BenchRow.of("the same, of raw pyarrow", ratio_many, "x", subject="rows", target=at_least(0.7))
    yield BenchRow.of(
        "one episode a write, of raw pyarrow",
        ratio_single,
        "x",
        subject="rows",
        note="an fsync and three small batches for each episode, from one thread",
    )


def _column_figures(folder: Path, episodes: Sequence[Trajectory], samples: int) -> Iterator[BenchRow]:
    encoder = TrajectoryEncoder(OBSERVATIONS, ACTIONS)
    once = [
        encoder.encode(episodes[start : start + EPISODES_A_WRITE])
        for start in range(0, len(episodes), EPISODES_A_WRITE)
    ]
    batches = [renamed(batch, number) for number in range(COLUMN_REPEATS) for batch in once]
    tables = _tables_of(encoder, once)
    num_rows = sum(batch.num_rows for batch in batches)
    mbytes = sum(batch.num_bytes for batch in batches) / 1e6
    speed, rate, raw_speed, raw_rate, ratio, processor = [], [], [], [], [], []
    for _ in range(samples):
        raw_s, raw_cpu_s = _timed(lambda: _write_raw(folder / "raw", tables, COLUMN_REPEATS))
        sink_s, sink_cpu_s = _sink_s(folder, lambda sink: _write_all(sink.write_batch, batches))
        speed.append(num_rows / sink_s)
        rate.append(mbytes / sink_s)
        raw_speed.append(num_rows / raw_s)
        raw_rate.append(mbytes / raw_s)
        ratio.append(raw_s / sink_s)
        processor.append(raw_cpu_s / sink_cpu_s)
    subject = "columns"
    yield BenchRow.of("speed", speed, "rows/s", subject=subject, rivals=[Rival.of("raw pyarrow", raw_speed)])
    yield BenchRow.of("rate", rate, "MB/s", subject=subject, rivals=[Rival.of("raw pyarrow", raw_rate)])
    yield BenchRow.of("of raw pyarrow", ratio, "x", subject=subject, target=at_least(0.7))
    yield BenchRow.of(
        "of raw pyarrow, in processor time",
        processor,
        "x",
        subject=subject,
        note="the sink uses two threads, raw pyarrow one",
    )


def _overhead(folder: Path, episodes: Sequence[Trajectory], samples: int) -> BenchRow:
    """Processor time of a sink, in percent of a core, when branches come at the given rate."""
    num_branches = len(episodes) * MOVES * SIMULATIONS
    percent: list[float] = []
    singly = [[episode] for episode in episodes]
    for _ in range(samples):
        _, cpu_s = _sink_s(folder, lambda sink: _write_all(sink.write_many, singly))
        percent.append(100 * cpu_s / num_branches * BRANCHES_PER_S)
    return BenchRow.of(
        f"processor time at {BRANCHES_PER_S} branches/s",
        percent,
        "% of a core",
        subject="overhead",
        target=at_most(3.0),
        note="one episode a write; writer and roller together",
    )


def _size(folder: Path, episodes: Sequence[Trajectory]) -> BenchRow:
    """Bytes of the Parquet files against the same rows as JSON lines without nulls, compressed with zstd."""
    run = folder / "size"
    with _open_sink(run) as sink:
        sink.write_many(episodes)
    parquet_bytes = sum(path.stat().st_size for path in run.rglob("*.parquet"))
    shutil.rmtree(run)
    encoder = TrajectoryEncoder(OBSERVATIONS, ACTIONS)
    json_bytes = 0
    for table in _tables_of(encoder, [encoder.encode(episodes)]).values():
        lines = "".join(json.dumps(_without_nulls(row), default=str) + "\n" for row in table.to_pylist())
        json_bytes += len(zstandard.ZstdCompressor(level=3).compress(lines.encode()))
    return BenchRow.of(
        "Parquet files, of JSON lines with zstd",
        [parquet_bytes / json_bytes],
        "x",
        subject="size",
        target=at_most(0.6),
        note=f"{parquet_bytes:,} against {json_bytes:,} bytes",
    )


def _export_figures(folder: Path, samples: int) -> Iterator[BenchRow]:
    run, out = folder / "run", folder / "out"
    _write_steps(run, EXPORT_STEPS)
    files = scan(run, "steps").files()
    columns = ["episode_id", *RLLIB_COLUMNS]
    speed, raw, ratio = [], [], []
    for _ in range(samples):
        raw_s, _ = _timed(lambda: _copy_columns(files, columns, folder / "raw.parquet"))
        export_s, _ = _timed(lambda: export_run(run, "rllib", out, overwrite=True))
        speed.append(EXPORT_STEPS / export_s)
        raw.append(EXPORT_STEPS / raw_s)
        ratio.append(raw_s / export_s)
    shutil.rmtree(run)
    shutil.rmtree(out)
    rival = Rival.of("raw pyarrow, read and write", raw)
    yield BenchRow.of("transitions", speed, "rows/s", subject="export", rivals=[rival])
    yield BenchRow.of("of raw pyarrow", ratio, "x", subject="export", target=at_least(0.5))


def _copy_columns(files: Sequence[str], columns: Sequence[str], out: Path) -> None:
    """Reads columns of files one after the other and writes them to one, as an export would."""
    schema = pq.read_schema(files[0])
    chosen = pa.schema([schema.field(name) for name in columns])
    with pq.ParquetWriter(out, chosen, compression="zstd", compression_level=3) as writer:
        for file in files:
            writer.write_table(pq.read_table(file, columns=list(columns)).select(columns))


def _memory(folder: Path, num_steps: int) -> Iterator[BenchRow]:
    """Resident memory of processes of their own: one writes steps in columns, one exports them."""
    run = folder / "memory"
    written = _in_own_process("write", run, num_steps)
    subject = f"memory, {num_steps:,} steps"
    for name, figures in (("sink", written), ("export", _in_own_process("export", run, num_steps))):
        resident: list[float] = figures["resident_mb"]
        middle = len(resident) // 2
        yield BenchRow.of(
            f"{name}: largest resident set", [max(resident)], "MB", subject=subject, target=at_most(500)
        )
        yield BenchRow.of(
            f"{name}: growth from the first to the second half",
            [max(resident[middle:]) - max(resident[:middle])],
            "MB",
            subject=subject,
            note=f"{figures['rows_per_s']:,.0f} rows/s",
        )


def _in_own_process(work: str, run: Path, num_steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, work, str(run), str(num_steps)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _write_steps(run: Path, num_steps: int) -> list[float]:
    """Writes a run of steps alone; returns the resident memory after each write, in MB."""
    length, num_episodes = 99, 100
    resident: list[float] = []
    with TrajectorySink(run, run_id=RUN_ID, observation_space=OBSERVATIONS, action_space=ACTIONS) as sink:
        for number in range(max(2, num_steps // (num_episodes * (length + 1)))):
            sink.write_batch(step_batch(number, num_episodes, length, seed=number % 7))
            resident.append(_resident_mb())
    return resident


def _export_steps(run: Path) -> list[float]:
    """Exports a run; returns the resident memory after each chunk, in MB."""
    resident = [_resident_mb()]
    export_run(
        run,
        "rllib",
        run.with_name("memory-export"),
        progress=lambda _done, _total: resident.append(_resident_mb()),
    )
    return resident


def _resident_mb() -> float:
    return psutil.Process().memory_info().rss / 1e6


def main(work: str, run: str, num_steps: int) -> None:
    """The program of the memory figure: does the work and prints what it took as JSON."""
    start_s = time.monotonic()
    resident = _write_steps(Path(run), num_steps) if work == "write" else _export_steps(Path(run))
    rows_per_s = num_steps / (time.monotonic() - start_s)
    print(json.dumps({"resident_mb": resident, "rows_per_s": rows_per_s}))


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of processor time of all threads."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start_s, time.process_time() - start_cpu_s


def _open_sink(run: Path) -> TrajectorySink:
    return TrajectorySink(
        run, run_id=RUN_ID, observation_space=OBSERVATIONS, action_space=ACTIONS, config=_SINK
    )


def _sink_s(folder: Path, write: Callable[[TrajectorySink], None]) -> tuple[float, float]:
    """As `_timed`, from opening a sink to its close, all committed."""
    run = folder / "sink"

    def work() -> None:
        with _open_sink(run) as sink:
            write(sink)

    try:
        return _timed(work)
    finally:
        shutil.rmtree(run)


def _write_all(write: Callable[[Any], int], chunks: Sequence[object]) -> None:
    for chunk in chunks:
        write(chunk)


def _raw_tables(encoder: TrajectoryEncoder, episodes: Sequence[Trajectory]) -> dict[str, pa.Table]:
    return _tables_of(encoder, [encoder.encode(episodes)])


def _tables_of(encoder: TrajectoryEncoder, batches: Sequence[TrajectoryBatch]) -> dict[str, pa.Table]:
    return {table: concat_tables(batches, table, RUN_ID, encoder.schemas[table]) for table in TABLES}


def _write_raw(folder: Path, tables: dict[str, pa.Table], repeats: int) -> None:
    folder.mkdir(exist_ok=True)
    for name, table in tables.items():
        with pq.ParquetWriter(
            folder / f"{name}.parquet", table.schema, compression="zstd", compression_level=3
        ) as writer:
            for _ in range(repeats):
                writer.write_table(table, row_group_size=ROWS_A_FILE)


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
