"""Tar archives for fuzzing programs: made of entries, and mutated so that the parser still reads them."""

from __future__ import annotations

import random
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

import atheris

__all__ = ["Entry", "mended_tar", "tar_of"]

_BLOCK_BYTES = 512
_CHECKSUM = slice(148, 156)
_FIELDS = (
    *((0, 100), (100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8)),
    *((329, 8), (337, 8), (345, 155)),
)
"""Where the fields of a header are, and how long."""
_KINDS = b"01234567LKSxgX\0"
_TEXTS = (
    *(b"it", b"it/", b".", b"..", b"/", b"it/out/", b"it/../", b"./it//", b".wh.", b".wh..wh..opq", b"dev/"),
    *(b"\xff", b"77777777777\0", b"00000000000\0", b"00000001000\0", b"\x80", b"\xff" * 12),
)


@dataclass(frozen=True)
class Entry:
    """One entry of an archive."""

    name: str
    content: bytes = b""
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    mode: int = 0o644


def tar_of(entries: Sequence[Entry], form: int = tarfile.GNU_FORMAT) -> bytes:
    """An archive, without the padding that its end may have."""
    parts: list[bytes] = []
    for entry in entries:
        info = tarfile.TarInfo(entry.name)
        info.size, info.type, info.linkname, info.mode = (
            len(entry.content),
            entry.kind,
            entry.link,
            entry.mode,
        )
        padding = -len(entry.content) % _BLOCK_BYTES
        parts += [info.tobuf(form), entry.content, bytes(padding)]
    return b"".join([*parts, bytes(2 * _BLOCK_BYTES)])


def mended_tar(data: bytes, offset: int, max_bytes: int, seed: int) -> bytes:
    """A mutant of a script whose rest, from `offset` on, is an archive; its headers' checksums fit.

    Half of the mutants are the fuzzer's own. The other half change what archives are made of: a field becomes
    something that means something, or entries are repeated, swapped, taken out.
    """
    rng = random.Random(seed)
    if rng.random() < 0.5:
        mutant = bytearray(atheris.Mutate(data, max_bytes))
    else:
        mutant = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            _change(mutant, offset, rng)
    _mend(mutant, offset)
    return bytes(mutant[:max_bytes])


def _change(data: bytearray, offset: int, rng: random.Random) -> None:
    num_blocks = (len(data) - offset) // _BLOCK_BYTES
    if num_blocks < 1:
        data += bytes(_BLOCK_BYTES)
        return
    start = offset + _BLOCK_BYTES * rng.randrange(num_blocks)
    block = bytes(data[start : start + _BLOCK_BYTES])
    match rng.randrange(6):
        case 0:
            del data[start : start + _BLOCK_BYTES]
        case 1:
            other = offset + _BLOCK_BYTES * rng.randrange(num_blocks)
            data[other:other] = block * rng.choice((1, 1, 1, 2, 16))
        case 2:
            data[start + 156] = rng.choice(_KINDS)
        case _:
            place, length = rng.choice(_FIELDS)
            text = rng.choice(_TEXTS)
            if rng.random() < 0.3:
                text = text + block[place : place + length]
            text = text[:length]
            data[start + place : start + place + len(text)] = text


def _mend(data: bytearray, offset: int) -> None:
    """Gives a checksum that fits to every block that says that it is a header."""
    for start in range(offset, len(data) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
        block = data[start : start + _BLOCK_BYTES]
        if block[257:262] == b"ustar":
            block[_CHECKSUM] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(block)
