"""Commands in the guest: run to their end, or in the background with their output streamed.

| operation | arguments | answer |
|---|---|---|
| `exec` | argv, stdin, timeout_s, cwd, env, max_output_bytes, stream = false | the result |
| `spawn` | as `exec`, and keep_stdin_open = false | command (its number), pid |
| `wait` | command, stream = false | the result; the command is then forgotten |
| `signal` | command, signal | null; the whole process group gets it |
| `cancel` | call | null; kills the group of the command that this call waits for, if there is one |
| `write_stdin` | command, data, close = false | null |
| `commands` | | a list of command, argv, pid, running |

A result is exit_code (-N after signal N), stdout, stderr, stdout_truncated, stderr_truncated, timed_out,
duration_s. With `stream`, output comes as events `{"stdout": bytes}` and `{"stderr": bytes}` before the
result, whose own output is then empty; whoever streams is slowed down to what the host reads.

Each command is the leader of a session and a process group of its own. Its time limit kills the group. A
command has ended when its leader has; what it left in the background goes on, no longer heard.
"""

from __future__ import annotations

import signal
from typing import Final, cast

from rollout.errors import GuestError
from rollout.sandbox.agent import DEFERRED, Agent, Args, Call, Deferred
from rollout.sandbox.agent_args import argument, argument_or, optional_argument
from rollout.sandbox.agent_command import Command, CommandSpec
from rollout.types import Value

__all__ = ["DEFAULT_MAX_OUTPUT_BYTES", "MAX_COMMANDS", "MAX_OUTPUT_BYTES", "Commands"]

DEFAULT_MAX_OUTPUT_BYTES: Final = 1 << 20
MAX_OUTPUT_BYTES: Final = 24 << 20
"""Most of each of stdout and stderr that a command may ask to be kept: both must fit one frame."""
MAX_COMMANDS: Final = 1024
"""Commands that have not been waited for; no more are started."""


class Commands:
    """The commands of one agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._commands: dict[int, Command] = {}
        self._last_number = 0

    def register(self) -> None:
        """Makes the agent serve the operations of this module."""
        self._agent.register("exec", self._exec)
        self._agent.register("spawn", self._spawn)
        self._agent.register("wait", self._wait)
        self._agent.register("signal", self._signal)
        self._agent.register("cancel", self._cancel)
        self._agent.register("write_stdin", self._write_stdin)
        self._agent.register("commands", self._list)
        self._agent.on_close(self._kill_all)
        self._agent.on_fork(self._let_go)

    def _exec(self, call: Call, args: Args) -> Deferred:
        command = self._start(args, keep_stdin_open=False)
        command.attach(call, stream=argument_or(args, "stream", bool, False), on_waited=self._forget)
        return DEFERRED

    def _spawn(self, call: Call, args: Args) -> Value:
        command = self._start(args, keep_stdin_open=argument_or(args, "keep_stdin_open", bool, False))
        return {"command": command.number, "pid": command.pid}

    def _wait(self, call: Call, args: Args) -> Deferred:
        command = self._find(args)
        command.attach(call, stream=argument_or(args, "stream", bool, False), on_waited=self._forget)
        return DEFERRED

    def _signal(self, call: Call, args: Args) -> Value:
        command = self._find(args)
        number = argument(args, "signal", int)
        if number not in signal.valid_signals():
            raise GuestError(f"there is no signal {number}")
        command.send_signal(number)
        return None

    def _cancel(self, call: Call, args: Args) -> Value:
        call_id = argument(args, "call", int)
        for command in self._commands.values():
            if command.is_awaited_by(call_id):
                command.send_signal(signal.SIGKILL)
        return None

    def _write_stdin(self, call: Call, args: Args) -> Value:
        command = self._find(args)
        command.write_stdin(
            argument_or(args, "data", bytes, b""), close=argument_or(args, "close", bool, False)
        )
        return None

    def _list(self, call: Call, args: Args) -> Value:
        return [command.describe() for command in self._commands.values()]

    def _start(self, args: Args, *, keep_stdin_open: bool) -> Command:
        if len(self._commands) >= MAX_COMMANDS:
            raise GuestError(f"{MAX_COMMANDS} commands have not been waited for", retryable=True)
        self._last_number += 1
        command = Command(self._agent.loop, self._last_number, _spec(args, keep_stdin_open))
        self._commands[command.number] = command
        return command

    def _find(self, args: Args) -> Command:
        number = argument(args, "command", int)
        if number not in self._commands:
            raise GuestError(f"there is no command {number}, or it has been waited for")
        return self._commands[number]

    def _forget(self, command: Command) -> None:
        self._commands.pop(command.number, None)

    def _kill_all(self) -> None:
        for command in self._commands.values():
            command.kill()
        self._commands.clear()

    def _let_go(self) -> None:
        for command in self._commands.values():
            command.let_go()
        self._commands.clear()


def _spec(args: Args, keep_stdin_open: bool) -> CommandSpec:
    argv = cast("list[object]", argument(args, "argv", list))
    if not argv or not all(isinstance(part, str) for part in argv):
        raise GuestError("argv must be a list of text, and not empty")
    env = cast("dict[object, object]", argument_or(args, "env", dict, {}))
    if not all(isinstance(part, str) for pair in env.items() for part in pair):
        raise GuestError("env must map text to text")
    max_output_bytes = argument_or(args, "max_output_bytes", int, DEFAULT_MAX_OUTPUT_BYTES)
    if not 0 <= max_output_bytes <= MAX_OUTPUT_BYTES:
        raise GuestError(f"max_output_bytes must be from 0 to {MAX_OUTPUT_BYTES}")
    return CommandSpec(
        argv=cast("list[str]", argv),
        stdin=argument_or(args, "stdin", bytes, b""),
        timeout_s=optional_argument(args, "timeout_s", float),
        cwd=optional_argument(args, "cwd", str),
        env=cast("dict[str, str]", env),
        max_output_bytes=max_output_bytes,
        keep_stdin_open=keep_stdin_open,
    )
