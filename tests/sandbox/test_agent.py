"""The guest agent, as a process of its own: it survives what hosts, commands and environments do to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from agent_process import agent_client, agent_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout.errors import EnvError, GuestError
from rollout.sandbox import wire
from rollout.sandbox.agent import Agent
from rollout.sandbox.agent_ops import register_operations
from rollout.sandbox.client import GuestClient
from rollout.sandbox.wire import MAX_FRAME_BYTES, FrameDecoder
from rollout.types import Randomness, RngPolicy

NO_ARGS: dict[str, Any] = {}


def ask(channel: socket.socket, *frames: bytes, answers: int) -> list[Any]:
    """Sends frames and waits for a number of answers."""
    channel.settimeout(20)
    for frame in frames:
        channel.sendall(frame)
    decoder = FrameDecoder()
    received: list[Any] = []
    while len(received) < answers:
        data = channel.recv(1 << 16)
        assert data, f"the agent has closed the channel after {received}"
        received += decoder.feed(data)
    return received


def ping(request_id: int) -> bytes:
    return wire.frame({"id": request_id, "op": "ping", "args": {}})


async def gone(pid: int) -> None:
    """Waits until a process has ended; one that was killed takes a moment."""
    async with asyncio.timeout(20):
        with contextlib.suppress(psutil.NoSuchProcess):
            while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                await asyncio.sleep(0.01)


PONG = {"id": 7, "ok": None}


BAD_FRAMES = [
    b"\x00\x00\x00\x00",
    b"\x00\x00\x00\x01\xc1",
    wire.frame(None),
    wire.frame([1, 2]),
    wire.frame({"id": 1}),
    wire.frame({"id": "1", "op": "ping", "args": {}}),
    wire.frame({"id": True, "op": "ping", "args": {}}),
    wire.frame({"id": 1, "op": None, "args": {}}),
    wire.frame({"id": 1, "op": "ping", "args": []}),
    struct.pack(">I", MAX_FRAME_BYTES + 1) + bytes(MAX_FRAME_BYTES + 1),
]


async def test_a_bad_frame_costs_one_error_reply() -> None:
    async with agent_process() as agent:
        for bad in BAD_FRAMES:
            refused, answered = await asyncio.to_thread(ask, agent.channel, bad, ping(7), answers=2)
            assert refused["id"] is None, bad[:40]
            assert refused["error"]["type"] == "GuestError"
            assert answered == PONG


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    frames=st.lists(
        st.binary(max_size=60).map(lambda data: struct.pack(">I", len(data)) + data)
        | st.fixed_dictionaries(
            {"id": st.integers(), "op": st.text(max_size=3), "args": st.dictionaries(st.text(), st.none())}
        ).map(lambda request: wire.frame({**request, "id": request["id"] % 1000})),
        max_size=10,
    )
)
def test_any_frames_are_answered_each(frames: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            agent = Agent(theirs.fileno(), theirs.fileno())
            register_operations(agent)
            agent.serve()
        finally:
            os._exit(0)
    theirs.close()
    try:
        with ours:
            answers = ask(ours, *frames, ping(7), answers=len(frames) + 1)
            assert answers[-1] == PONG
            assert all("error" in answer for answer in answers[:-1])
    finally:
        assert os.waitpid(pid, 0) == (pid, 0)  # it ended because the host closed the channel


BAD_REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("no.such.op", NO_ARGS),
    ("hello", NO_ARGS),
    ("hello", {"generation": 1, "entropy": b"short", "policy": "unique"}),
    ("hello", {"generation": 1, "entropy": bytes(32), "policy": "sometimes"}),
    ("hello", {"generation": 1, "entropy": bytes(32), "policy": "seeded", "seed": None}),
    ("exec", NO_ARGS),
    ("exec", {"argv": []}),
    ("exec", {"argv": "ls"}),
    ("exec", {"argv": ["echo", 1]}),
    ("exec", {"argv": ["no-such-program"]}),
    ("exec", {"argv": ["/"]}),
    ("exec", {"argv": ["a\x00b"]}),
    ("exec", {"argv": ["true"], "cwd": "/no/such"}),
    ("exec", {"argv": ["true"], "env": {"a": 1}}),
    ("exec", {"argv": ["true"], "stdin": "text"}),
    ("exec", {"argv": ["true"], "timeout_s": "1"}),
    ("exec", {"argv": ["true"], "max_output_bytes": -1}),
    ("exec", {"argv": ["true"], "max_output_bytes": 1 << 30}),
    ("wait", {"command": 1}),
    ("signal", {"command": 1, "signal": 9}),
    ("write_stdin", {"command": 1}),
    ("read_file", {"path": 1}),
    ("read_file", {"path": "/no/such"}),
    ("read_file", {"path": "/"}),
    ("read_file", {"path": "/dev/zero"}),
    ("read_file", {"path": "a\x00b"}),
    ("read_file", {"path": "/etc/passwd", "offset": -1}),
    ("read_file", {"path": "/etc/passwd", "max_bytes": 0}),
    ("write_file", {"path": "/dev/null", "data": b""}),
    ("write_file", {"path": "/", "data": b""}),
    ("write_file", {"path": "/proc/none/x", "data": b""}),
    ("write_file", {"path": "/etc/passwd/x", "data": b""}),
    ("env.make", NO_ARGS),
    ("env.make", {"env_id": "FrozenLake-v1", "kwargs": []}),
    ("env.playout", {"horizon": True, "seed": 1}),
]


async def test_bad_requests_are_refused_and_the_agent_goes_on() -> None:
    async with agent_client() as (client, _):
        for op, args in BAD_REQUESTS:
            with pytest.raises(GuestError):
                pytest.fail(f"{op} {args} was answered {await client.call(op, args, timeout_s=20)}")
            assert client.failure is None, (op, args)
        assert await client.call("ping", timeout_s=20) is None


async def test_a_named_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    async with agent_client() as (client, _):
        for call in (
            client.read_file(str(tmp_path / "pipe")),
            client.write_file(str(tmp_path / "pipe"), b""),
        ):
            with pytest.raises(GuestError):
                await call


async def test_commands_overlap_with_other_calls() -> None:
    async with agent_client() as (client, _):
        sleeping = asyncio.ensure_future(client.exec(["sleep", "600"]))
        short = [client.exec(["sh", "-c", f"cat; exit {n}"], stdin=bytes([n])) for n in range(8)]
        results = await asyncio.gather(*short)
        assert [(result.exit_code, result.stdout) for result in results] == [
            (n, bytes([n])) for n in range(8)
        ]
        assert not sleeping.done()
        sleeping.cancel()
        await asyncio.wait([sleeping])


async def test_a_cancelled_command_is_killed_and_a_cancelled_wait_kills_too() -> None:
    async with agent_client() as (client, _):
        running = asyncio.ensure_future(client.exec(["sleep", "600"]))
        started: Any = await client.call("spawn", {"argv": ["sleep", "600"]}, timeout_s=20)
        waiting = asyncio.ensure_future(client.call("wait", {"command": started["command"]}, timeout_s=20))
        while len(listed := await client.call("commands", timeout_s=20)) < 2:  # type: ignore[arg-type]
            await asyncio.sleep(0.01)
        for call in (running, waiting):
            call.cancel()
        await asyncio.wait([running, waiting])
        for line in listed:  # type: ignore[union-attr]
            await gone(line["pid"])  # type: ignore[index,call-overload,arg-type]
        assert await client.call("commands", timeout_s=20) == []
        assert client.failure is None


async def test_a_command_that_ignores_its_input_and_one_that_floods() -> None:
    async with agent_client() as (client, _):
        deaf = await client.exec(["true"], stdin=bytes(1 << 20))
        assert deaf.exit_code == 0
        flood = await client.exec(["head", "-c", "50000000", "/dev/zero"], max_output_bytes=1000)
        assert (len(flood.stdout), flood.stdout_truncated, flood.exit_code) == (1000, True, 0)


async def test_a_background_process_neither_delays_the_result_nor_ends_with_it() -> None:
    async with agent_client() as (client, agent):
        script = "sleep 600 & echo $!"
        done = await client.exec(["sh", "-c", script], timeout_s=20)
        assert not done.timed_out
        left = psutil.Process(int(done.stdout))
        assert left.is_running()
        left.kill()
        assert await client.call("ping", timeout_s=20) is None
        assert agent.process.poll() is None


async def test_the_time_limit_ends_the_whole_group() -> None:
    async with agent_client() as (client, _):
        script = "sleep 600 & echo $!; wait"
        late = await client.exec(["sh", "-c", script], timeout_s=0.3)
        assert late.timed_out
        assert late.exit_code == -signal.SIGKILL
        await gone(int(late.stdout))


async def test_a_background_command_is_streamed_fed_signalled_and_waited_for() -> None:
    async with agent_client() as (client, _):
        args: dict[str, Any] = {
            "argv": ["sh", "-c", "while read l; do echo got $l; done"],
            "keep_stdin_open": True,
        }
        started: Any = await client.call("spawn", args, timeout_s=20)
        command = started["command"]
        listed: Any = await client.call("commands", timeout_s=20)
        assert [(line["command"], line["running"]) for line in listed] == [(command, True)]
        heard: asyncio.Queue[Any] = asyncio.Queue()
        wait = asyncio.ensure_future(
            client.call("wait", {"command": command, "stream": True}, timeout_s=20, on_event=heard.put_nowait)
        )
        for word in (b"one\n", b"two\n"):
            await client.call("write_stdin", {"command": command, "data": word}, timeout_s=20)
            assert await asyncio.wait_for(heard.get(), 20) == {"stdout": b"got " + word}
        with pytest.raises(GuestError, match="already"):
            await client.call("wait", {"command": command}, timeout_s=20)
        await client.call("signal", {"command": command, "signal": signal.SIGTERM}, timeout_s=20)
        result: Any = await wait
        assert result["exit_code"] == -signal.SIGTERM
        assert result["stdout"] == b""
        with pytest.raises(GuestError, match="no command"):
            await client.call("wait", {"command": command}, timeout_s=20)


async def test_output_kept_before_a_wait_is_not_lost() -> None:
    async with agent_client() as (client, _):
        args: dict[str, Any] = {"argv": ["sh", "-c", "echo kept; exit 4"]}
        started: Any = await client.call("spawn", args, timeout_s=20)
        while any(line["running"] for line in await client.call("commands", timeout_s=20)):  # type: ignore[union-attr,index,call-overload]
            await asyncio.sleep(0.01)
        result: Any = await client.call("wait", {"command": started["command"]}, timeout_s=20)
        assert (result["exit_code"], result["stdout"]) == (4, b"kept\n")


async def test_more_streamed_than_the_host_reads_waits_in_the_pipe_not_in_memory() -> None:
    async with agent_process() as agent:
        request = {"id": 1, "op": "exec", "args": {"argv": ["cat", "/dev/zero"], "stream": True}}
        agent.channel.sendall(wire.frame(request))
        await asyncio.sleep(1.0)
        resident = psutil.Process(agent.process.pid).memory_info().rss
        assert resident < 120 << 20


async def test_commands_end_with_the_channel() -> None:
    async with agent_client() as (client, agent):
        started: Any = await client.call("spawn", {"argv": ["sleep", "600"]}, timeout_s=20)
        await client.close()
        assert await agent.ended() == 0
        await gone(started["pid"])


async def test_what_is_printed_does_not_reach_the_channel(tmp_path: Path) -> None:
    (tmp_path / "noisy_env.py").write_text(NOISY)
    async with agent_client(str(tmp_path)) as (client, agent):
        await client.call("env.make", {"env_id": "noisy_env:Noisy-v0"}, timeout_s=60)
        await client.call("env.reset", {"seed": 1}, timeout_s=20)
        step: Any = await client.call("env.step", {"action": 0}, timeout_s=20)
        assert step["observation"] == 0
        assert step["info"] == {"odd": "<builtins.object>", "big": "<builtins.int>", "pair": [1, 2], "7": 7}
        with pytest.raises(GuestError, match="SystemExit"):
            await client.call("env.step", {"action": 1}, timeout_s=20)
        with pytest.raises(EnvError, match="ZeroDivisionError"):
            await client.call("env.step", {"action": 2}, timeout_s=20)
        assert await client.call("ping", timeout_s=20) is None
        await client.close()
        assert await agent.ended() == 0
        assert agent.process.stdout is not None
        assert agent.process.stdout.read() == b""  # all of it went to standard error


NOISY = """
import os, sys
import gymnasium
from gymnasium import spaces

