"""The host's end of the guest channel, while calls of every kind wait for a guest that sends anything.

An input says which calls are made, and what the guest sends, in pieces of what size: noise, frames of noise,
messages whose values are noise, and frames that repeat a few bytes many times.

What must hold:

- Each call ends, with an answer that the guest has really sent to it, or with a typed error.
- Once the channel is gone so is the client, and nothing waits any more.
- What a listener hears is what was sent to it, in order.
- What is decoded is a `Value`; memory stays bounded; a download makes nothing but its target.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import atheris
import msgpack
import numpy as np

with atheris.instrument_imports(include=["rollout", "envs"]):
    from envs.gym import GymEnv
    from rollout.errors import EnvError, GuestError, RolloutError
    from rollout.sandbox import client as client_module
    from rollout.sandbox import wire
    from rollout.sandbox.client import GuestClient
    from rollout.sandbox.commands import Command
    from rollout.sandbox.folders import GuestFolders
    from rollout.types import ExecResult, PlayoutRequest, PlayoutResult, Randomness, Step, Value

from channel_seeds import KINDS, seeds
from fuzzing import Growth, Script, fuzz

PART_BYTES = client_module._CHUNK_BYTES = 4096
"""Of files, smaller than outside: an input is played in a millisecond, and has several parts all the same."""
MAX_FRAME_BYTES = 1 << 20
MAX_GROWTH_BYTES = 128 << 20
"""What one input may need: some frames in hand, and what became of them, which the item limit bounds."""
PAUSE_TURNS = 6
DEADLINE_S = 20.0
MOST_CALLS = 6
SCRATCH = Path("scratch")
CHUNK_BYTES = (1 << 30, 1, 7, 64, 4096)


class Channel(asyncio.Transport):
    """The socket: keeps what the client sends, and is gone when the client aborts it."""

    def __init__(self, client: GuestClient) -> None:
        super().__init__()
        self.is_open = True
        self.requests: list[dict[str, Any]] = []
        self._client = client
        self._decoder = wire.FrameDecoder()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.requests += self._decoder.feed(data)  # type: ignore[arg-type]

    def abort(self) -> None:
        if self.is_open:
            self.is_open = False
            asyncio.get_running_loop().call_soon(self._client.connection_lost, None)


class Sandbox(GuestFolders):
    """The least that commands, folders and environments need of a sandbox."""

    def __init__(self, client: GuestClient) -> None:
        self._client = client

    @asynccontextmanager
    async def using(self) -> AsyncIterator[GuestClient]:
        yield self._client

    listening = using

    def expect_background(self) -> None:
        pass

    @property
    def has_ended(self) -> bool:
        return self._client.failure is not None

    async def call(self, op: str, /, *, timeout_s: float = 60.0, **args: Value) -> Value:
        return await self._client.call(op, args, timeout_s=timeout_s)


@dataclass
class Call:
    """A call in flight, how to tell its requests, and what its answer must be made of."""

    task: asyncio.Task[Any]
    is_mine: Callable[[dict[str, Any]], bool]
    rebuild: Callable[[list[Any]], Any]
    """Of what was sent as the answers to its requests, what it should have returned."""
    heard: list[Value] | None = None


@dataclass
class Guest:
    """What the guest has sent, as whoever reads the whole stream at once understands it."""

    sent: bytearray = field(default_factory=bytearray)

    def messages(self) -> list[Any]:
        """Up to the first that is none."""
        found: list[Any] = []
        position = 0
        while position + 4 <= len(self.sent):
            end = position + 4 + int.from_bytes(self.sent[position : position + 4], "big")
            if end > len(self.sent):
                break
            try:
                found.append(wire.unpack(bytes(self.sent[position + 4 : end])))
            except GuestError:
                break
            position = end
        return found


def begin(kind: int, number: int, client: GuestClient, sandbox: Sandbox) -> Call:
    """Makes a call of some kind; `number` is in its request, so that it can be told from others."""
    name = f"call-{number}"
    names = {f"{name}-x"}

    def with_args(**expected: object) -> Callable[[dict[str, Any]], bool]:
        return lambda request: expected.items() <= request["args"].items()

    def named(request: dict[str, Any]) -> bool:
        return request["op"] in names

    start = asyncio.get_running_loop().create_task
    match KINDS[kind % len(KINDS)]:
        case "call":
            return Call(start(client.call(f"{name}-x", timeout_s=1e6)), named, lambda sent: sent[0])
        case "listen":
            heard: list[Value] = []
            task = start(client.call(f"{name}-x", timeout_s=1e6, on_event=heard.append))
            return Call(task, named, lambda sent: sent[0], heard)
        case "hello":
            task = start(client.hello(number, Randomness.seeded(number), hostname=name, timeout_s=1e6))
            return Call(task, with_args(hostname=name), lambda sent: sent[0])
        case "exec":
            task = start(client.exec([name], timeout_s=1e6, max_output_bytes=1000))
            return Call(task, with_args(argv=[name]), lambda sent: result_of(sent[0]))
        case "read_file":
            task = start(client.read_file(name, timeout_s=1e6, max_bytes=10_000))
            return Call(task, with_args(path=name), lambda sent: b"".join(part["data"] for part in sent))
        case "write_file":
            task = start(client.write_file(name, bytes(PART_BYTES + 1), timeout_s=1e6))
            return Call(task, with_args(path=name), lambda _: None)
        case "spawn":
            return Call(start(sandbox.spawn([name])), with_args(argv=[name]), lambda sent: sent[0])
        case "commands":
            return Call(
                start(sandbox.commands()), lambda request: request["op"] == "commands", lambda _: None
            )
        case "wait":
            task = start(Command(sandbox, 1000 + number, 1, [name]).wait())
            return Call(task, with_args(command=1000 + number), lambda sent: result_of(sent[0]))
        case "output":
            task = start(all_output(Command(sandbox, 1000 + number, 1, [name])))
            return Call(task, with_args(command=1000 + number), lambda _: None)
        case "download":
            task = start(sandbox.download(f"in/{name}", SCRATCH / name, max_bytes=20_000, max_entries=20))
            return Call(task, lambda _: False, lambda _: None)
        case "step":
            task = start(GymEnv("x").step(sandbox, name))  # type: ignore[arg-type]
            return Call(task, with_args(action=name), step_of)
        case "prepare":
            task = start(GymEnv(name).prepare(sandbox))  # type: ignore[arg-type]
            return Call(task, with_args(env_id=name), lambda _: None)
        case _:
            task = start(GymEnv("x").playout(sandbox, PlayoutRequest(5, number)))  # type: ignore[arg-type]
            return Call(task, lambda request: request["args"].get("seed") == number, lambda sent: sent[0])


async def all_output(command: Command) -> None:
    """Listens to the end."""
    async for _ in command.output():
        pass


def result_of(answer: dict[str, Any]) -> ExecResult:
    """What a command's answer says."""
    flags = (answer[f"{name}_truncated"] for name in ("stdout", "stderr"))
    fields = (answer["exit_code"], answer["stdout"], answer["stderr"], *flags, answer["timed_out"])
    return ExecResult(*fields, answer["duration_s"])


