"""Decompression of what somebody else may have compressed: never larger than was agreed.

zstd's frames say how long their content is, and a library that is asked to decompress one makes room for that
first, whatever limit it was given besides.
"""

from __future__ import annotations

from typing import Final

import zstandard

__all__ = ["MAX_DEVICE_STATE_BYTES", "decompressed"]

MAX_DEVICE_STATE_BYTES: Final = 64 << 20
"""Longest device state; it takes some 10 KB."""


def decompressed(frame: bytes, max_bytes: int) -> bytes:
    """The content of one zstd frame.

    Raises:
        ZstdError: It is damaged, does not say how long its content is, or that is too long.
    """
    size_bytes = zstandard.frame_content_size(frame)
    if not 0 <= size_bytes <= max_bytes:
        raise zstandard.ZstdError(f"it is said to hold {size_bytes} bytes, and may hold {max_bytes}")
    return zstandard.ZstdDecompressor().decompress(frame, max_output_size=size_bytes)
