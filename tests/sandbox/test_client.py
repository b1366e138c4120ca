"""The host's client against guests that behave, and against guests that do not."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.errors import EnvError, GuestError, RolloutError
from rollout.sandbox import client as client_module
from rollout.sandbox import wire
from rollout.sandbox.client import GuestClient
from rollout.sandbox.wire import FrameDecoder
from rollout.types import Randomness, Value

LIMIT = 1 << 16


class Guest:
    """The other end of a client, played by a test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = FrameDecoder()
        self._requests: list[Any] = []

    async def request(self) -> dict[str, Any]:
        while not self._requests:
            data = await self._reader.read(1 << 16)
            assert data, "the client has gone"
            self._requests += self._decoder.feed(data)
        return self._requests.pop(0)

    async def send(self, *messages: Value) -> None:
        await self.send_bytes(b"".join(wire.frame(message) for message in messages))

    async def send_bytes(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def reply(self, request: dict[str, Any], value: Value) -> None:
        await self.send({"id": request["id"], "ok": value})

    async def close(self) -> None:
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[GuestClient, Guest]]:
    ours, theirs = socket.socketpair()
    client = await GuestClient.connect(ours, max_frame_bytes=LIMIT)
    guest = Guest(*await asyncio.open_unix_connection(sock=theirs))
    try:
        yield client, guest
    finally:
        await client.close()
        await guest.close()


async def outcome(call: Awaitable[Value]) -> Value | RolloutError:
    try:
        return await call
    except RolloutError as error:
        return error


async def test_calls_in_flight_get_their_own_answers_in_any_order() -> None:
    async with connected() as (client, guest):
        calls = [asyncio.ensure_future(client.call("op", {"n": n}, timeout_s=5)) for n in range(20)]
        requests = [await guest.request() for _ in calls]
        for request in reversed(requests):
            await guest.reply(request, request["args"]["n"] * 10)
        assert await asyncio.gather(*calls) == [n * 10 for n in range(20)]
        assert client.num_pending == 0


async def test_errors_of_the_guest_are_the_calls_alone() -> None:
    async with connected() as (client, guest):
        for kind, expected in (
            ("EnvError", EnvError),
            ("GuestError", GuestError),
            ("SystemExit", GuestError),
        ):
            call = asyncio.ensure_future(client.call("op", timeout_s=5))
            request = await guest.request()
            message = "two\nlines \x1b[31m" + "x" * 5000
            await guest.send(
                {"id": request["id"], "error": {"type": kind, "message": message, "retryable": True}}
            )
            error = await outcome(call)
            assert type(error) is expected
            assert error.retryable
            assert error.message.isprintable()
            assert len(error.message) <= 2000
            assert client.failure is None


async def test_events_reach_their_call_and_no_other() -> None:
    async with connected() as (client, guest):
        heard: list[Value] = []
        call = asyncio.ensure_future(client.call("op", timeout_s=5, on_event=heard.append))
        deaf = asyncio.ensure_future(client.call("op", timeout_s=5))
        first, second = await guest.request(), await guest.request()
        await guest.send({"id": second["id"], "event": "not for you"})
        await guest.send({"id": first["id"], "event": 1}, {"id": first["id"], "event": 2})
        await guest.reply(first, None)
        await guest.reply(second, None)
        await asyncio.gather(call, deaf)
        assert heard == [1, 2]


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        {},
        {"id": 1},
        {"id": 99, "ok": None},
        {"id": True, "ok": None, "more": 1},
        {"id": 1, "ok": None, "error": None},
        {"id": 1, "error": "text"},
        {"id": 1, "error": {"type": "EnvError", "message": "m"}},
        {"id": 1, "error": {"type": 1, "message": "m", "retryable": False}},
        {"id": 1, "error": {"type": "EnvError", "message": b"m", "retryable": False}},
        {"id": "1", "ok": None},
        {"id": None, "error": {"type": "GuestError", "message": "what?", "retryable": False}},
        {"id": 99, "event": None},
    ],
    ids=str,
)
async def test_a_message_that_answers_nothing_ends_the_client(message: Value) -> None:
    async with connected() as (client, guest):
        call = asyncio.ensure_future(client.call("op", timeout_s=5))
        await guest.request()
        await guest.send(message)
        error = await outcome(call)
        assert type(error) is GuestError
        assert "garbage" in error.message
        assert client.failure is not None
        assert type(await outcome(client.call("op", timeout_s=5))) is GuestError