def step_of(sent: list[Any]) -> Step:
    """What a step's answer says."""
    answer = sent[0]
    ends = answer["terminated"], answer["truncated"]
    return Step(answer["observation"], answer["reward"], *ends, answer["info"], answer.get("state_hash"))


def plain(result: object) -> object:
    """A result as a `Value`, to be compared as bytes, since arrays and NaN are not equal to themselves."""
    match result:
        case Command():
            return {"command": result.number, "pid": result.pid}
        case ExecResult() | Step() | PlayoutResult():
            return {name: getattr(result, name) for name in result.__dataclass_fields__}
        case dict():
            return {**result}
        case _:
            return result


def is_same(one: object, other: object) -> bool:
    """Whether two results are; of a command and a playout the answer may hold more."""
    left, right = plain(one), plain(other)
    if isinstance(one, Command | PlayoutResult) and isinstance(right, dict):
        right = {key: right[key] for key in left}  # type: ignore[union-attr]
    return wire.pack(left) == wire.pack(right)  # type: ignore[arg-type]


def check_value(value: object) -> None:
    """Asserts that it is a `Value`, all the way down."""
    todo = [value]
    while todo:
        match todo.pop():
            case None | bool() | int() | float() | str() | bytes() | np.ndarray() | np.generic():
                pass
            case list() as items:
                todo += items
            case dict() as items:
                assert all(type(key) is str for key in items), items.keys()
                todo += items.values()
            case other:
                raise AssertionError(f"{type(other)} is no value")


def settlements(messages: Sequence[Any]) -> tuple[dict[int, Any], dict[int, list[Any]]]:
    """Of each id: the first message that settles it, and the events before."""
    settled: dict[int, Any] = {}
    events: dict[int, list[Any]] = {}
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("id"), int):
            continue
        if "event" in message and message["id"] not in settled:
            events.setdefault(message["id"], []).append(message["event"])
        elif "event" not in message:
            settled.setdefault(message["id"], message)
    return settled, events


