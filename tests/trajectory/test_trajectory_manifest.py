"""The manifest: an episode is committed once, and a torn or altered line commits nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from gymnasium import spaces
from pyarrow import fs
from trajectory_factory import ACTION_SPACE, OBSERVATION_SPACE

from rollout.errors import SinkError
from rollout.trajectory.encode import TrajectoryEncoder
from rollout.trajectory.manifest import Commit, FileEntry, Manifest
from rollout.trajectory.storage import Storage

SCHEMAS = TrajectoryEncoder(OBSERVATION_SPACE, ACTION_SPACE).schemas


def make_commit(part: str, *episode_ids: str) -> Commit:
    return Commit(part, (FileEntry("steps", f"steps/{part}.parquet", 3, 100, 7),), episode_ids)


@pytest.fixture(params=["journal", "segments"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "journal":
        return Storage.of(tmp_path)
    return Storage(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "run")


def open_manifest(storage: Storage, run_id: str = "r") -> Manifest:
    manifest = Manifest(storage)
    manifest.declare(run_id, SCHEMAS, "w")
    return manifest


def read(storage: Storage) -> Manifest:
    manifest = Manifest(storage)
    manifest.refresh()
    return manifest


def test_what_is_committed_is_read_back(storage: Storage) -> None:
    writer = open_manifest(storage)
    assert not writer.commit(make_commit("w-0", "a", "b"))
    assert not writer.commit(make_commit("w-1", "c"))
    manifest = read(storage)
    assert manifest.run_id == "r"
    assert manifest.schemas == SCHEMAS
    assert [one.commit for one in manifest.commits] == [make_commit("w-0", "a", "b"), make_commit("w-1", "c")]
    assert manifest.committed == writer.committed == {"a", "b", "c"}
    assert manifest.problems == []


def test_an_episode_of_another_writer_is_not_committed_again(storage: Storage) -> None:
    one, other = open_manifest(storage), open_manifest(storage)
    assert not one.commit(make_commit("one-0", "a", "b"))
    assert other.commit(make_commit("other-0", "b", "c")) == {"b"}
    assert not other.commit(make_commit("other-0", "c"))
    assert read(storage).committed == {"a", "b", "c"}


def test_a_race_in_an_object_store_shows_an_episode_once(tmp_path: Path) -> None:
    storage = Storage(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "run")
    manifest = open_manifest(storage)
    assert not manifest.commit(make_commit("x-0", "a", "b"))
    written = storage.read("manifest/x-0.jsonl")
    for part, ids in (("y-0", '"b","c"'), ("z-0", '"a"')):  # as writers do who did not see each other
        other = Storage.of(tmp_path / part)
        Path(other.root).mkdir()
        racing = open_manifest(other)
        racing.commit(make_commit(part, *ids.replace('"', "").split(",")))
        line = (tmp_path / part / "manifest.jsonl").read_bytes().splitlines(keepends=True)[-1]
        storage.put(f"manifest/{part}.jsonl", line, "test")
    assert storage.read("manifest/x-0.jsonl") == written
    manifest = read(storage)
    assert manifest.committed == {"a", "b", "c"}
    assert [(one.commit.part, set(one.excluded)) for one in manifest.commits] == [
        ("x-0", set()),
        ("y-0", {"b"}),
        ("z-0", {"a"}),
    ]
    assert [one.is_superseded for one in manifest.commits] == [False, False, True]


def test_cut_anywhere_the_whole_lines_hold_and_a_writer_goes_on(tmp_path: Path) -> None:
    storage = Storage.of(tmp_path)
    manifest = open_manifest(storage)
    manifest.commit(make_commit("w-0", "a"))
    path = tmp_path / "manifest.jsonl"
    before = path.stat().st_size
    manifest.commit(make_commit("w-1", "b"))
    data = path.read_bytes()
    for size in range(before, len(data) + 1):
        path.write_bytes(data[:size])
        is_whole = size >= len(data) - 1  # the newline is not part of the record
        assert read(storage).committed == ({"a", "b"} if is_whole else {"a"})
        writer = open_manifest(storage)
        assert bool(writer.commit(make_commit("v-0", "b", "c"))) == is_whole
        if is_whole:
            writer.commit(make_commit("v-0", "c"))
        after = read(storage)
        assert after.committed == {"a", "b", "c"}
        assert len(after.problems) == (before < size < len(data) - 1)


@pytest.mark.parametrize("line", ["{}", "[1]", "null", '{"crc32":1,"record":{"kind":"commit"}}', "\xff\x00"])
def test_a_foreign_line_is_skipped_and_counted(tmp_path: Path, line: str) -> None:
    storage = Storage.of(tmp_path)
    open_manifest(storage).commit(make_commit("w-0", "a"))
    with (tmp_path / "manifest.jsonl").open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    open_manifest(storage).commit(make_commit("w-1", "b"))
    manifest = read(storage)
    assert manifest.committed == {"a", "b"}
    assert [problem.kind for problem in manifest.problems] == ["torn manifest record"]


def test_another_run_or_other_spaces_are_refused(storage: Storage) -> None:
    open_manifest(storage)
    with pytest.raises(SinkError, match="holds the run 'r', not 'other'"):
        open_manifest(storage, "other")
    other = TrajectoryEncoder(spaces.Box(0, 1, (2,)), ACTION_SPACE).schemas
    with pytest.raises(SinkError, match=r"steps\.observation is int64"):
        Manifest(storage).declare("r", other, "v")


def test_spaces_that_differ_in_shape_alone_are_refused(tmp_path: Path) -> None:
    storage = Storage.of(tmp_path)
    flat, square = (TrajectoryEncoder(spaces.Box(0, 1, s), ACTION_SPACE).schemas for s in ((4,), (2, 2)))
    Manifest(storage).declare("r", flat, "w")
    with pytest.raises(SinkError, match=r"steps\.observation"):
        Manifest(storage).declare("r", square, "v")


def test_many_threads_commit_each_episode_once(tmp_path: Path) -> None:
    storage = Storage.of(tmp_path)
    open_manifest(storage)
    accepted: list[str] = []

    def commit_all(writer: int) -> None:
        manifest = open_manifest(storage)
        for number in range(20):
            if not manifest.commit(make_commit(f"{writer}-{number}", f"episode-{number}")):
                accepted.append(f"episode-{number}")

    threads = [threading.Thread(target=commit_all, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(accepted) == sorted(f"episode-{number}" for number in range(20))
    assert read(storage).committed == set(accepted)
