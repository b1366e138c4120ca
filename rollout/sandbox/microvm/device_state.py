"""The stream of device state that QEMU saves: what a rewind must leave out of it.

A stream is a header and sections, each `type, id, name, instance, version, data, footer` (QEMU,
`migration/savevm.c`). Loading the section `cpu_common` makes TCG throw all translated code away, because
memory may have changed behind its back. A rewind tells TCG itself which pages change (see
`rollout.sandbox.microvm.rewind`), so it may leave that section out, if what is in it is what a reset gives.

Pure.
"""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["without_code_flush"]

_MAGIC: Final = b"QEVM\x00\x00\x00\x03"
_FULL: Final = 4
_FOOTER: Final = 0x7E
_NAME: Final = b"cpu_common"
_BEFORE = struct.Struct(f">BIB{len(_NAME)}sII")
"""Type, section, length of the name, name, instance, version."""
_DATA = struct.Struct(">II")
"""Halted, pending interrupt requests (QEMU, `vmstate_cpu_common`)."""
_AFTER = struct.Struct(">BI")


def without_code_flush(stream: bytes) -> bytes | None:
    """The stream without its section `cpu_common`, or None where it must stay.

    It may go when the vCPU has no interrupt request pending, which is so whenever it waits for one, and the
    section has no optional parts. A vCPU that was halted then goes on after its HLT, as if woken for nothing;
    operating systems halt in a loop.
    """
    name = stream.find(bytes([len(_NAME)]) + _NAME)
    start = name - 5
    if not stream.startswith(_MAGIC) or start < len(_MAGIC):
        return None
    end = start + _BEFORE.size + _DATA.size + _AFTER.size
    if end > len(stream) or stream.count(_NAME) != 1:
        return None
    kind, section, _, _, _, _ = _BEFORE.unpack_from(stream, start)
    _, requests = _DATA.unpack_from(stream, start + _BEFORE.size)
    footer, footer_section = _AFTER.unpack_from(stream, end - _AFTER.size)
    if kind != _FULL or footer != _FOOTER or footer_section != section or requests != 0:
        return None
    return stream[:start] + stream[end:]
