"""The channel's encoding: what goes in comes out, and nothing that a peer sends does more than raise."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rollout.errors import GuestError
from rollout.sandbox import wire
from rollout.sandbox.wire import FrameDecoder

LIMIT = 1000

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)
dtypes = (
    hnp.boolean_dtypes()
    | hnp.integer_dtypes()
    | hnp.unsigned_integer_dtypes()
    | hnp.floating_dtypes()
    | hnp.complex_number_dtypes()
    | hnp.datetime64_dtypes()
    | hnp.byte_string_dtypes(min_len=1)
)


@given(values)
def test_values_come_back_equal_and_of_the_same_types(value: Any) -> None:
    back = wire.unpack(wire.pack(value))
    assert back == value
    assert repr(back) == repr(value)


@given(hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
def test_arrays_come_back_with_type_shape_and_bytes_and_can_be_written(array: np.ndarray[Any, Any]) -> None:
    back = wire.unpack(wire.pack(array))
    assert isinstance(back, np.ndarray)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    assert back.flags.writeable


@pytest.mark.parametrize(
    "value",
    [
        np.int64(-3),
        np.uint8(3),
        np.float32(0.1),
        np.bool_(True),
        np.datetime64("2020-02-02"),
        np.complex64(1j),
    ],
)
def test_numpy_scalars_keep_their_type(value: np.generic) -> None:
    back = wire.unpack(wire.pack(value))
    assert back == value
    assert type(back) is type(value)


def test_what_changes_on_the_way_is_as_documented() -> None:
    sent = [(1, 2), np.float64(0.5), np.str_("x"), np.arange(6).reshape(2, 3)[:, ::2], math.nan]
    tuple_, float_, text, strided, nan = wire.unpack(wire.pack(sent))  # type: ignore[misc,arg-type]
    assert tuple_ == [1, 2]
    assert type(tuple_) is list
    assert type(float_) is float
    assert type(text) is str
    assert strided.tolist() == [[0, 2], [3, 5]]
    assert math.isnan(nan)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        1 << 64,
        -(1 << 63) - 1,
        "\ud800",
        np.array([object()]),
        np.zeros(2, dtype=[("a", "i4")]),
        [[[object()]]],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_value_is_refused(value: Any) -> None:
    with pytest.raises(GuestError, match="cannot be sent"):
        wire.pack(value)


def test_a_list_inside_itself_is_refused() -> None:
    knot: list[Any] = []
    knot.append(knot)
    with pytest.raises(GuestError, match="cannot be sent"):
        wire.pack(knot)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_value_or_a_typed_error(data: bytes) -> None:
    try:
        value = wire.unpack(data)
    except GuestError:
        return
    wire.pack(value)  # so it is a Value, all the way down


@given(st.integers(-128, 127), st.binary(max_size=100))
def test_any_extension_is_a_value_or_a_typed_error(code: int, data: bytes) -> None:
    packed = (
        msgpack.packb(msgpack.ExtType(code, data)) if code >= 0 else b"\xc7" + bytes([len(data), code & 255])
    )
    try:
        value = wire.unpack(packed + (b"" if code >= 0 else data))
    except GuestError:
        return
    wire.pack(value)


@given(
    st.sampled_from(["<f8", "|u1", "<U2", "|S3", "<M8[ns]", "|O", "<f8,<f8", "|V8", "<U0", ""]),
    st.lists(st.integers(-2, 1 << 63) | st.none() | st.booleans() | st.text(max_size=2), max_size=4),
    st.binary(max_size=64),
)
def test_arrays_that_lie_about_themselves_are_refused(dtype: str, shape: list[Any], raw: bytes) -> None:
    for code in (1, 2):
        data = msgpack.packb(msgpack.ExtType(code, msgpack.packb([dtype, shape, raw])))
        try:
            value = wire.unpack(data)
        except GuestError:
            continue
        assert isinstance(value, np.ndarray | np.generic)
        assert value.nbytes == len(raw)
        str(value.tolist())  # text in it is valid


@pytest.mark.parametrize("shape", [[1 << 40, 0], [0, 1 << 40], [1 << 15, 1 << 15, 0]])
def test_an_array_of_nothing_is_not_made_of_endless_lists(shape: list[int]) -> None:
    data = msgpack.packb(msgpack.ExtType(1, msgpack.packb(["<f8", shape, b""])))
    with pytest.raises(GuestError, match="without elements"):
        wire.unpack(data)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd" + struct.pack(">I", 5_000_000) + b"\x80" * 5_000_000,
        b"\xdd" + struct.pack(">I", 400_000) + b"\x92\x90\x90" * 400_000,
        b"\xdd" + struct.pack(">I", 5_000_000) + b"\xe0" * 5_000_000,
        b"\x9c" + (b"\xdd" + struct.pack(">I", 100_000) + b"\xe0" * 100_000) * 12,
        b"\xdf\xff\xff\xff\xff" + b"\xa0\xc0" * 100_000,
        b"\x91" * 1_000_000,
    ],
    ids=["maps", "lists", "numbers", "nested-lists", "map-length", "depth"],
)
def test_a_frame_that_would_grow_in_memory_is_refused(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(GuestError):
            wire.unpack(bomb)
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_what_is_nested_too_deep_is_refused_at_both_ends() -> None:
    fits = wire.pack(nested(wire.MAX_DEPTH))
    assert wire.unpack(fits) == nested(wire.MAX_DEPTH)
    with pytest.raises(GuestError, match="more than 128 deep"):
        wire.pack(nested(wire.MAX_DEPTH + 1))
    for depth in (wire.MAX_DEPTH + 1, 1000):  # msgpack itself gives up a little beyond
        with pytest.raises(GuestError, match="more than 128 deep"):
            wire.unpack(b"\x91" * depth + b"\xc0")
    with pytest.raises(GuestError, match="more than 128 deep"):
        wire.unpack(b"\x81\xa0" * (wire.MAX_DEPTH + 1) + b"\xc0")


@pytest.mark.parametrize("key", [b"bytes", 1, None])
def test_keys_are_text(key: Any) -> None:
    for value in ({key: 1}, [{"a": {key: 1}}]):
        with pytest.raises(GuestError, match="cannot be sent"):
            wire.pack(value)
        with pytest.raises(GuestError, match="malformed"):
            wire.unpack(msgpack.packb(value))


@given(values)
def test_any_value_is_shown_in_few_characters(value: Any) -> None:
    assert len(wire.shown(value)) <= 120


def test_showing_a_large_value_takes_little_memory() -> None:
    large: list[Any] = [bytes(8 << 20), "\x00" * (8 << 20), [[1] * 100_000], np.zeros(1 << 20)]
    large += [np.bytes_(bytes(8 << 20)), {str(i): 1 for i in range(100_000)}]
    tracemalloc.start()
    try:
        for value in large:
            assert len(wire.shown({"id": value})) <= 120
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert wire.shown({"id": 1, "ok": [b"x", "y", None, 0.5]}) == "{'id': 1, 'ok': [b'x', 'y', None, 0.5]}"


def test_large_honest_values_pass() -> None:
    value: Any = {
        "bytes": bytes(1 << 20),
        "array": np.zeros(1 << 18),
        "rows": [[i, str(i)] for i in range(90_000)],
    }
    back: Any = wire.unpack(wire.pack(value))
    assert back["bytes"] == value["bytes"]
    assert back["rows"] == value["rows"]


@given(st.lists(values, max_size=5), st.data())
def test_frames_come_back_whatever_pieces_they_arrive_in(sent: list[Any], data: st.DataObject) -> None:
    stream = b"".join(wire.frame(value) for value in sent)
    decoder = FrameDecoder()
    received: list[Any] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        received += decoder.feed(stream[:size])
        stream = stream[size:]
    assert received == sent
    assert decoder.num_buffered_bytes == 0


@given(st.lists(st.binary(max_size=LIMIT * 2), max_size=20))
def test_any_stream_is_frames_or_typed_errors_in_bounded_memory(pieces: list[bytes]) -> None:
    decoder = FrameDecoder(max_frame_bytes=LIMIT)
    for piece in pieces:
        decoder.push(piece)
        popped: object = True
        while popped is not None:
            try:
                popped = decoder.pop()
            except GuestError:
                continue
        assert decoder.num_buffered_bytes <= LIMIT + 4


@pytest.mark.parametrize("bad", [b"\xc1", wire.pack(1) + b"\x00", b"x" * (LIMIT + 1)])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_bad_frame_raises_once_and_the_stream_stays_in_step(bad: bytes, size: int) -> None:
    stream = wire.frame("before") + struct.pack(">I", len(bad)) + bad + wire.frame("after")
    decoder = FrameDecoder(max_frame_bytes=LIMIT)
    received: list[Any] = []
    errors = 0
    for start in range(0, len(stream), size):
        decoder.push(stream[start : start + size])
        while True:
            try:
                popped = decoder.pop()
            except GuestError:
                errors += 1
                continue
            if popped is None:
                break
            received += popped
    assert received == ["before", "after"]
    assert errors == 1


def test_a_frame_over_the_limit_is_not_made() -> None:
    with pytest.raises(GuestError, match="over the limit"):
        wire.frame(bytes(LIMIT), max_frame_bytes=LIMIT)
    assert len(wire.frame(bytes(100), max_frame_bytes=LIMIT)) > 100


def test_a_guest_without_numpy_never_imports_it() -> None:
    code = (
        "import sys; from rollout.sandbox import wire;"
        "value = {'a': [1, 'x', b'y', None, 1.5]};"
        "assert wire.unpack(wire.pack(value)) == value;"
        "assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