async def test_a_message_that_is_none_is_told_in_few_words() -> None:
    async with connected() as (client, guest):
        call = asyncio.ensure_future(client.call("op", timeout_s=5))
        await guest.request()
        deep = b"\x91" * 1000 + b"\xc0"
        await guest.send_bytes(struct.pack(">I", len(deep)) + deep)
        error = await outcome(call)
        assert type(error) is GuestError
        assert "garbage" in error.message
        assert client.failure is not None
        assert "garbage" in client.failure.message
        assert len(client.failure.message) < 300


@pytest.mark.parametrize(
    "noise",
    [
        b"\x00\x00\x00\x01\xc1",
        struct.pack(">I", LIMIT + 1),
        b"\xff" * 64,
        wire.frame({"id": 1, "ok": None})[:-1] + b"\xc1",
    ],
    ids=["no-value", "oversized", "noise", "last-byte"],
)
async def test_noise_ends_the_client(noise: bytes) -> None:
    async with connected() as (client, guest):
        call = asyncio.ensure_future(client.call("op", timeout_s=5))
        await guest.request()
        await guest.send_bytes(noise)
        assert type(await outcome(call)) is GuestError
        assert client.failure is not None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.binary(max_size=200)
        | st.builds(
            wire.frame,
            st.dictionaries(
                st.sampled_from(["id", "ok", "error", "event", "x"]),
                st.integers(0, 3) | st.none() | st.text(max_size=3) | st.just({"type": "EnvError"}),
                max_size=3,
            ),
        ),
        max_size=8,
    )
)
def test_whatever_the_guest_sends_every_call_ends_typed(pieces: list[bytes]) -> None:
    async def play() -> None:
        async with connected() as (client, guest):
            calls = [asyncio.ensure_future(outcome(client.call("op", timeout_s=20))) for _ in range(2)]
            await guest.request()
            for piece in pieces:
                try:
                    await guest.send_bytes(piece)
                except ConnectionError:
                    break
            await guest.close()
            async with asyncio.timeout(10):
                await asyncio.gather(*calls)  # a value or a RolloutError: anything else is raised here
            assert client.num_pending == 0
            assert client.failure is not None  # the guest has gone, at the latest

    asyncio.run(play())


async def test_silence_ends_the_client_with_a_retryable_error() -> None:
    async with connected() as (client, guest):
        patient = asyncio.ensure_future(outcome(client.call("slow", timeout_s=30)))
        error = await outcome(client.call("op", timeout_s=0.05))
        assert type(error) is GuestError
        assert error.retryable
        assert "op" in error.message
        assert type(await patient) is GuestError
        await guest.request()


async def test_the_end_of_the_stream_ends_every_call() -> None:
    async with connected() as (client, guest):
        calls = [asyncio.ensure_future(outcome(client.call("op", timeout_s=30))) for _ in range(3)]
        await guest.request()
        await guest.close()
        assert [type(error) for error in await asyncio.gather(*calls)] == [GuestError] * 3
        assert type(await outcome(client.call("op", timeout_s=30))) is GuestError


async def test_a_cancelled_calls_reply_is_dropped() -> None:
    async with connected() as (client, guest):
        call = asyncio.ensure_future(client.call("op", timeout_s=30))
        request = await guest.request()
        call.cancel()
        await asyncio.wait([call])
        await guest.send({"id": request["id"], "event": 1})
        await guest.reply(request, None)
        fine = asyncio.ensure_future(client.call("op", timeout_s=30))
        await guest.reply(await guest.request(), "fine")
        assert await fine == "fine"
        await guest.reply(request, None)  # a second answer is one too many
        assert type(await outcome(client.call("op", timeout_s=30))) is GuestError


async def test_cancelled_calls_that_are_never_answered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_MAX_ABANDONED", 3)
    async with connected() as (client, guest):
        for _ in range(4):
            call = asyncio.ensure_future(client.call("op", timeout_s=30))
            await guest.request()
            call.cancel()
            await asyncio.wait([call])
        assert client.failure is not None


