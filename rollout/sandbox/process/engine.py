"""The process engine: sandboxes are processes in Linux namespaces, checkpoints are frozen ones.

Forking copies page tables, not memory, so a clone costs what its process has resident (about 15 ms a GB) and
then what it changes. How the pieces fit together is told in `rollout.sandbox.process.keeper`.

Invariants, beside those of the contract:

- All processes of an engine are below one bubblewrap, which ends with this process or before it; nothing of
  an engine lies on a disk.
- A clone whose handshake fails is killed, and so are all that were forked with it.

Not guaranteed: protection from a guest that finds a hole in this machine's kernel, which it shares. Processes
that the environment or a command left running are not part of a checkpoint: saving is refused while there
are any.
"""

from __future__ import annotations

import asyncio
import itertools
import platform
import secrets
import socket
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rollout.config import EngineConfig
from rollout.errors import (
    BootError,
    CapacityError,
    CheckpointError,
    ForkError,
    GuestError,
    RolloutError,
)
from rollout.sandbox.base import Capabilities, Checkpoint, PhaseTimings
from rollout.sandbox.client import GuestClient
from rollout.sandbox.process.connection import ServerConnection
from rollout.sandbox.process.packets import MAX_DESCRIPTORS
from rollout.sandbox.process.sandbox import ProcessSandbox
from rollout.sandbox.process.walls import Limits
from rollout.types import Randomness

__all__ = ["ProcessEngine"]

_ENGINE = "process"
_NOTES = (
    "a checkpoint is refused while background processes, threads, sockets, pipes or shared memory are in use",
    "the limit of memory holds for each process, not for a sandbox as a whole",
    "files are in memory, and only the private folder (home, /tmp, /dev/shm) can be written",
    "there are no pseudo-terminals and no network but a loopback of its own",
    "hibernating frees processes, not memory",
)


