"""What the fuzzing of the guest channel begins with: scripts of guests, good and bad."""

from __future__ import annotations

import gymnasium
import msgpack
import numpy as np
from fuzzing import text_of
from tars import Entry, tar_of

from rollout import spaces
from rollout.sandbox import wire
from rollout.types import Value

__all__ = ["KINDS", "seeds"]

KINDS = (
    *("call", "listen", "hello", "exec", "read_file", "write_file", "spawn", "commands", "wait", "output"),
    *("download", "step", "prepare", "playout"),
)
"""Of calls."""
LISTED = b"\x91\x84\xa7command\x07\xa3pid\x01\xa7running\xc3\xa4argv"
"""A list of one command, up to its arguments."""


def answer(call_id: int, value: Value, key: int = 0, *, at_once: bool = False) -> bytes:
    """What a guest says in answer to a call, as a script."""
    return text_of(0x82 if at_once else 2, key, call_id, wire.pack(value))


DONE: dict[str, Value] = {
    **{"exit_code": 0, "stdout": b"out", "stderr": b"", "duration_s": 0.5, "timed_out": False},
    **{"stdout_truncated": False, "stderr_truncated": False},
}
"""What a guest says of a command that has ended."""


def downloaded(archive: bytes) -> list[bytes]:
    """What a guest says when a folder is fetched, as scripts."""
    said = ({"stderr": b"a complaint"}, {"stdout": archive[:700]}, {"stdout": archive[700:]})
    return [answer(1, {"command": 7, "pid": 1}), *(answer(2, each, 1) for each in said), answer(2, DONE)]


def many(head: bytes, unit: bytes, tail: bytes, count: int) -> bytes:
    """A frame that repeats `unit` 16 times `count` times, as a script."""
    return text_of(4, head, unit, tail) + count.to_bytes(2, "big")


def seeds() -> list[bytes]:
    """A good answer to a call of each kind, and of each way to be a bad guest."""
    step = {"observation": 1, "reward": 0.5, "terminated": False, "truncated": False, "info": {}}
    played = {"value": 1.0, "num_steps": 3, "terminated": True, "truncated": False}
    kinds = [gymnasium.spaces.Discrete(3), gymnasium.spaces.MultiBinary(2), gymnasium.spaces.Box(0, 1, (2,))]
    kinds.append(gymnasium.spaces.Text(5))
    both = gymnasium.spaces.Dict(
        {"a": gymnasium.spaces.Tuple(kinds), "b": gymnasium.spaces.Sequence(kinds[0])}
    )
    described = {"observation_space": spaces.describe(both), "action_space": spaces.describe(kinds[0])}
    made = {**described, "spec_id": "x", "max_episode_steps": 5}
    listed = [{"command": 7, "argv": ["a"], "pid": 1, "running": True}]
    of_kind: dict[str, list[bytes]] = {
        "call": [answer(1, [1, np.zeros(2, np.float32), np.int64(5)])],
        "listen": [answer(1, 1, 1, at_once=True), answer(1, 2, 1), answer(1, None)],
        "hello": [answer(1, {"generation": 0, "protocol": 1})],
        "exec": [answer(1, DONE)],
        "read_file": [answer(1, {"data": b"x" * 100, "eof": False}), answer(2, {"data": b"y", "eof": True})],
        "write_file": [answer(1, None), answer(2, None)],
        "spawn": [answer(1, {"command": 7, "pid": 1})],
        "commands": [answer(1, listed)],
        "wait": [answer(1, DONE)],
        "output": [answer(1, {"stdout": b"a"}, 1), answer(1, {"stderr": b"b"}, 1), answer(1, DONE)],
        "download": downloaded(tar_of([Entry("./call-0", b"content")])),
        "step": [answer(1, step)],
        "prepare": [answer(1, made)],
        "playout": [answer(1, played)],
    }
    found = [text_of(0, KINDS.index(kind), 0) + b"".join(said) for kind, said in of_kind.items()]
    ok = b"\x82\xa2id\x01\xa2ok"
    refused = {"type": "EnvError", "message": "no\n", "retryable": True}
    found += [
        bytes([5, 0, 1, 3, 4, 10, 11, 1]) + answer(2, 5, 1) + answer(1, 1) + answer(3, refused, 2),
        text_of(0, 10, 0) + b"".join(downloaded(bytes(30_000))),
        text_of(0, 0, 3)
        + answer(1, [np.array(["text", "é"]), np.array(["2020-02-02"], "M8[D]"), np.zeros((2, 0))]),
        text_of(0, 0, 0, 0) + b"\x00\x04\x00\x20\x00\x00",
        bytes([1, 0, 0, 0]) + answer(2, "two") + answer(1, "one"),
        bytes([1, 0, 3, 0]) + text_of(5, 1) + answer(2, 1) + answer(1, 1),
        bytes([0, 0, 2]) + text_of(1, msgpack.packb({"id": 1, "ok": 1})),
        bytes([0, 0, 0]) + text_of(0, b"\xff" * 20),
        bytes([0, 0, 0]) + text_of(1, msgpack.packb({"id": None, "error": {"message": "what?"}})),
        bytes([0, 0, 0]) + many(b"\x82\xa2id\x01\xa2ok\xdd\x00\x0f\xff\xf0", b"\x80", b"", 0xFFFF),
        *(bytes([0, 0, 0]) + many(b"", b"\x91", b"\xc0", count) for count in (0x3A, 0x3E, 0xFF)),
        *(bytes([0, kind, 0]) + many(ok, b"\x91", b"\xc0", 0x3E) for kind in range(len(KINDS))),
        bytes([0, 7, 0]) + many(ok + LISTED, b"\x91", b"\xc0", 0x3E),
        bytes([0, 0, 0]) + many(b"\xdb\x00\x0f\xff\xf0", b"\x07", b"", 0xFFFF),
    ]
    return found
