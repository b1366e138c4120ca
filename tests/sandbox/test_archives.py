"""Archives of guests that are not trusted: whatever they hold, nothing happens outside the target."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import GuestError
from rollout.sandbox import archives


def entry(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def archive_of(*entries: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return file


def link(name: str, leads_to: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.SYMTYPE, linkname=leads_to)


def folder(name: str, mode: int = 0o755) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.DIRTYPE, mode=mode)


def everything_below(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


def test_a_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "a" / "b").mkdir(parents=True)
    (source / "a" / "b" / "file").write_bytes(b"content")
    (source / "a" / "b" / "file").chmod(0o640)
    os.link(source / "a" / "b" / "file", source / "same")
    (source / "a").chmod(0o500)
    (source / "up").symlink_to("a/../a/b")
    (source / "dangling").symlink_to("no/such")
    name = os.fsdecode(b"not-\xff-text")
    (source / name).write_bytes(b"")
    os.utime(source / "same", (1, 1_000_000_000))
    file = io.BytesIO()
    archives.pack(source, ".", file)
    archives.unpack(file, ".", target)
    assert everything_below(target) == everything_below(source)
    assert (target / "up" / "file").read_bytes() == (target / "same").read_bytes() == b"content"
    assert (target / "a").stat().st_mode & 0o7777 == 0o500
    assert (target / "same").stat().st_mode & 0o7777 == 0o640
    assert int((target / "same").stat().st_mtime) == 1_000_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize(
    "entries",
    [
        [entry("../outside", b"x")],
        [entry("/tmp/outside", b"x")],
        [folder("it"), entry("it/../../outside", b"x")],
        [entry("other", b"x")],
        [folder("it"), link("it/link", "/etc"), entry("it/link/outside", b"x")],
        [folder("it"), link("it/link", "../.."), entry("it/link/outside", b"x")],
        [folder("it"), link("it/link", "/etc/passwd")],
        [folder("it"), link("it/link", "../outside")],
        [folder("it/d/e"), link("it/d/e/a", "../.."), link("it/x", "d/e/a/../outside")],
        [folder("it"), link("it/a", "b/.."), link("it/b", "..")],
        [folder("it"), link("it/a", "."), link("it/a/b", ".")],
        [link("it", "/etc")],
        [folder("it"), entry("it/hard", type=tarfile.LNKTYPE, linkname="/etc/passwd")],
        [folder("it"), entry("it/hard", type=tarfile.LNKTYPE, linkname="it/../../secret")],
        [folder("it"), link("it/l", "../secret"), entry("it/h", type=tarfile.LNKTYPE, linkname="it/l")],
        [folder("it"), entry("it/pipe", type=tarfile.FIFOTYPE)],
        [folder("it"), entry("it/disk", type=tarfile.BLKTYPE, devmajor=8)],
        [entry("it/twice", b"x"), entry("it/twice", b"y")],
        [entry("it/file", b"x"), entry("it/file/below", b"y")],
        [entry("it/" + "a" * 3000, b"x")],
        [entry("it/" + "b/" * 1500, b"x")],
        [],
    ],
)
def test_what_leads_out_is_refused_and_leaves_nothing(
    tmp_path: Path, entries: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (place / "secret").write_bytes(b"secret")
    with pytest.raises(GuestError):
        archives.unpack(archive_of(*entries), "it", place / "it")
    assert everything_below(place) == ["secret"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place", "secret"]
    assert (tmp_path / "secret").stat().st_nlink == (place / "secret").stat().st_nlink == 1


def test_dangerous_bits_and_owners_do_not_come_along(tmp_path: Path) -> None:
    archives.unpack(archive_of(entry("./it", b"x", mode=0o6755, uid=4242, gid=4242)), "it", tmp_path / "it")
    found = (tmp_path / "it").stat()
    assert (found.st_mode & 0o7777, found.st_uid) == (0o755, os.getuid())


def oversized_header(kind: bytes) -> bytes:
    info = tarfile.TarInfo("long")
    info.type, info.size = kind, 1 << 33
    return info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096


def sparse_file(size: int) -> bytes:
    info = tarfile.TarInfo("it")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[156:157] = b"S"
    block[386:386] = b""
    block[483:495] = b"%011o\0" % size
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + b"\0" * 10240


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no archive at all" * 100,
        b"\xff" * 2048,
        oversized_header(tarfile.XHDTYPE),
        oversized_header(tarfile.XGLTYPE),
        oversized_header(tarfile.GNUTYPE_LONGNAME),
        sparse_file(1 << 32),
        archive_of(entry("it", b"x" * 4096)).getvalue()[:2048],
    ],
    ids=["empty", "text", "noise", "pax", "global-pax", "long-name", "sparse", "cut"],
)
def test_a_damaged_archive_is_one_typed_error(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(GuestError):
        archives.unpack(io.BytesIO(data), "it", tmp_path / "it")
    assert list(tmp_path.iterdir()) == []


def test_headers_that_are_long_or_never_end_are_given_up(tmp_path: Path) -> None:
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 2 << 20
    data = long_name.tobuf(tarfile.GNU_FORMAT) + b"n" * (2 << 20) + archive_of(entry("it", b"x")).getvalue()
    with pytest.raises(GuestError, match="headers are too long"):
        archives.unpack(io.BytesIO(data), "it", tmp_path / "it")
    reader = archives.BoundedReader(io.BytesIO(bytes(512)))
    with pytest.raises(GuestError, match="never end"):  # noqa: PT012
        for _ in range(1000):
            reader.seek(0)
            reader.read(512)


def test_bytes_and_entries_are_bounded(tmp_path: Path) -> None:
    many = archive_of(folder("it"), *(entry(f"it/{i}", b"12345678") for i in range(10)))
    archives.unpack(many, "it", tmp_path / "fits", max_bytes=80, max_entries=11)
    for limits in ({"max_bytes": 79}, {"max_entries": 10}):
        with pytest.raises(GuestError, match="more than"):
            archives.unpack(many, "it", tmp_path / "it", **limits)
    assert [path.name for path in tmp_path.iterdir()] == ["fits"]


def test_folders_on_the_way_count_and_depth_is_bounded(tmp_path: Path) -> None:
    implied = [entry(f"it/{i}/a/b/c", b"x") for i in range(3)]
    archives.unpack(archive_of(*implied), "it", tmp_path / "fits", max_entries=13)
    with pytest.raises(GuestError, match="more than 12 entries"):
        archives.unpack(archive_of(*implied), "it", tmp_path / "it", max_entries=12)
    for depth in (257, 1000):
        deep = "it" + "/d" * depth
        with pytest.raises(GuestError, match="more than 256 folders deep"):
            archives.unpack(archive_of(entry(deep, b"x")), "it", tmp_path / "it")
    archives.unpack(archive_of(entry("it" + "/d" * 255, b"x")), "it", tmp_path / "deep")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "fits"]


UNPRIVILEGED = """
import pathlib, sys
from rollout.errors import GuestError
from rollout.sandbox import archives
place = pathlib.Path(sys.argv[1])
try:
    (place / "no").write_bytes(b"")
    print("this user may do anything")
