"""A sandbox of the process engine: a player, or the keeper that it left when it parked.

A saved sandbox stays parked until it is used again: a branch that is saved and then released never runs
twice. While it is parked it has no processes but its keeper, which sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

from rollout.errors import CheckpointError, EnvError, ForkError, GuestError, RolloutError
from rollout.sandbox.base import Checkpoint, gone_on
from rollout.sandbox.client import GuestClient
from rollout.sandbox.guest_calls import GuestCalls
from rollout.sandbox.process.gate import Gate
from rollout.types import Randomness, RngPolicy, Value

if TYPE_CHECKING:
    from rollout.sandbox.process.engine import ProcessEngine

__all__ = ["ProcessSandbox"]

_ANSWER_GRACE_S = 3.0
_CONTINUATION = Randomness(RngPolicy.INHERIT)


class ProcessSandbox(GuestCalls):
    """One sandbox; made by `ProcessEngine`.

    Args:
        engine: Its engine.
        name: Its name, unique in the engine.
        parent_id: The checkpoint that it was forked from.
        client: The guest channel; the handshake is the engine's business.
    """

    def __init__(self, engine: ProcessEngine, name: str, parent_id: str | None, client: GuestClient) -> None:
        self._engine = engine
        self._name = name
        self._parent_id = parent_id
        self._client = client
        self._gate = Gate()
        self._num_commands = 0
        self._is_parked = False
        self._private_bytes = 0
        self._saved_as: str | None = None
        self._ending: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        """Unique among the sandboxes of its engine."""
        return self._name

    @property
    def parent_id(self) -> str | None:
        """The checkpoint that it was forked from, or None after a boot."""
        return self._parent_id

    @property
    def client(self) -> GuestClient:
        """The guest channel, for the engine."""
        return self._client

    @property
    def is_dead(self) -> bool:
        """It has ended, or been killed."""
        return self._ending is not None or self._client.failure is not None

    @property
    def call_timeout_s(self) -> float:
        """See `GuestCalls.call_timeout_s`."""
        return self._engine.config.call_timeout_s

    @asynccontextmanager
    async def using(self, phase: str = "commands") -> AsyncGenerator[GuestClient]:
        """See `GuestCommands.using`."""
        is_command = phase == "exec"
        async with self._awake(phase):
            self._num_commands += is_command
            try:
                yield self._client
            finally:
                self._num_commands -= is_command

    def listening(self) -> AbstractAsyncContextManager[GuestClient]:
        """See `GuestCommands.listening`."""
        return self.using("exec")

    def expect_background(self) -> None:
        """See `GuestCommands.expect_background`: only what is saved here is stopped."""

    @property
    def has_ended(self) -> bool:
        """See `GuestCommands.has_ended`."""
        return self.is_dead

    async def checkpoint(self) -> Checkpoint:
        """Saves the sandbox; see `Sandbox.checkpoint`.

        Raises:
            CheckpointError: Something runs or is open that a forked process would not have; the message names
                it, and the sandbox goes on.
            GuestError: The sandbox has ended.
        """
        checkpoint_id = self._engine.new_checkpoint_id()
        with self._engine.timed("checkpoint"):
            await self._park(checkpoint_id)
        self._saved_as = checkpoint_id
        return self._engine.checkpoint_value(checkpoint_id, self._parent_id, self._private_bytes)

    async def take_over(self, randomness: Randomness) -> None:
        """Lets it go on as a clone of its checkpoint would; see `Sandbox.take_over`.

        Costs the fork of a clone as long as the checkpoint is held: its process stays what it is, and a copy
        goes on.

        Raises:
            CheckpointError: It was never saved, or has gone on since.
            ForkError: It could not be woken, or did not confirm its handshake.
            GuestError: The sandbox has ended.
        """
        async with self._gate.alone():
            self._refuse_if_dead()
            if (saved_as := self._saved_as) is None:
                raise gone_on(self._name)
            await self._wake(randomness)
            self._parent_id = saved_as

    async def hibernate(self) -> None:
        """Ends its processes but for the one that holds its memory; see `Sandbox.hibernate`."""
        await self._park(None)

    async def wake(self) -> None:
        """Brings it back; see `Sandbox.wake`."""
        self._refuse_if_dead()
        if self._is_parked:
            async with self._gate.alone():
                await self._wake(_CONTINUATION)

    async def kill(self) -> None:
        """Ends it and frees what it held; see `Sandbox.kill`."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end())
        await asyncio.shield(self._ending)

    @asynccontextmanager
    async def _awake(self, phase: str) -> AsyncGenerator[None]:
        """Use of the guest channel, together with others, of a sandbox that is not parked."""
        while True:
            self._refuse_if_dead()
            if self._is_parked:
                await self.wake()
            async with self._gate.shared():
                if self._is_parked:
                    continue
                with self._engine.timed(phase):
                    try:
                        yield
                    except GuestError:
                        if self._client.failure is not None:
                            await self.kill()  # late or hostile: never used again
                        raise
                return

    def _refuse_if_dead(self) -> None:
        if self._client.failure is not None:
            raise GuestError(f"the sandbox {self._name} has ended: {self._client.failure.message}")
        if self._ending is not None:
            raise GuestError(f"the sandbox {self._name} has been killed")

    async def _park(self, checkpoint_id: str | None) -> None:
        self._refuse_if_dead()
        if self._num_commands:
            raise CheckpointError(
                f"{self._num_commands} commands are running, which the process engine cannot save: wait for "
                "them first, or use the microvm engine"
            )
        timeout_s = self._engine.config.checkpoint_timeout_s
        async with self._gate.alone():
            try:
                async with asyncio.timeout(timeout_s):
                    if not self._is_parked:
                        reply = await self._client.call("process.park", timeout_s=timeout_s)
                        self._is_parked = True
                        self._private_bytes = _private_bytes(reply)
                    await self._save(checkpoint_id)
            except TimeoutError:
                error = self._client.fail(GuestError(f"it did not park within {timeout_s:g} s"))
                raise CheckpointError(f"the sandbox {self._name} cannot be saved: {error.message}") from None
            except (EnvError, GuestError) as error:
                raise CheckpointError(f"the sandbox {self._name} cannot be saved: {error.message}") from error

    async def _save(self, checkpoint_id: str | None) -> None:
        """Has the server keep what is parked; of a request whose answer nobody waits for nothing is left."""
        try:
            await self._engine.ask("save", sandbox=self._name, checkpoint=checkpoint_id)
        except BaseException:
            if checkpoint_id is not None:
                await asyncio.shield(self._discard(checkpoint_id))
            raise

    async def _discard(self, checkpoint_id: str) -> None:
        with contextlib.suppress(GuestError, TimeoutError):  # sent in any case, unless the server has ended
            async with asyncio.timeout(_ANSWER_GRACE_S):
                await self._engine.ask("discard", checkpoints=[checkpoint_id])

    async def _wake(self, randomness: Randomness) -> None:
        """Lets it go on, alone inside the gate; what it was is confirmed by another handshake."""
        if not self._is_parked:
            return
        timeout_s = self._engine.config.fork_timeout_s
        try:
            with self._engine.timed("restore"):
                async with asyncio.timeout(timeout_s):
                    await self._engine.ask("wake", sandbox=self._name)
            await self._engine.shake_hands(self, randomness, timeout_s)
        except (TimeoutError, RolloutError) as error:
            reason = error.message if isinstance(error, RolloutError) else f"not within {timeout_s:g} s"
            self._client.fail(GuestError(f"it could not be woken: {reason}"))
            raise ForkError(
                f"the sandbox {self._name} could not be woken: {reason}", retryable=True
            ) from error
        self._is_parked = False
        self._saved_as = None

    async def _end(self) -> None:
        self._engine.forget(self)
        self._client.fail(GuestError("it has been killed"))
        await self._client.close()
        with contextlib.suppress(GuestError, TimeoutError):  # then the fork server has ended, and all with it
            async with asyncio.timeout(_ANSWER_GRACE_S):
                await self._engine.ask("kill", sandboxes=[self._name])


def _private_bytes(reply: Value) -> int:
    match reply:
        case {"private_bytes": int(private_bytes)} if private_bytes >= 0:
            return private_bytes
        case _:
            raise GuestError("the guest did not say what its memory costs")