class ProcessEngine:
    """See the module.

    Args:
        config: Deadlines and limits.
        scratch_dir: Not used: nothing of this engine lies on a disk. Taken for the sake of one signature.
        limits: Of every sandbox; from `config` if None.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        scratch_dir: Path | None = None,
        *,
        limits: Limits | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        memory_bytes = self.config.memory_mib << 20
        self._limits = limits or Limits(memory_bytes, folder_bytes=memory_bytes, file_bytes=memory_bytes)
        self._python_path = tuple(Path(folder).absolute() for folder in self.config.python_path)
        self._fingerprint = f"{platform.machine()} python-{platform.python_version()} {secrets.token_hex(8)}"
        self._timings = PhaseTimings()
        self._server: ServerConnection | None = None
        self._starting = asyncio.Lock()
        self._closing: asyncio.Task[None] | None = None
        self._sandboxes: dict[str, ProcessSandbox] = {}
        self._num_expected = 0
        self._names = itertools.count(1)
        self._checkpoint_ids = itertools.count(1)
        self._generations: dict[str, int] = {}

    @property
    def capabilities(self) -> Capabilities:
        """What it offers on this machine."""
        return Capabilities(
            engine=_ENGINE,
            wall="user, pid, mount, network, ipc and uts namespaces, no capabilities, a system-call filter",
            trusted_only=False,
            forks_background_processes=False,
            isolates_files=True,
            survives_host_restart=False,
            limits=("memory", "processes", "file size", "files", "disk"),
            notes=_NOTES,
        )

    @property
    def timings(self) -> PhaseTimings:
        """Where its time went since it was made."""
        return self._timings

    @property
    def num_sandboxes(self) -> int:
        """Live sandboxes."""
        return len(self._sandboxes)

    @property
    def server_pid(self) -> int | None:
        """Process id of the outermost process below this one; None before the first boot."""
        return None if self._server is None else self._server.pid

    async def boot(self, image: str = "") -> ProcessSandbox:
        """Makes a fresh sandbox: the agent, and nothing imported that it does not need.

        Args:
            image: Ignored: sandboxes see this machine's own Python.

        Raises:
            BootError: This machine lacks what the engine needs, or it did not come up in time.
            CapacityError: There is no room.
        """
        self._refuse_if_closed(BootError)
        with self._room(1), self.timed("start"):
            await self._start_server()
            try:
                (sandbox,) = await self._make(None, [Randomness()], self.config.boot_timeout_s)
            except ForkError as error:
                raise BootError(error.message, retryable=error.retryable) from error
        return sandbox

    async def fork(
        self, checkpoint: Checkpoint, n: int = 1, *, randomness: Sequence[Randomness] | None = None
    ) -> list[ProcessSandbox]:
        """Makes exactly n clones, or none and an error; see `Engine.fork`.

        Raises:
            ValueError: n is less than 1, or not the number of policies.
        """
        self._refuse_if_closed(ForkError)
        self._refuse_foreign(checkpoint)
        if n < 1 or (randomness is not None and len(randomness) != n):
            raise ValueError(f"{n} clones with {n if randomness is None else len(randomness)} policies")
        with self._room(n):
            policies = [Randomness()] * n if randomness is None else list(randomness)
            return await self._make(checkpoint, policies, self.config.fork_timeout_s)

    async def rebase(self, checkpoint: Checkpoint) -> None:
        """See `Engine.rebase`; a fork shares all memory with its checkpoint already."""

    async def discard(self, checkpoint: Checkpoint) -> None:
        """Frees what a checkpoint holds; see `Engine.discard`."""
        if checkpoint.fingerprint == self._fingerprint and self._is_up:
            try:
                await self.ask("discard", checkpoints=[checkpoint.id])
            except GuestError:  # the server has ended meanwhile, and every checkpoint with it
                return

    async def close(self) -> None:
        """Kills every sandbox and frees every checkpoint; see `Engine.close`."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- for this engine's sandboxes

    def new_checkpoint_id(self) -> str:
        """A name that no other checkpoint has."""
        return f"{self._fingerprint[-16:]}-{next(self._checkpoint_ids)}"

    def checkpoint_value(self, checkpoint_id: str, parent_id: str | None, private_bytes: int) -> Checkpoint:
        """The value for a checkpoint of this engine."""
        return Checkpoint(checkpoint_id, parent_id, _ENGINE, self._fingerprint, "", private_bytes)

    async def ask(self, op: str, **arguments: object) -> Any:
        """Asks the fork server.

        Raises:
            RolloutError: It refused, or has ended.
        """
        if self._server is None:
            raise GuestError("the fork server is not running")
        return await self._server.send(op, (), **arguments)

    def forget(self, sandbox: ProcessSandbox) -> None:
        """A sandbox is about to end."""
        self._sandboxes.pop(sandbox.id, None)

    @contextmanager
    def timed(self, phase: str) -> Generator[None]:
        """Counts one call of a phase, and its time."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self._timings.add(phase, time.perf_counter() - began_s)

    async def shake_hands(self, sandbox: ProcessSandbox, randomness: Randomness, timeout_s: float) -> None:
        """Has a sandbox confirm its identity and its randomness.

        Raises:
            GuestError: It did not.
        """
        generation = int(sandbox.id.rpartition("-")[2])
        with self.timed("handshake"):
            await sandbox.client.hello(generation, randomness, hostname=sandbox.id, timeout_s=timeout_s)

    # --- inside

    @property
    def _is_up(self) -> bool:
        return self._server is not None and self._server.failure is None

    def _refuse_if_closed(self, kind: type[RolloutError]) -> None:
        if self._closing is not None:
            raise kind("the engine is closed")

    def _refuse_foreign(self, checkpoint: Checkpoint) -> None:
        if checkpoint.engine != _ENGINE:
            raise CheckpointError(
                f"the checkpoint {checkpoint.id} is of the {checkpoint.engine} engine, not process"
            )
        if checkpoint.fingerprint != self._fingerprint:
            raise CheckpointError(
                f"the checkpoint {checkpoint.id} is of another process engine, and ended with its processes"
            )

    @contextmanager
    def _room(self, n: int) -> Generator[None]:
        """Reserves room for sandboxes while they are made.

        Raises:
            CapacityError: There is none.
        """
        limit = self.config.max_sandboxes
        if len(self._sandboxes) + self._num_expected + n > limit:
            raise CapacityError(
                f"{n} more sandboxes would be more than {limit} (engine.max_sandboxes)", retryable=True
            )
        self._num_expected += n
        try:
            yield
        finally:
            self._num_expected -= n

    async def _start_server(self) -> None:
        async with self._starting:
            if self._server is None:
                self._server = await ServerConnection.start(
                    self._limits,
                    self._python_path,
                    timeout_s=self.config.boot_timeout_s,
                    on_ended=self._on_sandbox_ended,
                )

    def _on_sandbox_ended(self, name: str, reason: str) -> None:
        sandbox = self._sandboxes.get(name)
        if sandbox is not None:
            sandbox.client.fail(GuestError(f"the sandbox {name} has ended: {reason}", retryable=True))

    async def _make(
        self, checkpoint: Checkpoint | None, policies: Sequence[Randomness], timeout_s: float
    ) -> list[ProcessSandbox]:
        """Makes sandboxes and shakes hands with all; kills all if one fails."""
        made: list[ProcessSandbox] = []
        parent_id = None if checkpoint is None else checkpoint.id
        try:
            async with asyncio.timeout(timeout_s):
                for start in range(0, len(policies), MAX_DESCRIPTORS):
                    await self._make_some(
                        parent_id, policies[start : start + MAX_DESCRIPTORS], made, timeout_s
                    )
        except BaseException as error:
            for sandbox in made:
                await sandbox.kill()
            if isinstance(error, TimeoutError):
                raise ForkError(
                    f"{len(policies)} clones were not ready within {timeout_s:g} s", retryable=True
                ) from None
            if isinstance(error, GuestError):
                raise ForkError(error.message, retryable=True) from error
            if isinstance(error, OSError):
                raise ForkError(f"{len(policies)} clones cannot be made: {error}", retryable=True) from error
            raise
        return made

    async def _make_some(
        self,
        parent_id: str | None,
        policies: Sequence[Randomness],
        made: list[ProcessSandbox],
        timeout_s: float,
    ) -> None:
        """Makes sandboxes of one request, and adds them to `made` before anything can fail."""
        if self._server is None:
            raise GuestError("the fork server is not running")
        names = [f"sandbox-{next(self._names)}" for _ in policies]
        theirs: list[socket.socket] = []
        new: list[ProcessSandbox] = []
        try:
            for name in names:
                ours, channel = socket.socketpair()
                theirs.append(channel)
                sandbox = ProcessSandbox(self, name, parent_id, await GuestClient.connect(ours))
                self._sandboxes[name] = sandbox
                new.append(sandbox)
                made.append(sandbox)
            with self.timed("restore"):
                forked = self._server.send(
                    "fork", [end.fileno() for end in theirs], checkpoint=parent_id, sandboxes=names
                )
        finally:
            for end in theirs:
                end.close()
        try:
            # the handshakes wait in the channels until the clones are there
            await asyncio.gather(
                *(self.shake_hands(*pair, timeout_s) for pair in zip(new, policies, strict=True))
            )
        except GuestError:
            await forked  # knows better why
            raise
        await forked

    async def _close(self) -> None:
        if self._starting.locked():
            async with self._starting:
                pass
        for sandbox in list(self._sandboxes.values()):
            await sandbox.client.close()
        if self._server is not None:
            await self._server.close()
        for sandbox in list(self._sandboxes.values()):
            await sandbox.kill()