class Noisy(gymnasium.Env):
    action_space = spaces.Discrete(3)
    observation_space = spaces.Discrete(1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        print("reset", sys.stdin.read())
        os.write(1, b"to standard output")
        os.system("echo from a child")
        return 0, {}

    def step(self, action):
        if action == 1:
            sys.exit(3)
        if action == 2:
            1 / 0
        info = {"odd": object(), "big": 1 << 70, "pair": (1, 2), 7: 7}
        return 0, 0.0, False, False, info

gymnasium.register("Noisy-v0", entry_point=Noisy)
"""


async def test_the_handshake_decides_the_randomness() -> None:
    async def future(client: GuestClient) -> list[Any]:
        steps = [await client.call("env.step", {"action": a}, timeout_s=20) for a in [0, 3] * 5]
        return [step["observation"] for step in steps]  # type: ignore[index,call-overload]

    async with agent_client() as (client, _):
        await client.call("env.make", {"env_id": "FrozenLake-v1"}, timeout_s=60)
        futures: list[Any] = []
        for randomness in (Randomness.seeded(1), Randomness.seeded(1), Randomness(), Randomness()):
            await client.call("env.reset", {"seed": 3}, timeout_s=20)
            await client.hello(1, randomness, hostname="h", timeout_s=20)
            futures.append(await future(client))
        assert futures[0] == futures[1]
        await client.call("env.reset", {"seed": 3}, timeout_s=20)
        plain = await future(client)
        await client.call("env.reset", {"seed": 3}, timeout_s=20)
        await client.hello(2, Randomness(RngPolicy.INHERIT), hostname="h", timeout_s=20)
        assert await future(client) == plain


async def test_after_a_handshake_earlier_calls_are_not_answered() -> None:
    async with agent_process() as agent:
        old = wire.frame({"id": 1, "op": "exec", "args": {"argv": ["sleep", "0.3"]}})
        args = {"generation": 4, "entropy": bytes(32), "policy": "unique", "seed": None}
        hello = wire.frame({"id": 2, "op": "hello", "args": args})
        later = wire.frame({"id": 3, "op": "exec", "args": {"argv": ["sleep", "0.6"]}})
        first, second = await asyncio.to_thread(ask, agent.channel, old, hello, later, answers=2)
        assert (first["id"], second["id"]) == (2, 3)


async def test_an_agent_that_is_killed_is_a_typed_error() -> None:
    async with agent_client() as (client, agent):
        started: Any = await client.call("spawn", {"argv": ["sleep", "600"]}, timeout_s=20)
        call = asyncio.ensure_future(client.call("wait", {"command": started["command"]}, timeout_s=20))
        agent.process.kill()
        with pytest.raises(GuestError):
            await call
        os.kill(started["pid"], signal.SIGKILL)


def test_an_agent_can_fork_and_serve_two_channels() -> None:
    """What the process engine does: the child goes on with the same state on a channel of its own."""
    parent_ours, parent_theirs = socket.socketpair()
    child_ours, child_theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        parent_ours.close()
        child_ours.close()
        _serve_with_fork(parent_theirs, child_theirs)
    parent_theirs.close()
    child_theirs.close()
    make = wire.frame({"id": 1, "op": "env.make", "args": {"env_id": "FrozenLake-v1"}})
    reset = wire.frame({"id": 2, "op": "env.reset", "args": {"seed": 1}})
    running = wire.frame({"id": 3, "op": "exec", "args": {"argv": ["sleep", "0.5"]}})
    fork = wire.frame({"id": 4, "op": "fork", "args": {}})
    with parent_ours, child_ours:
        *_, forked = ask(parent_ours, make, reset, running, fork, answers=3)
        step = wire.frame({"id": 5, "op": "env.step", "args": {"action": 2, "state_hash": True}})
        in_child = ask(child_ours, step, answers=1)
        ended, in_parent = sorted(ask(parent_ours, step, answers=2), key=lambda answer: answer["id"])
        assert in_child == [in_parent]
        assert ended["ok"]["exit_code"] == 0  # the command stayed the parent's
        listed = ask(child_ours, wire.frame({"id": 6, "op": "commands", "args": {}}), answers=1)
        assert listed == [{"id": 6, "ok": []}]
    for each in (pid, forked["ok"]):
        os.waitpid(each, 0)


def _serve_with_fork(channel: socket.socket, for_child: socket.socket) -> None:
    from rollout.sandbox.agent import DEFERRED, Args, Call, Deferred

    agent = Agent(channel.fileno(), channel.fileno())
    register_operations(agent)

    def fork(call: Call, args: Args) -> int | Deferred:
        pid = os.fork()
        if pid:
            for_child.close()
            return pid
        channel.close()
        agent.after_fork(for_child.fileno(), for_child.fileno())
        return DEFERRED

    agent.register("fork", fork)
    try:
        agent.serve()
    finally:
        os._exit(0)


def test_a_port_that_changes_hosts_is_served_on_and_half_a_frame_is_forgotten(tmp_path: Path) -> None:
    """Two named pipes behave as a machine's port does: the end of the stream is a pause."""
    into, out = tmp_path / "in", tmp_path / "out"
    os.mkfifo(into)
    os.mkfifo(out)
    pid = os.fork()
    if pid == 0:
        try:
            read_fd = os.open(into, os.O_RDONLY | os.O_NONBLOCK)
            agent = Agent(read_fd, os.open(out, os.O_RDWR), keep_open=True)
            register_operations(agent)
            agent.register("stop", lambda call, args: agent.stop())
            agent.serve()
        finally:
            os._exit(0)
    try:
        for request_id, op, unfinished in (
            (1, "ping", b"\x00\x00"),
            (2, "ping", b"\x00\x00\x01\x00x"),
            (3, "stop", b""),
        ):
            write_fd, read_fd = os.open(into, os.O_WRONLY), os.open(out, os.O_RDONLY)
            os.write(write_fd, wire.frame({"id": request_id, "op": op, "args": {}}))
            assert FrameDecoder().feed(os.read(read_fd, 1000)) == [{"id": request_id, "ok": None}]
            os.write(write_fd, unfinished)
            os.close(write_fd)
            os.close(read_fd)
            time.sleep(0.5)  # the agent must see the end before the next host comes
    finally:
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
