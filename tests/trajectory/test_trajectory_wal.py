"""The log: torn tails are cut, damage is counted, dead writers' logs are adopted and living ones' are not."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import pytest

from rollout.errors import SinkError
from rollout.trajectory.wal import LogReader, LogWriter, adopt_log, sweep_unborn

RECORDS = [b"first", b"x" * 1000, b"\0" * 17, b"last"]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log with four records, of a writer that is gone."""
    writer = LogWriter(tmp_path / "a.wal", {"run_id": "r"})
    for record in RECORDS:
        writer.sync(writer.append(record))
    assert writer.num_bytes == (tmp_path / "a.wal").stat().st_size
    writer.close()
    return tmp_path / "a.wal"


def test_records_come_back(log: Path) -> None:
    reader = LogReader(log)
    assert reader.header() == {"run_id": "r"}
    assert list(reader.records()) == RECORDS
    assert (reader.torn_bytes, reader.num_damaged) == (0, 0)


def test_cut_anywhere_the_whole_records_before_the_cut_remain(log: Path) -> None:
    data = log.read_bytes()
    ends = [len(data)]
    for record in reversed(RECORDS):
        ends.insert(0, ends[0] - len(record) - 8)
    for size in range(ends[0], len(data)):
        log.write_bytes(data[:size])
        reader = LogReader(log)
        num_whole = sum(end <= size for end in ends[1:])
        assert list(reader.records()) == RECORDS[:num_whole]
        assert reader.torn_bytes == size - ends[num_whole]
        assert reader.num_damaged == 0
    for size in range(ends[0]):
        log.write_bytes(data[:size])
        assert LogReader(log).header() is None


@pytest.mark.parametrize(
    "tail", [b"\0" * 4096, b"\xff" * 50, os.urandom(300)], ids=["zeros", "ones", "random"]
)
def test_garbage_at_the_end_is_a_torn_tail(log: Path, tail: bytes) -> None:
    with log.open("ab") as file:
        file.write(tail)
    reader = LogReader(log)
    assert list(reader.records()) == RECORDS
    assert reader.torn_bytes == len(tail)


def test_a_flipped_bit_costs_one_record_and_is_counted(log: Path) -> None:
    data = bytearray(log.read_bytes())
    data[data.index(b"xxx") + 500] ^= 1
    log.write_bytes(data)
    reader = LogReader(log)
    assert list(reader.records()) == [RECORDS[0], *RECORDS[2:]]
    assert (reader.torn_bytes, reader.num_damaged) == (0, 1)


def test_a_damaged_header_makes_it_no_log(log: Path) -> None:
    data = bytearray(log.read_bytes())
    data[data.index(b"run_id")] ^= 1
    log.write_bytes(data)
    assert LogReader(log).header() is None
    log.write_bytes(b"PAR1" + b"\0" * 100)
    assert LogReader(log).header() is None
    assert list(LogReader(log).records()) == []
    with pytest.raises(SinkError, match="No such file"):
        LogReader(log.with_name("missing.wal")).header()


def test_a_living_writer_keeps_its_log(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "a.wal", {})
    with adopt_log(writer.path) as is_ours:
        assert not is_ours
    writer.close()
    writer.close()
    with adopt_log(writer.path) as is_ours:
        assert is_ours
        with adopt_log(writer.path) as is_others:
            assert not is_others
    with adopt_log(tmp_path / "missing.wal") as is_ours:
        assert not is_ours


def test_a_log_that_was_never_born_is_swept(tmp_path: Path) -> None:
    (tmp_path / "dead.wal.new").write_bytes(b"half a hea")
    writer = LogWriter(tmp_path / "b.wal", {})
    sweep_unborn(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b.wal"]
    writer.close()


def test_a_log_is_made_once(tmp_path: Path, log: Path) -> None:
    (tmp_path / "folder.wal.new").mkdir()
    with pytest.raises(SinkError, match="cannot make the log"):
        LogWriter(tmp_path / "folder.wal", {})
    with pytest.raises(SinkError, match="cannot make the log"):
        LogWriter(tmp_path / "missing" / "a.wal", {})


def test_threads_share_syncs_and_none_returns_too_early(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "a.wal", {})
    lock = threading.Lock()
    failures: list[str] = []

    def write(number: int) -> None:
        for count in range(25):
            with lock:
                position = writer.append(f"{number}-{count}".encode())
            writer.sync(position)
            if writer._synced < position:
                failures.append(f"{number}-{count}")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    assert failures == []
    assert len(list(LogReader(tmp_path / "a.wal").records())) == 200


def test_half_a_record_that_did_not_fit_is_taken_back(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "a.wal", {})
    writer.append(b"first")
    size = writer.num_bytes
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
    try:
        with pytest.raises(SinkError, match="size limit"):
            writer.append(b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert writer.path.stat().st_size == size
    writer.append(b"second")
    writer.close()
    reader = LogReader(tmp_path / "a.wal")
    assert list(reader.records()) == [b"first", b"second"]
    assert (reader.torn_bytes, reader.num_damaged) == (0, 0)


def test_after_close_nothing_is_taken_but_what_is_safe_stays_so(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "a.wal", {})
    position = writer.append(b"record")
    writer.retire()
    writer.close()
    writer.sync(position)
    with pytest.raises(SinkError, match="closed"):
        writer.append(b"more")
