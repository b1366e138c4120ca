"""A real guest agent in a process of its own, and clients of it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rollout.sandbox.client import GuestClient


class AgentProcess:
    """A running agent and the host's end of its channel."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self.process = process
        self.channel = channel

    async def ended(self) -> int:
        """Its exit code, once it has ended."""
        return await asyncio.to_thread(self.process.wait, 20)


@asynccontextmanager
async def agent_process(cwd: str | None = None) -> AsyncIterator[AgentProcess]:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "rollout.sandbox.agent", "--fd", str(theirs.fileno())]
    fds = [theirs.fileno()]
    process = subprocess.Popen(command, pass_fds=fds, cwd=cwd, stdout=subprocess.PIPE)  # noqa: ASYNC220
    theirs.close()
    try:
        yield AgentProcess(process, ours)
    finally:
        ours.close()  # so that it ends by itself, and its commands with it
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


@asynccontextmanager
async def agent_client(cwd: str | None = None) -> AsyncIterator[tuple[GuestClient, AgentProcess]]:
    async with agent_process(cwd) as agent:
        client = await GuestClient.connect(agent.channel)
        try:
            yield client, agent
        finally:
            await client.close()
