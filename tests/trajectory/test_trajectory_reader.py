"""The reader: exactly what is committed, and every skip is reported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from gymnasium import spaces
from pyarrow import fs
from trajectory_factory import ACTION_SPACE, OBSERVATION_SPACE, episode_id, length_of, make_trajectory

from rollout.errors import SinkError
from rollout.trajectory import TrajectorySink, scan
from rollout.trajectory.encode import TrajectoryEncoder
from rollout.trajectory.manifest import Manifest
from rollout.trajectory.storage import Storage

OpenSink = Callable[..., TrajectorySink]
NUMBERS = range(10)


@pytest.fixture
def run(open_sink: OpenSink, run_dir: Path) -> Path:
    """A run of ten episodes in two parts."""
    with open_sink() as sink:
        sink.write_many([make_trajectory(number) for number in NUMBERS[:5]])
        sink.flush()
        sink.write_many([make_trajectory(number) for number in NUMBERS[5:]])
    return run_dir


def steps_of(*numbers: int) -> int:
    return sum(length_of(number) + 1 for number in numbers)


def test_rows_come_in_the_order_of_their_commits(run: Path) -> None:
    table = scan(run, "steps").to_table()
    assert table["observation"].to_pylist() == [n + t for n in NUMBERS for t in range(length_of(n) + 1)]
    assert scan(run, "steps").count_rows() == table.num_rows == steps_of(*NUMBERS)
    assert scan(run).episode_ids == {episode_id(number) for number in NUMBERS}


def test_projection_and_filter(run: Path) -> None:
    found = scan(run, "steps", ["t", "episode_id"], pc.field("action").is_null())
    assert found.schema.names == ["t", "episode_id"]
    assert found.to_table().to_pylist() == [{"t": length_of(n), "episode_id": episode_id(n)} for n in NUMBERS]
    assert found.count_rows() == len(NUMBERS)
    assert all(batch.num_rows <= 7 for batch in scan(run).to_batches(batch_size=7))
    assert scan(run, "steps", filter=pc.field("t") > 100).to_table().num_rows == 0


def test_numpy_batches(run: Path) -> None:
    columns = ["observation", "action", "terminated"]
    first, second = scan(run, "steps", columns, pc.field("t") == 0).to_numpy_batches()
    np.testing.assert_array_equal(first["observation"], list(NUMBERS[:5]))
    np.testing.assert_array_equal(second["observation"], list(NUMBERS[5:]))
    assert first["action"].dtype == np.int64
    assert first["terminated"].dtype == np.bool_
    whole, _ = scan(run, "steps", ["action", "terminated"]).to_numpy_batches()
    assert whole["action"].dtype == whole["terminated"].dtype == np.float64
    assert np.isnan(whole["terminated"]).sum() == 5


def test_boxes_come_back_in_shape(open_sink: OpenSink, run_dir: Path) -> None:
    space = spaces.Box(0, 255, (2, 3), np.uint8, seed=0)
    with open_sink(observation_space=space) as sink:
        whole = make_trajectory(3)
        values = [space.sample() for _ in whole.steps]
        steps = [replace(step, observation=value) for step, value in zip(whole.steps, values, strict=True)]
        sink.write(replace(whole, steps=steps))
    (batch,) = scan(run_dir, "steps", ["observation"]).to_numpy_batches()
    np.testing.assert_array_equal(batch["observation"], np.stack(values))


def test_files_and_dataset_for_other_readers(run: Path) -> None:
    found = scan(run, "nodes")
    assert found.dataset().to_table().equals(found.to_table())
    assert pa.concat_tables([pq.read_table(file) for file in found.files()]).equals(found.to_table())
    metadata = pq.read_metadata(found.files()[0])
    assert set(metadata.metadata) == {b"ARROW:schema"}
    assert metadata.num_row_groups == 1


def test_a_run_without_commits_is_empty_and_has_its_columns(open_sink: OpenSink, run_dir: Path) -> None:
    open_sink()
    for table in ("episodes", "steps", "nodes"):
        found = scan(run_dir, table)
        assert found.to_table().num_rows == found.count_rows() == 0
        assert found.to_table().schema == found.schema
    assert scan(run_dir).dataset().to_table().num_rows == 0


def test_what_is_not_there_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="no table 'step': a run has episodes, steps, nodes"):
        scan(run, "step")
    with pytest.raises(SinkError, match=r"no column 'actoin'; it has .*action"):
        scan(run, columns=["actoin"])
    with pytest.raises(SinkError, match="holds no run"):
        scan(tmp_path / "nothing")
    with pytest.raises(SinkError, match="cannot read"):
        scan(run, filter=pc.field("t") == "text").to_table()


def parts(run: Path, table: str) -> list[Path]:
    """The files of a table, in the order of their commits."""
    return [Path(name) for name in scan(run, table).files()]


@pytest.mark.parametrize("table", ["episodes", "steps", "nodes"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_part_is_left_out_whole_and_reported(run: Path, table: str, damage: str) -> None:
    path = parts(run, table)[0]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    for other in ("episodes", "steps", "nodes"):
        found = scan(run, other)
        assert set(found.to_table()["episode_id"].to_pylist()) == {episode_id(n) for n in NUMBERS[5:]}
        (problem,) = found.problems
        assert problem.where == f"{table}/{path.name}"
        assert problem.kind == {"missing": "missing file", "truncated": "damaged file"}[damage]
        assert "5 episodes are left out" in problem.detail
        assert found.episode_ids == {episode_id(n) for n in NUMBERS[5:]}


def test_altered_bytes_are_found_by_verify_or_raise_when_read(run: Path) -> None:
    path = parts(run, "steps")[1]
    data = bytearray(path.read_bytes())
    data[40] ^= 0xFF
    path.write_bytes(data)
    verified = scan(run, verify=True)
    assert [problem.detail for problem in verified.problems] == [
        "its checksum is wrong; 5 episodes are left out"
    ]
    assert verified.to_table().num_rows == steps_of(*NUMBERS[:5])
    with pytest.raises(SinkError, match="cannot read steps"):
        scan(run).to_table()
    path.write_bytes(b"x" * len(data))
    with pytest.raises(SinkError, match="cannot read steps"):
        scan(run).to_table()


def test_foreign_files_are_not_read_and_are_reported(run: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), run / "steps" / "foreign.parquet")
    (run / "steps" / "half.parquet.tmp").write_bytes(b"PAR1")
    (run / "notes.txt").write_text("not ours, and not among the tables")
    found = scan(run)
    assert found.to_table().num_rows == steps_of(*NUMBERS)
    assert [(problem.kind, problem.where) for problem in found.problems] == [
        ("uncommitted file", "steps/foreign.parquet"),
        ("uncommitted file", "steps/half.parquet.tmp"),
    ]


def test_an_older_schema_is_read_with_nulls_and_can_be_resumed(open_sink: OpenSink, run_dir: Path) -> None:
    schemas = TrajectoryEncoder(OBSERVATION_SPACE, ACTION_SPACE).schemas
    older = dict(schemas)
    dropped = ["policy_target", "tokens", "n_step_return"]
    older["steps"] = pa.schema([field for field in schemas["steps"] if field.name not in dropped])
    run_dir.mkdir()
    Manifest(Storage.of(run_dir)).declare("run-1", older, "old")
    with open_sink() as sink:
        sink.write(make_trajectory(1))
    assert "policy_target" not in pq.read_schema(parts(run_dir, "steps")[0]).names
    table = scan(run_dir, "steps").to_table()
    assert table.schema.names == ["run_id", "episode_id", *schemas["steps"].names]
    assert all(table[name].null_count == table.num_rows for name in dropped)
    assert scan(run_dir, "steps", ["policy_target", "t"]).to_table()["t"].to_pylist() == [0, 1, 2]


def test_files_of_the_first_schema_version_are_read_and_added_to(open_sink: OpenSink, run_dir: Path) -> None:
    """`data/schema-1` was written by the code of that version."""
    shutil.copytree(Path(__file__).parent / "data" / "schema-1", run_dir)
    first = scan(run_dir, "nodes", verify=True)
    assert first.problems == ()
    assert set(first.to_table()["observation_digest"].to_pylist()) == {None}
    with open_sink() as sink:
        whole = make_trajectory(3)
        episode = replace(whole.episode, fingerprint="f", image_digest="i")
        sink.write(replace(whole, episode=episode))
    episodes = scan(run_dir, "episodes").to_table().to_pylist()
    assert [row["episode_id"] for row in episodes] == [episode_id(number) for number in range(4)]
    assert {row["fingerprint"] for row in episodes} == {None}, "a run keeps the columns it was begun with"
    assert [row["return"] for row in episodes] == [float(length_of(number)) for number in range(4)]
    assert scan(run_dir, "steps").to_table()["observation"].to_pylist() == [
        number + t for number in range(4) for t in range(length_of(number) + 1)
    ]


def test_an_episode_that_two_writers_committed_at_once_is_seen_once(
    open_sink: OpenSink, tmp_path: Path
) -> None:
    store = raced_run(open_sink, tmp_path, (0, 1, 2), (2, 3))

    def read(table: str, **more: Any) -> pa.Table:
        return scan("run", table, filesystem=store, **more).to_table()

    assert read("episodes")["episode_id"].to_pylist() == [episode_id(n) for n in (0, 1, 2, 3)]
    assert read("steps").num_rows == steps_of(0, 1, 2, 3)
    last = read("steps", filter=pc.field("action").is_null(), columns=["observation"])
    assert last["observation"].to_pylist() == [n + length_of(n) for n in (0, 1, 2, 3)]
    assert scan("run", filesystem=store).count_rows() == steps_of(0, 1, 2, 3)
    with pytest.raises(SinkError, match="in two files"):
        scan("run", filesystem=store).files()


def test_a_commit_whose_every_episode_is_in_an_earlier_one_is_no_problem(
    open_sink: OpenSink, tmp_path: Path
) -> None:
    store = raced_run(open_sink, tmp_path, (0, 1, 2), (1, 2))
    found = scan("run", "episodes", filesystem=store, verify=True)
    assert found.problems == ()
    assert found.to_table()["episode_id"].to_pylist() == [episode_id(n) for n in (0, 1, 2)]
    assert found.count_rows() == 3
    assert len(found.files()) == 1
    assert len(store.get_file_info(fs.FileSelector("run/episodes"))) == 2


def raced_run(open_sink: OpenSink, folder: Path, *numbers: tuple[int, ...]) -> fs.FileSystem:
    """A run as two writers leave it who committed at once, without seeing each other, in an object store."""
    stores: list[fs.FileSystem] = []
    for name, of_writer in zip("ab", numbers, strict=True):
        (folder / name).mkdir()
        store = fs.SubTreeFileSystem(str(folder / name), fs.LocalFileSystem())
        with open_sink("run", filesystem=store, writer_id=name) as sink:
            sink.write_many([make_trajectory(number) for number in of_writer])
        stores.append(store)
    fs.copy_files("run", "run", source_filesystem=stores[1], destination_filesystem=stores[0])
    return stores[0]


def test_importing_the_package_imports_no_arrow() -> None:
    code = "import sys, rollout.trajectory; assert 'pyarrow' not in sys.modules; rollout.trajectory.scan"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sys.modules["rollout.trajectory"].nothing  # noqa: B018
