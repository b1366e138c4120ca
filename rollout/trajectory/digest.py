"""Digests of values, by which a row can say what was seen without holding it. Needs numpy alone."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from rollout.types import Value

__all__ = ["value_digest"]


def value_digest(value: Value) -> int:
    """A 63-bit digest of a value: equal for equal values, whoever counts tuples as lists and 3 as int64(3).

    It is for telling whether two plays saw the same, not against forgery.
    """
    digest = hashlib.blake2b(digest_size=8)
    _update(digest, value)
    return int.from_bytes(digest.digest(), "little") >> 1


def _update(digest: hashlib.blake2b, value: Any) -> None:
    match value:
        case None:
            digest.update(b"n")
        case bool() | np.bool_():
            digest.update(b"t" if bool(value) else b"f")
        case int() | np.integer():
            text = str(int(value)).encode()
            digest.update(b"i%d:%b" % (len(text), text))
        case float() | np.floating():
            digest.update(b"d" + struct.pack("<d", float(value)))
        case str() | bytes():
            data = value.encode() if isinstance(value, str) else value
            digest.update(b"%b%d:" % (b"s" if isinstance(value, str) else b"b", len(data)) + data)
        case np.ndarray():
            head = f"a{value.dtype.str}{value.shape}:"
            digest.update(head.encode() + np.ascontiguousarray(value).tobytes())
        case Mapping():
            digest.update(b"m%d:" % len(value))
            for key in sorted(value):
                _update(digest, key)
                _update(digest, value[key])
        case _:
            digest.update(b"l%d:" % len(value))
            for item in value:
                _update(digest, item)
