"""Layers of container images: archives that anybody may have made, on a layer that prepares the ground.

An input says on which ground, whether the layer is compressed, and the layer. Damage to a header is mended
with the checksum that fits, and the layer's own digest always fits.

What must hold, whatever the layer: nothing is made, changed or removed outside the root; in it are folders,
files and links, of no more bytes and entries than the budget allows; every failure is a `BootError`.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import shutil
import stat
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["rollout", "tarfile"]):
    import tarfile

    from rollout.errors import BootError
    from rollout.sandbox.image import layers

from fuzzing import Growth, Script, fuzz
from tars import Entry, mended_tar, tar_of

MAX_GROWTH_BYTES = 64 << 20
MAX_BYTES, MAX_ENTRIES = 8 << 10, 40
OUTSIDE, ROOT = Path("outside"), Path("place/root")
GROUNDS = (
    tar_of([]),
    tar_of(
        [
            Entry("etc", kind=tarfile.DIRTYPE),
            Entry("etc/file", b"old"),
            Entry("dev", kind=tarfile.DIRTYPE),
            Entry("up", kind=tarfile.SYMTYPE, link=".."),
            Entry("all", kind=tarfile.SYMTYPE, link="/"),
            Entry("out", kind=tarfile.SYMTYPE, link=f"{OUTSIDE.absolute()}"),
            Entry("further", kind=tarfile.SYMTYPE, link="../../outside"),
            Entry("loop", kind=tarfile.SYMTYPE, link="loop/loop"),
        ]
    ),
)


def everything_outside() -> dict[str, tuple[int, ...]]:
    """What there is beside the root, and what would differ if somebody had been there."""
    found = [path for folder in (OUTSIDE, ROOT.parent) for path in folder.rglob("*")]
    found = [path for path in found if not path.is_relative_to(ROOT)]
    facts = {str(path): path.lstat() for path in found}
    return {
        name: (each.st_mode, each.st_nlink, each.st_size, each.st_mtime_ns, each.st_uid)
        for name, each in facts.items()
    }


def check_root() -> None:
    """What is in it is what may be."""
    num_bytes, num_links, num_entries = 0, dict[int, int](), 0
    for parent, folders, files in os.walk(ROOT):
        for name in (*folders, *files):
            facts = Path(parent, name).lstat()
            num_entries += 1
            assert stat.S_ISDIR(facts.st_mode) or stat.S_ISREG(facts.st_mode) or stat.S_ISLNK(facts.st_mode)
            if not stat.S_ISDIR(facts.st_mode):
                num_links[facts.st_ino] = num_links.get(facts.st_ino, 0) + 1
                num_bytes += facts.st_size if num_links[facts.st_ino] == 1 else 0
                assert facts.st_nlink >= num_links[facts.st_ino]
    assert num_entries <= MAX_ENTRIES, f"{num_entries} entries came out"
    assert num_bytes <= MAX_BYTES + MAX_ENTRIES * 4096, f"{num_bytes} bytes came out"  # links are long


def clear_root() -> None:
    """Removes what was made, folders without permissions included."""
    for parent, folders, _ in os.walk(ROOT):
        for name in folders:
            if not Path(parent, name).is_symlink():
                Path(parent, name).chmod(0o700)
    shutil.rmtree(ROOT)


def target(data: bytes) -> None:
    """One input."""
    script = Script(data)
    choice = script.number()
    layer = script.rest()
    contents = [GROUNDS[choice % len(GROUNDS)], layer]
    files = [Path("ground.tar"), Path("layer.tar")]
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    if choice & 2:
        contents[1] = gzip.compress(layer, 1)
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    ROOT.mkdir()
    before = everything_outside()
    try:
        with Growth(MAX_GROWTH_BYTES):
            layers.unpack_layers(files, digests, ROOT)
    except BootError:
        pass
    else:
        check_root()
    assert everything_outside() == before
    clear_root()


def seeds() -> list[bytes]:
    """Layers that are fine, and ones that try what there is to try."""
    many = b"".join(tar_of([Entry("n" * 200, b"")])[:1024] for _ in range(2))
    found = [
        [Entry("etc/.wh.file"), Entry("etc/new", b"new", mode=0o4755), Entry("etc/.wh..wh..opq")],
        [Entry("up/new", b"x"), Entry("all/etc/new", b"x"), Entry("out/new", b"x"), Entry("loop/new", b"x")],
        [Entry("further/new", b"x"), Entry("further/.wh.kept"), Entry("out/.wh..wh..opq")],
        [Entry("up/outside/kept", b"x"), Entry("up/up/up/.wh.outside"), Entry("out/.wh.kept")],
        [Entry("out", kind=tarfile.DIRTYPE, mode=0o700), Entry("all", kind=tarfile.DIRTYPE)],
        [Entry("hard", kind=tarfile.LNKTYPE, link="etc/file"), Entry("hard", b"other")],
        [Entry("hard", kind=tarfile.LNKTYPE, link="out/kept"), Entry("hard", b"other")],
        [Entry("l", kind=tarfile.SYMTYPE, link="etc/file"), Entry("h", kind=tarfile.LNKTYPE, link="l")],
        [Entry("../outside/kept", b"x"), Entry("/outside", b"x")],
        [Entry("dev/null", kind=tarfile.CHRTYPE), Entry("disk", kind=tarfile.BLKTYPE)],
        [Entry("d/" * 90 + "deep", b"x"), Entry(".wh.d")],
        [Entry("sparse", b"x", kind=tarfile.GNUTYPE_SPARSE)],
        [Entry("etc", b"a file now"), Entry("etc/below", b"x")],
    ]
    forms = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    made = [many, *(tar_of(entries, form) for entries in found for form in forms)]
    return [bytes([number % 4 | 1]) + layer for number, layer in enumerate(made)]


if __name__ == "__main__":
    layers.Budget = functools.partial(layers.Budget, MAX_BYTES, MAX_ENTRIES)  # type: ignore[misc,assignment]
    for folder in (OUTSIDE, ROOT.parent):
        shutil.rmtree(folder, ignore_errors=True)  # of an input that broke something
        folder.mkdir()
    (OUTSIDE / "kept").write_bytes(b"kept")
    (ROOT.parent / "outside").mkdir()
    (ROOT.parent / "outside" / "kept").write_bytes(b"kept")
    fuzz(target, seeds(), lambda data, most, seed: mended_tar(data, 1, most, seed))
