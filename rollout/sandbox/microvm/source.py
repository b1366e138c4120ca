"""Where the VMMs of one base come from: forks of its origin, or programs of their own.

Under TCG the origin is a prototype (`rollout.sandbox.microvm.prototype`): it is made with the first VMM that
is asked for, beside it, and is there a tenth of a second later; that of a base that was derived from another
begins as a fork of the other's. Under KVM, whose machines cannot be forked, it is a program that has begun to
start (`rollout.sandbox.microvm.half_started`). Where there is none (not wanted, or not possible here, which
is tried a few times in a row) VMMs start as programs, and those that are started ahead under TCG are warmed
up one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from rollout.errors import BootError, EnvError, RolloutError
from rollout.sandbox.client import GuestClient
from rollout.sandbox.microvm.base import Base
from rollout.sandbox.microvm.boot import InThread
from rollout.sandbox.microvm.half_started import HalfStarted
from rollout.sandbox.microvm.machine import BootFiles, MachineShape
from rollout.sandbox.microvm.memory import Pages
from rollout.sandbox.microvm.prototype import Candidate, Family, Prototype
from rollout.sandbox.microvm.ready import Ready, become
from rollout.sandbox.microvm.snapshot import RawCache, Snapshot
from rollout.sandbox.microvm.spawner import Spawner
from rollout.sandbox.microvm.starting import start_candidate, start_halfway, start_vmm
from rollout.sandbox.microvm.vmm import Vmm
from rollout.types import Randomness, Value

__all__ = ["Ground", "VmmSource"]

_MAX_FAILURES = 3
_Calls = tuple[tuple[str, dict[str, Value]], ...]
_PING: _Calls = (("ping", {}),)
_REHEARSAL: _Calls = (
    *_PING,
    ("env.reset", {"seed": 0, "options": None}),
    ("env.step", {"action": 0, "state_hash": True}),
    ("env.playout", {"horizon": 1, "seed": 0, "discount": 1.0}),
)
"""What a clone probably does first; of what comes of it nothing stays but translated code."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What the VMMs of a base have in common.

    Attributes:
        spawner: Starts them.
        shape: The machine that they are.
        files: What they are made from.
        base: Shared memory.
        pages: Its pages, shape [num_pages, 4096].
        snapshot: The base itself, as a snapshot without pages.
        cache: Pages at hand.
        in_thread: Runs blocking work.
        timeout_s: Deadline of each step.
        use_scan: See `GuestMemory`.
        reuses: VMMs may share memory, and be used again.
    """

    spawner: Spawner
    shape: MachineShape
    files: BootFiles
    base: Base
    pages: Pages
    snapshot: Snapshot
    cache: RawCache
    in_thread: InThread
    timeout_s: float
    use_scan: bool
    reuses: bool


class VmmSource:
    """The VMMs of one base. On the event loop only.

    Args:
        ground: What they have in common.
        recent: What was forked last, and will probably be forked next.
        root: The source of the base that this one was derived from, and what it holds, on that base.
    """

    def __init__(
        self,
        ground: Ground,
        recent: Callable[[], Snapshot],
        root: tuple[VmmSource, Snapshot] | None = None,
    ) -> None:
        self._ground = ground
        self._recent = recent
        self._root = root
        self._origin: Prototype | HalfStarted | None = None
        self._families: list[Family] = []
        self._making: asyncio.Task[None] | None = None
        self._num_failures = 0
        self._is_closed = False

    async def start(self) -> Ready:
        """A VMM, as soon as there can be one.

        Raises:
            BootError: It could not be started.
        """
        if (forked := await self._fork()) is not None:
            return forked
        self.prepare()
        return await self._program()

    async def start_ahead(self) -> Ready:
        """A VMM that is warm, where that gains something.

        Raises:
            RolloutError: It did not come up, or cannot be put back.
        """
        await self.origin()
        if (forked := await self._fork()) is not None:
            return forked if forked.vmm.is_dormant else await self._laid(forked, self._recent())
        ready = await self._program()
        if not self._translates:
            return ready
        try:
            await self._run(ready.vmm, self._recent(), _PING)
            if not await self._ground.in_thread(lambda: ready.vmm.retire(self._ground.timeout_s)):
                raise BootError("a VMM that was warmed up cannot be put back")
        except BaseException:
            ready.vmm.kill()
            raise
        return ready

    async def _laid(self, ready: Ready, snapshot: Snapshot) -> Ready:
        """A fork that is a snapshot already, with pages of its own for what that changes."""
        ground = self._ground
        try:
            await ground.in_thread(
                lambda: become(*(ready, snapshot, ground.cache, ground.pages, ground.timeout_s), resume=False)
            )
        except BaseException:
            ready.vmm.kill()
            raise
        return Ready(ready.vmm, snapshot)

    async def start_dormant(self) -> Ready:
        """A VMM that has never run.

        Raises:
            BootError: It could not be started.
        """
        forked = None if self._translates else await self._fork()  # one of a prototype has run
        return forked if forked is not None else await self._program()

    async def _program(self) -> Ready:
        """A VMM that starts from its program's beginning."""
        ground = self._ground

        def work() -> Vmm:
            return start_vmm(
                *(ground.spawner, ground.shape, ground.files, ground.base.ram_fd),
                from_template=ground.reuses,
                use_scan=ground.use_scan,
                timeout_s=ground.timeout_s,
            )

        return Ready(await self._started(work))

    def prepare(self) -> None:
        """Has the origin made, unless it is there, is being made, or cannot be."""
        is_possible = self._ground.reuses and self._num_failures < _MAX_FAILURES and not self._is_closed
        if is_possible and self._origin is None and self._making is None:
            self._making = asyncio.create_task(self._make())

    async def origin(self) -> Prototype | HalfStarted | None:
        """What is forked, once it is there; None if there will be none."""
        self.prepare()
        if self._making is not None:
            await asyncio.wait([self._making])
        return self._origin

    async def close(self) -> None:
        """Ends the origin, and all VMMs of its family if it began one. Idempotent."""
        self._is_closed = True
        if self._making is not None:
            await asyncio.wait([self._making])
        self._give_up()
        while self._families:
            self._families.pop().end()

    @property
    def _translates(self) -> bool:
        return self._ground.shape.accel == "tcg" and self._ground.reuses

    async def _fork(self) -> Ready | None:
        """A fork of the origin, if there can be one; an origin that will make none is given up."""
        origin, ground = self._origin, self._ground
        if origin is None:
            return None
        try:
            vmm = await self._started(lambda: origin.fork(ground.base.ram_fd))
        except BootError:
            if self._origin is origin and not origin.can_fork:
                self._num_failures += 1
                self._give_up()
            return None  # the kernel may refuse it the fork, for now
        self._num_failures = 0
        return Ready(vmm, None if vmm.is_dormant else ground.snapshot)

    async def _started(self, work: Callable[[], Vmm]) -> Vmm:
        """What a worker thread has started, unless its caller has gone meanwhile: then nobody has it."""
        started: list[Vmm] = []
        try:
            await self._ground.in_thread(lambda: started.append(work()))
        except asyncio.CancelledError:
            for vmm in started:
                vmm.kill()
            raise
        return started[0]

    def _give_up(self) -> None:
        if self._origin is not None:
            self._origin.close()
            self._origin = None

    async def _make(self) -> None:
        try:
            self._origin = await (self._prototype() if self._translates else self._half_started())
        except (RolloutError, OSError):  # VMMs are only dearer without one
            self._num_failures += 1
        finally:
            self._making = None

    async def _half_started(self) -> HalfStarted:
        """A program that is started, and held."""
        ground = self._ground
        half_started, family = await ground.in_thread(
            lambda: start_halfway(
                *(ground.spawner, ground.shape, ground.files, ground.base.ram_fd),
                use_scan=ground.use_scan,
                timeout_s=ground.timeout_s,
            )
        )
        self._families.append(family)
        try:
            await ground.in_thread(lambda: half_started.fork(ground.base.ram_fd).kill())  # that one lives
        except BaseException:
            half_started.close()
            self._end_family(family)
            raise
        return half_started

    async def _prototype(self) -> Prototype:
        """Lets a VMM do what clones do first, puts it back, and stops it for ever."""
        ground = self._ground
        candidate = await (self._first() if self._root is None else self._of_root(*self._root))

        def work() -> Prototype:
            _put_back(candidate.vmm, ground, ground.snapshot)
            prototype = Prototype(candidate)
            _try_out(prototype, ground)
            return prototype

        try:
            await self._run(candidate.vmm, ground.snapshot, _REHEARSAL)
            return await ground.in_thread(work)
        except BaseException:
            candidate.kill()
            self._end_family(candidate.family)
            raise

    def _end_family(self, family: Family) -> None:
        """Ends a family in which there is nobody, if this object began it."""
        if family in self._families:
            self._families.remove(family)
            family.end()

    async def _first(self) -> Candidate:
        """A VMM that is started, in a family of its own."""
        ground = self._ground
        candidate = await ground.in_thread(
            lambda: start_candidate(
                *(ground.spawner, ground.shape, ground.files, ground.base.ram_fd),
                use_scan=ground.use_scan,
                timeout_s=ground.timeout_s,
            )
        )
        self._families.append(candidate.family)
        return candidate

    async def _of_root(self, root: VmmSource, content: Snapshot) -> Candidate:
        """A VMM whose translated code is the root's: a fork of its prototype, on the other base.

        A fork can go on in another file only if that holds what its memory does. So there is one in between,
        which becomes, on the root's base, what the other base holds.
        """
        prototype, ground = await root.origin(), root._ground
        if not isinstance(prototype, Prototype):
            raise BootError("the base that this one was derived from has no prototype")

        def work() -> Candidate:
            between = prototype.candidate(ground.base.ram_fd)
            try:
                _put_back(between.vmm, ground, content)
            except BaseException:
                between.kill()
                raise
            stopped = Prototype(between)
            try:
                return stopped.candidate(self._ground.base.ram_fd)
            finally:
                stopped.close()

        return await ground.in_thread(work)

    async def _run(self, vmm: Vmm, snapshot: Snapshot, calls: _Calls) -> None:
        """Makes a VMM that holds its base into a snapshot, shakes hands with its guest, and calls it.

        Raises:
            RolloutError: It does not come up.
        """
        ground = self._ground
        ready = Ready(vmm, None if vmm.is_dormant else ground.snapshot)
        await ground.in_thread(lambda: become(ready, snapshot, ground.cache, ground.pages, ground.timeout_s))
        client = await GuestClient.connect(vmm.channel.dup())
        try:
            await client.hello(0, Randomness(), hostname="ready", timeout_s=ground.timeout_s)
            for op, args in calls:
                with contextlib.suppress(EnvError):  # it has no environment, or one without such an action
                    await client.call(op, args, timeout_s=ground.timeout_s)
        finally:
            await client.close()


def _try_out(prototype: Prototype, ground: Ground) -> None:
    """Makes sure that a fork lives: where the kernel refuses one a step of its confinement, it dies of it.

    Raises:
        RolloutError: It does not.
    """
    vmm = prototype.fork(ground.base.ram_fd)
    try:
        vmm.stop(ground.timeout_s)  # it stands still; that it answers is what matters
    finally:
        vmm.kill()


def _put_back(vmm: Vmm, ground: Ground, content: Snapshot) -> None:
    """Stops a VMM, and makes its memory and devices a snapshot; its vCPU does not run.

    Raises:
        RolloutError: It cannot be done.
    """
    if not vmm.retire(ground.timeout_s):
        raise BootError("a VMM that was warmed up cannot be put back")
    become(Ready(vmm), content, ground.cache, ground.pages, ground.timeout_s, resume=False)
