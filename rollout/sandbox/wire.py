"""The guest channel's encoding: values as msgpack, frames with a 4-byte length. Both ends use this module.

Invariants:

- What `unpack` returns is a `Value` and nothing else; what it refuses is a `GuestError`.
- The peer is not trusted. A frame longer than the limit is skipped while it arrives and never held; a frame
  whose decoded form would be far larger than its bytes (a million empty maps) is refused, and so is one that
  is nested too deep for whoever walks through it; an array's bytes must match its type and shape, and object
  arrays do not exist.
- numpy is imported only when an array arrives, and touched when packing only if the program has it already:
  a guest without numpy can use the channel.

It does not guarantee the exact Python type of a number or a sequence: tuples arrive as lists, numpy's
`float64` as `float`, `str_` as `str`. Arrays and the other numpy scalars keep their type.
"""

from __future__ import annotations

import math
import re
import reprlib
import struct
import sys
from typing import TYPE_CHECKING, Any, Final, cast

import msgpack

from rollout.errors import GuestError
from rollout.types import Value

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MAX_FRAME_BYTES", "FrameDecoder", "frame", "pack", "shown", "unpack"]

MAX_FRAME_BYTES: Final = 64 << 20
"""Longest payload of one frame, in bytes."""
MAX_ITEMS: Final = 1 << 20
"""Most elements of all lists and maps of one frame together; larger data belongs in arrays or bytes."""
MAX_DEPTH: Final = 128
"""Most lists and maps inside one another: code that walks through a value by recursion gets this far."""

_TRUSTED_SIZE_BYTES = 64 << 10  # a frame this short cannot become larger than a few MiB: no need to count
_LENGTH = struct.Struct(">I")
_EXT_ARRAY = 1
_EXT_SCALAR = 2
_DTYPE = re.compile(r"[<>|][biufcSUMm][1-9][0-9]{0,8}(\[[0-9]{0,9}[A-Za-z]{1,2}\])?")
_MAX_DIMENSIONS = 32
_MAX_EMPTY_LISTS = 1 << 20
_MAX_SHOWN_CHARS = 120


def pack(value: Value) -> bytes:
    """Encodes a value.

    Raises:
        GuestError: It holds something that is no `Value`, an integer beyond 64 bits, or text that is not
            valid Unicode; or it is nested too deep.
    """
    try:
        data = cast("bytes", msgpack.packb(value, default=_pack_numpy))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise GuestError(f"a value cannot be sent over the guest channel: {error}") from error
    if flaw := _flaw(value):
        raise GuestError(f"a value cannot be sent over the guest channel: {flaw}")
    return data


def unpack(data: bytes | bytearray | memoryview) -> Value:
    """Decodes one value.

    Raises:
        GuestError: The bytes are not exactly one well-formed value.
    """
    limits: dict[str, Any] = {}
    if len(data) > _TRUSTED_SIZE_BYTES:
        budget = _ItemBudget()
        limits = {
            "list_hook": budget.count_list,
            "object_pairs_hook": budget.count_map,
            "max_array_len": MAX_ITEMS,
            "max_map_len": MAX_ITEMS,
        }
    try:
        value = cast("Value", msgpack.unpackb(data, ext_hook=_unpack_numpy, timestamp=1, **limits))
    except GuestError:
        raise
    # msgpack raises plain ValueErrors, its own StackError and ExtraData (ValueErrors too), and
    # RecursionError; OverflowError comes from timestamps.
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise GuestError(f"malformed value on the guest channel: {type(error).__name__}: {error}") from error
    if flaw := _flaw(value):
        raise GuestError(f"malformed value on the guest channel: {flaw}")
    return value


def shown(value: object) -> str:
    """A value of the peer's in few characters, for a message; takes little memory, whatever the value."""
    text = _SHOWN.repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 3] + "..."