async def test_a_guest_that_reads_nothing_slows_callers_down_and_close_frees_them() -> None:
    async with connected() as (client, _):
        payload = {"data": bytes(LIMIT - 100)}
        calls = [asyncio.ensure_future(outcome(client.call("op", payload, timeout_s=30))) for _ in range(100)]
        await asyncio.sleep(0.05)
        assert not any(call.done() for call in calls)
        await client.close()
        assert {type(error) for error in await asyncio.gather(*calls)} == {GuestError}


async def test_what_cannot_be_sent_is_refused_and_the_client_lives() -> None:
    async with connected() as (client, guest):
        for args in ({"x": object()}, {"x": bytes(LIMIT)}):
            error = await outcome(client.call("op", args, timeout_s=5))  # type: ignore[arg-type]
            assert type(error) is GuestError
        assert client.num_pending == 0
        call = asyncio.ensure_future(client.call("op", timeout_s=5))
        await guest.reply(await guest.request(), 1)
        assert await call == 1


async def test_close_is_idempotent_and_concurrent() -> None:
    async with connected() as (client, _):
        await asyncio.gather(client.close(), client.close())
        await client.close()
        assert type(await outcome(client.call("op", timeout_s=5))) is GuestError


@pytest.mark.parametrize(
    "answer",
    [None, {}, {"generation": 8, "protocol": 1}, {"generation": 7, "protocol": 2}, {"generation": "7"}],
    ids=str,
)
async def test_a_handshake_that_is_not_confirmed_ends_the_client(answer: Value) -> None:
    async with connected() as (client, guest):
        hello = asyncio.ensure_future(client.hello(7, Randomness.seeded(1), hostname="h", timeout_s=5))
        request = await guest.request()
        assert request["args"]["policy"] == "seeded"
        assert request["args"]["seed"] == 1
        assert len(request["args"]["entropy"]) == 32
        await guest.reply(request, answer)
        with pytest.raises(GuestError):
            await hello
        assert client.failure is not None


async def test_a_refused_handshake_ends_the_client() -> None:
    async with connected() as (client, guest):
        hello = asyncio.ensure_future(client.hello(7, Randomness(), hostname="h", timeout_s=5))
        request = await guest.request()
        await guest.send(
            {"id": request["id"], "error": {"type": "EnvError", "message": "no", "retryable": False}}
        )
        with pytest.raises(GuestError, match="handshake"):
            await hello
        assert client.failure is not None


@pytest.mark.parametrize(
    ("ask", "answer"),
    [
        (lambda client: client.exec(["true"]), {"exit_code": 0}),
        (lambda client: client.exec(["true"]), "done"),
        (
            lambda client: client.exec(["true"], max_output_bytes=3),
            {
                "exit_code": 0,
                "stdout": b"four",
                "stderr": b"",
                "stdout_truncated": False,
                "stderr_truncated": False,
                "timed_out": False,
                "duration_s": 0.0,
            },
        ),
        (lambda client: client.read_file("f"), {"data": b"", "eof": False}),
        (lambda client: client.read_file("f"), {"data": "text", "eof": True}),
        (lambda client: client.read_file("f"), None),
    ],
    ids=["exec-part", "exec-text", "exec-too-much", "file-no-progress", "file-text", "file-nothing"],
)
async def test_results_of_another_shape_end_the_client(
    ask: Callable[[GuestClient], Awaitable[Any]], answer: Value
) -> None:
    async with connected() as (client, guest):
        call = asyncio.ensure_future(ask(client))
        await guest.reply(await guest.request(), answer)
        with pytest.raises(GuestError, match="garbage"):
            await call
        assert client.failure is not None


async def test_a_file_without_end_is_given_up() -> None:
    async with connected() as (client, guest):
        call = asyncio.ensure_future(client.read_file("f", max_bytes=100_000))
        for _ in range(3):
            await guest.reply(await guest.request(), {"data": bytes(50_000), "eof": False})
        with pytest.raises(GuestError, match="longer than 100000"):
            await call
        assert client.failure is None
