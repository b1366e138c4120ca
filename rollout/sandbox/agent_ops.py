"""The operations that every guest agent serves: handshake, files, environment, commands.

| operation | arguments | answer |
|---|---|---|
| `hello` | generation, entropy (32 bytes), wall_time_s, hostname, policy, seed | generation, protocol |
| `ping` | | null |
| `read_file` | path, offset = 0, max_bytes | data, eof |
| `write_file` | path, data, mode, append = false | null |
| `env.*` | see `rollout.sandbox.guest_ops` | |
| `exec`, `spawn`, `wait`, `signal`, `write_stdin`, `commands` | see `rollout.sandbox.agent_exec` | |

Arguments without a value above are optional if their default is given or their type admits null.
"""

from __future__ import annotations

import gc
import os
import stat
from collections.abc import Callable

from rollout.errors import GuestError
from rollout.sandbox import agent_machine, guest_rng
from rollout.sandbox.agent import PROTOCOL, Agent, Args, Call, Handler
from rollout.sandbox.agent_args import argument, argument_or
from rollout.sandbox.agent_exec import Commands
from rollout.sandbox.guest_env import GuestEnv
from rollout.sandbox.guest_ops import ENV_OPERATIONS
from rollout.types import RngPolicy, Value

__all__ = ["MAX_CHUNK_BYTES", "register_operations"]

MAX_CHUNK_BYTES = 16 << 20
"""Most bytes of a file in one request or reply."""
_ENTROPY_BYTES = 32


def register_operations(agent: Agent, *, machine: bool = False) -> GuestEnv:
    """Makes an agent serve all operations of this module, with one environment, which is returned."""
    env = GuestEnv(seeds_globals=True)
    agent.register("hello", lambda call, args: _hello(call, env, args, machine=machine))
    agent.register("ping", lambda _, args: None)
    agent.register("read_file", _read_file)
    agent.register("write_file", _write_file)
    for op, operation in ENV_OPERATIONS.items():
        agent.register(op, _on_env(operation, env))
    agent.register("env.make", lambda call, args: _make_env(env, args))
    Commands(agent).register()
    return env


def _on_env(operation: Callable[[GuestEnv, Args], Value], env: GuestEnv) -> Handler:
    return lambda call, args: operation(env, args)


def _make_env(env: GuestEnv, args: Args) -> Value:
    value = ENV_OPERATIONS["env.make"](env, args)
    # What was imported for it stays: no later collection looks at it, and so writes to its pages.
    gc.collect()
    gc.freeze()
    return value


def _hello(call: Call, env: GuestEnv, args: Args, *, machine: bool) -> Value:
    generation = argument(args, "generation", int)
    entropy = argument(args, "entropy", bytes)
    if len(entropy) != _ENTROPY_BYTES:
        raise GuestError(f"a handshake brings {_ENTROPY_BYTES} bytes of entropy, not {len(entropy)}")
    try:
        policy = RngPolicy(argument(args, "policy", str))
    except ValueError as error:
        raise GuestError(f"unknown randomness policy: {error}") from error
    seed = argument(args, "seed", int) if policy is RngPolicy.SEEDED else None
    if machine:
        wall_time_s = argument(args, "wall_time_s", float)
        agent_machine.take_identity(entropy, wall_time_s, argument(args, "hostname", str))
    if policy is not RngPolicy.INHERIT:
        new_seed = guest_rng.seed_from_entropy(entropy) if seed is None else seed
        env.reseed(new_seed)
    call.take_over()
    return {"generation": generation, "protocol": PROTOCOL}


def _read_file(call: Call, args: Args) -> Value:
    path = argument(args, "path", str)
    offset = argument_or(args, "offset", int, 0)
    max_bytes = argument_or(args, "max_bytes", int, MAX_CHUNK_BYTES)
    if offset < 0 or not 0 < max_bytes <= MAX_CHUNK_BYTES:
        raise GuestError(f"offset {offset} and max_bytes {max_bytes} are out of range")
    try:
        # a named pipe would block the agent
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise GuestError(f"cannot read {path!r}: not a regular file")
            file.seek(offset)
            data = file.read(max_bytes)
            return {"data": data, "eof": len(data) < max_bytes}
    except (OSError, ValueError) as error:
        raise GuestError(f"cannot read {path!r}: {_reason(error)}") from error


def _write_file(call: Call, args: Args) -> Value:
    path = argument(args, "path", str)
    data = argument(args, "data", bytes)
    mode = argument_or(args, "mode", int, 0o644)
    append = argument_or(args, "append", bool, False)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_APPEND if append else os.O_TRUNC)
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)  # noqa: PTH103, PTH120
        fd = os.open(path, flags, mode & 0o7777)
        with os.fdopen(fd, "wb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise GuestError(f"cannot write {path!r}: not a regular file")
            file.write(data)
            os.fchmod(fd, mode & 0o7777)  # whatever the mask and the mode of an existing file
    except (OSError, ValueError) as error:
        raise GuestError(f"cannot write {path!r}: {_reason(error)}") from error
    return None


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