def frame(value: Value, max_frame_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """Encodes a value with its length in front.

    Raises:
        GuestError: As `pack`, or the frame would be longer than the limit.
    """
    payload = pack(value)
    if len(payload) > max_frame_bytes:
        raise GuestError(f"a frame of {len(payload)} bytes is over the limit of {max_frame_bytes}")
    return _LENGTH.pack(len(payload)) + payload


class FrameDecoder:
    """Turns a byte stream into values; holds at most one incomplete frame.

    A bad frame raises once and is dropped whole, so the stream stays in step: whoever wants to go on calls
    `pop` again. Lengths themselves carry no check, so a peer that sends noise is told from one that sends an
    oversized frame by nothing; both end in errors.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()
        self._position = 0  # of the next frame in the buffer
        self._skip_bytes = 0  # what is still to come of an oversized frame

    @property
    def num_buffered_bytes(self) -> int:
        """Bytes held: an incomplete frame, and frames not popped yet."""
        return len(self._buffer) - self._position

    def push(self, data: bytes | bytearray | memoryview) -> None:
        """Takes in bytes; call `pop` until it returns nothing before pushing more."""
        if self._skip_bytes:
            skipped = min(self._skip_bytes, len(data))
            self._skip_bytes -= skipped
            data = memoryview(data)[skipped:]
        if self._position:
            del self._buffer[: self._position]
            self._position = 0
        self._buffer += data

    def pop(self) -> tuple[Value] | None:
        """The next complete frame's value, in a 1-tuple; None when more bytes are needed.

        Raises:
            GuestError: The next frame is oversized or malformed; it is dropped.
        """
        start = self._position + _LENGTH.size
        if len(self._buffer) < start:
            return None
        (length,) = cast("tuple[int]", _LENGTH.unpack_from(self._buffer, self._position))
        end = start + length
        if length > self._max_frame_bytes:
            self._skip_bytes = max(0, end - len(self._buffer))
            self._position = min(end, len(self._buffer))
            raise GuestError(f"a frame of {length} bytes is over the limit of {self._max_frame_bytes}")
        if len(self._buffer) < end:
            return None
        self._position = end
        with memoryview(self._buffer) as view, view[start:end] as payload:
            return (unpack(payload),)

    def feed(self, data: bytes | bytearray | memoryview) -> list[Value]:
        """Takes in bytes and returns the values of all frames that they complete.

        Raises:
            GuestError: As `pop`; values completed before the bad frame are lost.
        """
        self.push(data)
        values: list[Value] = []
        while (popped := self.pop()) is not None:
            values.append(popped[0])
        return values


def _flaw(value: object) -> str | None:
    """What msgpack lets through that is no `Value`, or that recursion would not get through."""
    level: list[Any] = [value] if isinstance(value, list | tuple | dict) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return None
        inner: list[Any] = []
        for outer in level:
            is_map = isinstance(outer, dict)
            if is_map and not all(isinstance(key, str) for key in outer):
                return "a map has a key that is not text"
            items = outer.values() if is_map else outer
            inner += [each for each in items if isinstance(each, list | tuple | dict) and each]
        level = inner
    return f"its lists and maps are more than {MAX_DEPTH} deep" if level else None


class _Shown(reprlib.Repr):
    """As `reprlib`, which cuts lists, maps and text before it makes text of them; and so for all values."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = _MAX_SHOWN_CHARS

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[:_MAX_SHOWN_CHARS])

    def repr_instance(self, x: object, level: int) -> str:
        is_short = x is None or isinstance(x, bool | float)
        return repr(x) if is_short else f"<{type(x).__name__}>"


_SHOWN = _Shown()


class _ItemBudget:
    """Counts the elements of a frame's containers while they are decoded, and refuses too many."""

    def __init__(self) -> None:
        self._left = MAX_ITEMS

    def count_list(self, items: list[Value]) -> list[Value]:
        self._spend(len(items))
        return items

    def count_map(self, pairs: list[tuple[str, Value]]) -> dict[str, Value]:
        self._spend(len(pairs))
        return dict(pairs)

    def _spend(self, num_items: int) -> None:
        self._left -= 1 + num_items
        if self._left < 0:
            raise GuestError(f"a frame holds more than {MAX_ITEMS} items")


def _pack_numpy(value: object) -> msgpack.ExtType:
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if isinstance(value, numpy.ndarray):
            return _pack_array(_EXT_ARRAY, cast("np.ndarray[Any, Any]", value))
        if isinstance(value, numpy.generic):
            return _pack_array(_EXT_SCALAR, cast("np.ndarray[Any, Any]", numpy.asarray(value)))
    raise TypeError(f"objects of type {type(value).__module__}.{type(value).__qualname__}")


def _pack_array(code: int, array: np.ndarray[Any, Any]) -> msgpack.ExtType:
    if array.dtype.hasobject or array.dtype.names is not None or not _DTYPE.fullmatch(array.dtype.str):
        raise TypeError(f"arrays of type {array.dtype}")
    header = [array.dtype.str, list(array.shape), array.tobytes()]
    return msgpack.ExtType(code, cast("bytes", msgpack.packb(header)))


def _unpack_numpy(code: int, data: bytes) -> np.ndarray[Any, Any] | np.generic:
    if code not in (_EXT_ARRAY, _EXT_SCALAR):
        raise GuestError(f"unknown extension type {code} on the guest channel")
    fields: object = msgpack.unpackb(data, max_array_len=_MAX_DIMENSIONS, max_map_len=0, max_ext_len=0)
    match fields:
        case [str(dtype_text), list(shape), bytes(raw)] if _DTYPE.fullmatch(dtype_text):
            array = _build_array(dtype_text, cast("list[object]", shape), raw)
        case _:
            raise GuestError("malformed array on the guest channel")
    if code == _EXT_ARRAY:
        return array
    if array.ndim:
        raise GuestError("malformed scalar on the guest channel")
    return cast("np.generic", array[()])


def _build_array(dtype_text: str, shape: list[object], raw: bytes) -> np.ndarray[Any, Any]:
    import numpy as np

    dtype = np.dtype(dtype_text)
    num_elements = 1
    for size in shape:
        if type(size) is not int or not 0 <= size < 1 << 62:
            raise GuestError("malformed array shape on the guest channel")
        num_elements *= size
    # No bytes can still be many lists: an array of shape (2**40, 0) is one, for who turns it into lists.
    if num_elements == 0 and math.prod(max(1, cast("int", size)) for size in shape) > _MAX_EMPTY_LISTS:
        raise GuestError(f"an array without elements on the guest channel has the shape {shape}")
    if dtype.itemsize == 0 or num_elements * dtype.itemsize != len(raw):
        raise GuestError(f"an array of {dtype_text} has {len(raw)} bytes for its shape {shape}")
    if dtype.kind == "U" and raw:
        code_points = np.frombuffer(raw, dtype=np.dtype(np.uint32).newbyteorder(dtype.byteorder))
        if bool(((code_points > 0x10FFFF) | ((code_points >= 0xD800) & (code_points < 0xE000))).any()):
            raise GuestError("a text array on the guest channel is not valid Unicode")
    # a bytearray makes the array writable, as the one that was sent may have been
    return np.frombuffer(bytearray(raw), dtype=dtype).reshape(cast("list[int]", shape))
