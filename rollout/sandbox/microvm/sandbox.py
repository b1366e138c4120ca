"""One microVM as a `Sandbox`: parked between requests, saved, hibernated, ended.

States: running (requests in flight, or just now), parked (its vCPU is stopped; costs no CPU), hibernated (no
process; its state is a snapshot), dead. A request brings a parked or hibernated sandbox back by itself.

Guest clocks: the monotonic clock stands still while a sandbox is parked, saved or hibernated; the wall clock
is set at every handshake (fork and wake) and lags by the parked time in between.

A save waits until no request is in flight: a clone of a machine that is in the middle of answering would
answer a question that nobody asked it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

from rollout.errors import CheckpointError, ForkError, GuestError, RolloutError
from rollout.sandbox.base import Checkpoint, gone_on
from rollout.sandbox.client import GuestClient
from rollout.sandbox.commands import has_running_commands
from rollout.sandbox.guest_calls import GuestCalls
from rollout.sandbox.microvm.owner import Owner, Waking
from rollout.sandbox.microvm.snapshot import Snapshot
from rollout.types import Randomness, RngPolicy

if TYPE_CHECKING:
    from asyncio import TimerHandle

__all__ = ["MicroVMSandbox"]

_BACKGROUND_POLL_S = 0.5  # how soon after its last command has ended a machine is parked


class MicroVMSandbox(GuestCalls):
    """A live microVM. Made by `MicroVMEngine`.

    Attributes:
        origin: What it was restored from or last saved as: the snapshot that the next one shares pages with.
        generation: Counts handshakes of this sandbox.
        last_used_s: Event-loop time of its last request.
    """

    def __init__(
        self,
        owner: Owner,
        sandbox_id: str,
        parent_id: str | None,
        origin: Snapshot,
        *,
        park_after_s: float,
        call_timeout_s: float,
    ) -> None:
        self.origin = origin
        self.generation = 0
        self.last_used_s = asyncio.get_running_loop().time()
        self._owner = owner
        self._id = sandbox_id
        self._parent_id = parent_id
        self._park_after_s = park_after_s
        self._call_timeout_s = call_timeout_s
        self._waking: Waking | None = None
        self._is_parked = False
        self._is_as_saved = False
        self._saved_as: str | None = None
        self._is_dead = False
        self._keeps_running = False
        self._has_background = False
        self._in_flight = 0
        self._num_listeners = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._changing = asyncio.Lock()
        self._park_timer: TimerHandle | None = None
        self._park_task: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        """Unique name; also the guest's host name."""
        return self._id

    @property
    def parent_id(self) -> str | None:
        """The checkpoint that it was forked from, or None after a boot."""
        return self._parent_id

    @property
    def pid(self) -> int | None:
        """Process id of its VMM; None while it has none."""
        return self._waking.vmm.pid if self._waking is not None else None

    @property
    def state(self) -> str:
        """`running`, `parked`, `hibernated` or `dead`."""
        if self._is_dead:
            return "dead"
        if self._waking is None:
            return "hibernated"
        return "parked" if self._is_parked else "running"

    def attach(self, waking: Waking) -> None:
        """Gives it the machine that it is from now on."""
        self._waking = waking
        self._note_running()
        self._plan_parking()

    def keep_running(self, keep: bool) -> None:
        """Whether it goes on between requests, so that background work gets CPU time; off at first."""
        self._keeps_running = keep
        self._plan_parking()

    @property
    def keeps_running(self) -> bool:
        """See `keep_running`."""
        return self._keeps_running

    @property
    def has_background(self) -> bool:
        """Commands of it may be running between requests."""
        return self._has_background

    def expect_background(self) -> None:
        """See `GuestCommands.expect_background`: it goes on between requests until no command runs."""
        self._has_background = True

    @property
    def has_ended(self) -> bool:
        """See `GuestCommands.has_ended`."""
        return self._is_dead

    @property
    def call_timeout_s(self) -> float:
        """See `GuestCalls.call_timeout_s`."""
        return self._call_timeout_s

    def using(self, phase: str = "commands") -> AbstractAsyncContextManager[GuestClient]:
        """See `GuestCommands.using`."""
        return self._awake()

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[GuestClient]:
        """See `GuestCommands.listening`."""
        async with self._awake() as client:
            self._num_listeners += 1
            try:
                yield client
            finally:
                self._num_listeners -= 1

    async def checkpoint(self) -> Checkpoint:
        """See `Sandbox.checkpoint`. The sandbox is parked afterwards, unless it keeps running."""
        async with self._quiet() as waking:
            if waking is not None:
                await self._save(waking)
            checkpoint = self._owner.keep(self, self.origin)
            self._saved_as = checkpoint.id
            if waking is not None and (self._keeps_running or self._has_background):
                await self._resume(waking)
                self._plan_parking()
            return checkpoint

    async def take_over(self, randomness: Randomness) -> None:
        """See `Sandbox.take_over`. A machine that runs between requests has always gone on."""
        async with self._changing:
            self._require_alive()
            if (saved_as := self._saved_as) is None:
                raise gone_on(self._id)
            if (waking := self._waking) is None:
                await self._revive(randomness)
            else:
                await self._go_on_as_clone(waking, randomness)
            self._parent_id = saved_as

    async def hibernate(self) -> None:
        """See `Sandbox.hibernate`."""
        async with self._quiet() as waking:
            await self._lie_down(waking)

    @asynccontextmanager
    async def departing(self) -> AsyncGenerator[Checkpoint]:
        """Hibernates it and keeps requests out; when the block has succeeded it has ended here.

        Whoever was given the checkpoint goes on with it elsewhere, and discards it.
        """
        async with self._quiet() as waking:
            await self._lie_down(waking)
            yield self._owner.keep(self, self.origin)
            self._is_dead = True
            self._owner.forget(self)

    async def hibernate_if_parked(self) -> bool:
        """As `hibernate`, but only if nobody uses it just now; whether it did."""
        if self.state != "parked" or self._changing.locked():
            return False
        await self.hibernate()
        return True

    async def wake(self) -> None:
        """See `Sandbox.wake`."""
        async with self._changing:
            self._require_alive()
            await self._bring_back()

    async def kill(self) -> None:
        """See `Sandbox.kill`."""
        if self._ending is None:
            self._is_dead = True
            if self._park_timer is not None:
                self._park_timer.cancel()
            waking, self._waking = self._waking, None
            # A worker thread may be at it, or the guest in the middle of an answer: then nobody can reuse it.
            is_busy = self._changing.locked() or self._in_flight > 0
            self._ending = asyncio.create_task(self._finish(waking, is_busy=is_busy))
        await asyncio.shield(self._ending)

    def _require_alive(self) -> None:
        if self._is_dead:
            raise GuestError(f"sandbox {self._id} has been killed")

    @asynccontextmanager
    async def _awake(self) -> AsyncGenerator[GuestClient]:
        """Counts a request in flight on a running machine."""
        async with self._changing:
            self._require_alive()
            waking = await self._bring_back()
            if self._is_parked:
                await self._owner.make_room()
                await self._resume(waking)
            self._in_flight += 1
            self._idle.clear()
        try:
            yield waking.client
        finally:
            self._in_flight -= 1
            self.last_used_s = asyncio.get_running_loop().time()
            if waking.client.failure is not None:
                await self.kill()
            elif self._in_flight == 0:
                self._plan_parking()
            if self._in_flight == 0:
                self._idle.set()

    @asynccontextmanager
    async def _quiet(self) -> AsyncGenerator[Waking | None]:
        """Keeps new requests out and waits for those in flight; None when the sandbox is hibernated."""
        async with self._changing:
            if self._num_listeners:
                raise CheckpointError(
                    f"sandbox {self._id} cannot be saved while {self._num_listeners} of its commands are "
                    "listened to: save it before `output` or `wait`, or when they have ended"
                )
            await self._idle.wait()
            self._require_alive()
            yield self._waking

    async def _lie_down(self, waking: Waking | None) -> None:
        if waking is None:
            return
        if not self._is_as_saved:
            await self._save(waking)
        self._waking = None
        await asyncio.shield(self._owner.release(self, waking, self.origin))

    async def _bring_back(self) -> Waking:
        if self._waking is None:
            return await self._revive(Randomness(RngPolicy.INHERIT))
        return self._waking

    async def _revive(self, randomness: Randomness) -> Waking:
        waking = await self._owner.revive(self, self.origin, randomness)
        if self._is_dead:  # killed meanwhile, when it had no machine that could be ended
            await asyncio.shield(self._end(waking))
        self._require_alive()
        self.attach(waking)
        return waking

    async def _save(self, waking: Waking) -> None:
        try:
            self.origin = await self._owner.save(self, waking.vmm)
        except BaseException:
            await self.kill()  # it may stand still for ever, or be gone
            raise
        self._is_parked = self._is_as_saved = True

    async def _resume(self, waking: Waking) -> None:
        try:
            await self._owner.in_thread(lambda: waking.vmm.resume(self._call_timeout_s))
        except RolloutError as error:
            await self.kill()
            raise GuestError(f"sandbox {self._id} is gone: {error.message}", retryable=True) from error
        self._note_running()

    async def _go_on_as_clone(self, waking: Waking, randomness: Randomness) -> None:
        try:
            await self._owner.make_room()
            await self._resume(waking)
            await self._owner.greet(self, waking, randomness)
        except BaseException as error:
            await self.kill()
            if isinstance(error, GuestError):
                raise ForkError(
                    f"sandbox {self._id} cannot go on: {error.message}", retryable=True
                ) from error
            raise
        self.last_used_s = asyncio.get_running_loop().time()
        self._plan_parking()

    def _note_running(self) -> None:
        self._is_parked = self._is_as_saved = False
        self._saved_as = None

    async def _finish(self, waking: Waking | None, *, is_busy: bool) -> None:
        try:
            if waking is None:
                return
            if is_busy or waking.client.failure is not None:
                await self._end(waking)
            else:
                content = self.origin if self._is_as_saved else None
                await self._owner.release(self, waking, content)
        finally:
            self._owner.forget(self)

    async def _end(self, waking: Waking) -> None:
        waking.vmm.kill()
        await asyncio.shield(waking.client.close())

    def _plan_parking(self) -> None:
        if self._park_timer is not None:
            self._park_timer.cancel()
            self._park_timer = None
        if not self._keeps_running and not self._is_dead:
            loop = asyncio.get_running_loop()
            delay_s = max(self._park_after_s, _BACKGROUND_POLL_S if self._has_background else 0.0)
            self._park_timer = loop.call_later(delay_s, self._begin_parking)

    def _begin_parking(self) -> None:
        self._park_timer = None
        if self._park_task is None or self._park_task.done():
            self._park_task = asyncio.create_task(self._park())

    async def _park(self) -> None:
        async with self._changing:
            waking = self._waking
            if waking is None or self._is_dead or self._is_parked or self._in_flight or self._keeps_running:
                return
            try:
                if self._has_background:
                    self._has_background = await has_running_commands(waking.client, self._call_timeout_s)
                    if self._has_background:
                        self._plan_parking()
                        return
                await self._owner.in_thread(lambda: waking.vmm.stop(self._call_timeout_s))
            except RolloutError:
                await self.kill()  # the next request says that it is gone
                return
            self._is_parked = True
