"""Archives that come out of a guest: streams of `tar` that hold anything.

An input is what is asked for and within which bounds, and the archive. Damage to a header is mended with the
checksum that fits, which is how it gets past the parser's first look.

What must hold, whatever the archive: nothing is made, changed or removed outside the target; the target
appears whole or not at all; what is in it stays inside and within bounds; every failure is a `GuestError`,
of which nothing is left.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["rollout", "tarfile"]):
    import tarfile

    from rollout.errors import GuestError
    from rollout.sandbox import archives

from fuzzing import Growth, Script, fuzz
from tars import Entry, mended_tar, tar_of

MAX_GROWTH_BYTES = 64 << 20
MAX_BYTES, MAX_ENTRIES = 8 << 10, 24
NAMES = ("it", ".")
PLACE = Path("place")


def everything() -> dict[str, tuple[int, ...]]:
    """What is in the place and beside it, but not below the target."""
    found = [PLACE, *PLACE.iterdir(), *PLACE.parent.glob("*.secret"), *(PLACE / "beside").rglob("*")]
    return {str(path): facts(path) for path in found if path != PLACE / "target"}


def facts(path: Path) -> tuple[int, ...]:
    """What would differ if somebody had been there; of the place itself, which changes, only the mode."""
    found = path.lstat()
    if path == PLACE:
        return (found.st_mode,)
    return found.st_mode, found.st_nlink, found.st_size, found.st_mtime_ns, found.st_ino


def check_target(target: Path) -> None:
    """What came out is inside and within bounds."""
    top = target.resolve()
    num_bytes, seen = 0, set[int]()
    found = [target, *target.rglob("*")] if not target.is_symlink() else [target]
    for path in found:
        facts = path.lstat()
        assert stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode) or stat.S_ISLNK(facts.st_mode)
        assert not facts.st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX), oct(facts.st_mode)
        if stat.S_ISREG(facts.st_mode) and facts.st_ino not in seen:
            num_bytes += facts.st_size
        seen.add(facts.st_ino)
        resolved = Path(os.path.realpath(path))
        assert resolved.is_relative_to(top), f"{path} leads to {resolved}"
    assert num_bytes <= MAX_BYTES, f"{num_bytes} bytes came out"
    assert len(found) <= MAX_ENTRIES + 1, f"{len(found)} entries came out"


def target(data: bytes) -> None:
    """One input."""
    script = Script(data)
    name = NAMES[script.number() % len(NAMES)]
    archive = io.BytesIO(script.rest())
    before = everything()
    made = PLACE / "target"
    try:
        with Growth(MAX_GROWTH_BYTES):
            archives.unpack(archive, name, made, max_bytes=MAX_BYTES, max_entries=MAX_ENTRIES)
    except GuestError:
        assert not os.path.lexists(made), "a failure left something"
    else:
        check_target(made)
    assert everything() == before
    if made.is_dir() and not made.is_symlink():
        shutil.rmtree(made)
    else:
        made.unlink(missing_ok=True)


def seeds() -> list[bytes]:
    """Archives that are fine, and ones that try what there is to try."""
    folder = Entry("it", kind=tarfile.DIRTYPE)
    found = [
        [Entry("it", b"file", mode=0o4755)],
        [folder, Entry("it/sub", kind=tarfile.DIRTYPE, mode=0o500), Entry("it/sub/file", b"x" * 600)],
        [folder, Entry("it/link", kind=tarfile.SYMTYPE, link="sub/../file"), Entry("it/file", b"y")],
        [folder, Entry("it/file", b"y"), Entry("it/hard", kind=tarfile.LNKTYPE, link="it/file")],
        [folder, Entry("it/out", kind=tarfile.SYMTYPE, link="../beside"), Entry("it/out/new", b"x")],
        [folder, Entry("it/out", kind=tarfile.SYMTYPE, link=".."), Entry("it/in", b"x")],
        [Entry("../it", b"x"), Entry("/it", b"x")],
        [folder, Entry("it/hard", kind=tarfile.LNKTYPE, link="it/../../beside/kept")],
        [folder, Entry("it/" + "n" * 120, b"x"), Entry("it/" + "d/" * 60 + "deep", b"x")],
        [folder, Entry("it/pipe", kind=tarfile.FIFOTYPE), Entry("it/node", kind=tarfile.CHRTYPE)],
        [folder, Entry("it/sparse", b"x", kind=tarfile.GNUTYPE_SPARSE)],
        [Entry("a", b"x"), Entry("b", kind=tarfile.DIRTYPE), Entry("b/c", kind=tarfile.SYMTYPE, link="../a")],
    ]
    archives_ = [
        tar_of(entries, form) for entries in found for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    ]
    return [bytes([number]) + archive for archive in archives_ for number in range(len(NAMES))]


if __name__ == "__main__":
    shutil.rmtree(PLACE, ignore_errors=True)  # of an input that broke something
    (PLACE / "beside").mkdir(parents=True)
    (PLACE / "beside" / "kept").write_bytes(b"kept")
    Path("one.secret").write_bytes(b"secret")
    fuzz(target, seeds(), lambda data, most, seed: mended_tar(data, 1, most, seed))