except PermissionError:
    with (place.parent / "archive").open("rb") as archive:
        try:
            archives.unpack(archive, "it", place.parent / "full")
        except GuestError as error:
            print(error.message)
"""


def test_folders_that_nobody_may_write_to_leave_nothing_when_the_target_cannot_be_made(
    tmp_path: Path,
) -> None:
    locked, full = tmp_path / "locked", tmp_path / "full"
    locked.mkdir(mode=0o500)
    full.mkdir()
    (full / "mine").write_bytes(b"mine")
    sealed = archive_of(folder("it"), folder("it/sealed", 0o500), entry("it/sealed/file", b"x"))
    (tmp_path / "archive").write_bytes(sealed.getvalue())
    command = [sys.executable, "-c", UNPRIVILEGED, str(locked)]
    if os.geteuid() == 0:  # root without what lets it pass all permissions
        drop = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot make" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "full", "locked"]


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_bytes(b"mine")
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file", "link"):
        for content in (entry("it", b"x"), entry("it/x", b"x")):
            with pytest.raises(GuestError, match="cannot make"):
                archives.unpack(archive_of(content), "it", tmp_path / name)
    with pytest.raises(GuestError, match="cannot make"):
        archives.unpack(archive_of(entry("it", b"x")), "it", tmp_path / "file" / "below")
    archives.unpack(archive_of(entry("it/x", b"x")), "it", tmp_path / "empty")
    assert everything_below(tmp_path) == ["empty", "empty/x", "file", "full", "full/mine", "link"]
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_links_are_not_followed_on_the_way_in_and_pipes_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "odd").symlink_to("/etc")
    file = io.BytesIO()
    archives.pack(source, ".", file)
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        assert [(each.name, each.linkname) for each in tar] == [(".", ""), ("./odd", "/etc")]
    os.mkfifo(source / "pipe")
    with pytest.raises(GuestError, match="neither a folder nor a file nor a link"):
        archives.pack(source, ".", file)


def test_too_much_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    with pytest.raises(GuestError, match="longer than 99000 bytes"):
        archives.pack(tmp_path, ".", io.BytesIO(), max_bytes=99_000)
    with pytest.raises(GuestError, match="cannot pack"):
        archives.pack(tmp_path / "missing", ".", io.BytesIO())


VALID = archive_of(
    folder("it"), entry("it/" + "n" * 120, b"long"), link("it/l", "f"), entry("it/f", b"content" * 200)
).getvalue()


@settings(max_examples=150, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=12)), max_size=6
    ),
    length=st.integers(0, len(VALID)),
)
def test_damage_anywhere_ends_typed_and_inside(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]], length: int
) -> None:
    place = tmp_path_factory.mktemp("damaged")
    data = bytearray(VALID)
    for position, piece in changes:
        data[position : position + len(piece)] = piece
        header = position // 512 * 512  # a checksum that fits lets the damage through
        data[header + 148 : header + 156] = b"        "
        data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    try:
        archives.unpack(io.BytesIO(bytes(data[:length])), "it", place / "it", max_bytes=1 << 20)
    except GuestError:
        assert list(place.iterdir()) == []
    else:
        assert [path.name for path in place.iterdir()] == ["it"]
        for path in (place / "it").rglob("*"):
            assert path.resolve().is_relative_to(place / "it")