def check_answers(calls: Sequence[Call], requests: Sequence[dict[str, Any]], messages: list[Any]) -> None:
    """Asserts that whoever got an answer got its own."""
    settled, events = settlements(messages)
    for call in calls:
        ids = [request["id"] for request in requests if call.is_mine(request)]
        if call.heard:
            sent = events.get(ids[0], [])[: len(call.heard)]
            assert wire.pack(call.heard) == wire.pack(sent), (call.heard, sent)
        if call.task.cancelled():
            continue
        error = call.task.exception()
        if error is not None:
            assert isinstance(error, RolloutError), repr(error)
            assert type(error) in (GuestError, EnvError)
            assert len(error.message) < 4000
            assert error.message.isprintable(), error.message
        elif ids:
            answers = [settled[each]["ok"] for each in ids]  # nothing else makes a call succeed
            expected = call.rebuild(answers)
            if expected is not None:
                assert is_same(call.task.result(), expected), (call.task.result(), expected)


async def pause() -> None:
    """Lets everybody go on."""
    for _ in range(PAUSE_TURNS):
        await asyncio.sleep(0)


async def say(script: Script, channel: Channel, client: GuestClient, guest: Guest, calls: list[Call]) -> None:
    """Plays the guest, until the script or the channel ends."""
    size = CHUNK_BYTES[script.number() % len(CHUNK_BYTES)]
    while script.has_more and channel.is_open:
        tag = script.number()
        said = words(tag, script, calls)
        guest.sent += said
        if len(said) > 1 << 16:
            size = max(size, 4096)
        for start in range(0, len(said), size):
            if channel.is_open:
                client.data_received(said[start : start + size])
                assert client._decoder.num_buffered_bytes <= MAX_FRAME_BYTES + 4 + size
        if not tag & 0x80:
            await pause()


def words(tag: int, script: Script, calls: list[Call]) -> bytes:
    """The next thing that the guest sends, if it is its turn."""
    match tag % 6:
        case 0:
            return script.piece()
        case 1:
            return framed(script.piece())
        case 2 | 3:
            key = (b"\xa2ok", b"\xa5event", b"\xa5error")[script.number() % 3]
            return framed(b"\x82\xa2id" + msgpack.packb(script.number()) + key + script.piece())
        case 4:
            head, unit, tail, count = script.piece(), script.piece(), script.piece(), script.number(2)
            return framed((head + unit * (count << 4) + tail)[: MAX_FRAME_BYTES + 1])
        case _:
            calls[script.number() % len(calls)].task.cancel()
            return b""


def framed(payload: bytes) -> bytes:
    """With its length in front."""
    return len(payload).to_bytes(4, "big") + payload


async def play(data: bytes) -> None:
    """One input."""
    script = Script(data)
    client = GuestClient(max_frame_bytes=MAX_FRAME_BYTES)
    client._max_frame_bytes = 16 << 20  # what the host sends is not in question
    channel = Channel(client)
    client.connection_made(channel)
    sandbox, guest = Sandbox(client), Guest()
    kinds = script.take(1 + script.number() % MOST_CALLS) or b"\0"
    calls = [begin(kind, number, client, sandbox) for number, kind in enumerate(kinds)]
    await pause()
    await say(script, channel, client, guest, calls)
    await pause()
    channel.abort()
    done, late = await asyncio.wait([call.task for call in calls], timeout=DEADLINE_S)
    assert not late, f"{len(late)} calls of {len(done) + len(late)} still wait for a guest that is gone"
    await asyncio.wait_for(client.close(), DEADLINE_S)
    assert client.failure is not None
    assert client.num_pending == len(client._handlers) == 0
    messages = guest.messages()
    for message in messages:
        check_value(message)
    check_answers(calls, channel.requests, messages)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:
        await asyncio.wait(left, timeout=DEADLINE_S)
    assert not [task for task in left if not task.done()], "something still waits"


LOOP = asyncio.new_event_loop()
complaints: list[dict[str, Any]] = []
LOOP.set_exception_handler(lambda _, context: complaints.append(context))


def target(data: bytes) -> None:
    """One input, and the folder that downloads go to."""
    complaints.clear()
    SCRATCH.mkdir(exist_ok=True)
    with Growth(MAX_GROWTH_BYTES):
        LOOP.run_until_complete(play(data))
    assert not complaints, complaints
    made = list(SCRATCH.iterdir())
    assert all(path.name.startswith("call-") for path in made), made
    if made:
        shutil.rmtree(SCRATCH)


if __name__ == "__main__":
    fuzz(target, seeds())
