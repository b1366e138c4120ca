"""Who plays a run: one process at a time, by the file `driver.lock`.

In a local folder (also a shared one that honours `flock`) the driver holds a lock on the file, which the
kernel drops when it dies: two drivers are excluded, and a dead one is known at once.

An object store has no locks, and `pyarrow.fs` no conditional put. There `driver.lock` is an object that its
driver writes again every `renew_s`, and a lock on a file beside the run's write-ahead logs on its machine:

- Drivers on one machine exclude each other by that lock, and know at once that another one is dead.
- On another machine a driver is dead when its object does not change for `lease_s`, by the clock of the one
  who watches; clocks of different machines are never compared. Who takes over writes the object, waits for
  `settle_s` and looks whether it is still there.
- A driver that finds another's object at a renewal commits what it has, and stops.

Not guaranteed there: two drivers on different machines may play at the same time, for `renew_s` and the
length of a request, if a put takes longer than `settle_s`, or if one was cut off from the store for
`lease_s`. Then episodes are played twice and the timeline and `run.json` are of the one that wrote last, but
an episode counts once all the same: readers leave the second out.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import platform
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rollout.errors import ConfigError, RolloutError, SinkError
from rollout.trajectory.recover import make_log_folder
from rollout.trajectory.storage import Storage

__all__ = ["Lease", "Ownership", "RunTakenOver", "drive_alone", "hold_lock"]

_LOCK_NAME = "driver.lock"


class RunTakenOver(RolloutError):
    """Another process plays the run; what this one had finished is committed."""

    boundary = "run"


@dataclass(frozen=True, slots=True)
class Lease:
    """How a driver shows in an object store that it lives.

    Attributes:
        renew_s: Seconds between two writes of its object.
        lease_s: A driver whose object does not change for so long is taken to be dead; several `renew_s`.
        settle_s: For how long one who takes over waits for others who do.
    """

    renew_s: float = 10.0
    lease_s: float = 60.0
    settle_s: float = 2.0


class Ownership:
    """That this process plays a run.

    Attributes:
        taken_by: Who has taken it over; None as long as nobody has.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.taken_by: str | None = None

    def check(self) -> None:
        """Returns while the run is this process's.

        Raises:
            RunTakenOver: It is not any more.
        """
        if self.taken_by is not None:
            raise RunTakenOver(
                f"the run in {self.storage} was taken over by {self.taken_by}, so this process stops"
            )


@contextlib.asynccontextmanager
async def drive_alone(
    storage: Storage,
    log_folder: str,
    *,
    is_new: bool = False,
    lease: Lease | None = None,
    on_wait: Callable[[str], None] = lambda _: None,
) -> AsyncGenerator[Ownership]:
    """Makes this process the only driver of a run for as long as the context lasts.

    Args:
        storage: The run's folder.
        log_folder: As in `SinkConfig`.
        is_new: The run was made by this process just now: nobody else can know it.
        lease: Of the object, in an object store.
        on_wait: Called with what is waited for, if that takes long, and with "" afterwards.

    Raises:
        ConfigError: Another process drives it; the message names that process.
        SinkError: The folder cannot be written.
    """
    if storage.local is not None:
        with hold_lock(storage.local / _LOCK_NAME, str(storage)):
            yield Ownership(storage)
        return
    claim = _Claim(storage, lease or Lease())
    path = make_log_folder(storage, log_folder) / _LOCK_NAME
    with hold_lock(path, str(storage), claim.nonce) as lock:
        try:
            await claim.stake(lock.left, is_new, on_wait)
            yield claim
        finally:
            lock.stays = not claim.give_up()


@dataclass(slots=True)
class LockFile:
    """A file that this process holds a lock on.

    Attributes:
        left: The second line that a dead holder left in it; "" if there is none.
        stays: The file is left there, without a lock, when the context ends.
    """

    left: str = ""
    stays: bool = False


@contextlib.contextmanager
def hold_lock(path: Path, run: str, nonce: str = "") -> Generator[LockFile]:
    """Holds a lock on a file, which is there for as long as the context lasts.

    Args:
        path: The file.
        run: Where the run is, for the error.
        nonce: A second line for the file.

    Raises:
        ConfigError: Another process holds it; the message names that process.
        SinkError: The file cannot be written.
    """
    try:
        descriptor = _locked(path, run)
    except OSError as error:
        raise SinkError.wrap(error, f"cannot write {path}") from error
    lock = LockFile()
    try:
        lines = os.pread(descriptor, 200, 0).decode(errors="replace").splitlines()
        lock.left = lines[1] if len(lines) > 1 else ""
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, "\n".join([_me(), nonce] if nonce else [_me()]).encode(), 0)
        yield lock
    finally:
        if not lock.stays:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _me() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _being_played(run: str, driver: str) -> ConfigError:
    return ConfigError(f"the run in {run} is being played by {driver}")


def _locked(path: Path, run: str) -> int:
    """The descriptor of the file, which is there and locked by this process."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
        except BlockingIOError:
            text = os.pread(descriptor, 200, 0).decode(errors="replace")
            os.close(descriptor)
            raise _being_played(run, text.split("\n")[0] or "another process") from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # between open and lock its owner ended and removed it


class _Claim(Ownership):
    """A driver's object in an object store; renewed by a thread, as starting Ray blocks the event loop."""

    def __init__(self, storage: Storage, lease: Lease) -> None:
        super().__init__(storage)
        self.nonce = uuid.uuid4().hex
        self._lease = lease
        self._num_renewals = 0
        self._is_over = threading.Event()
        self._renewer = threading.Thread(target=self._renew_forever, name="driver-lock", daemon=True)

    async def stake(self, dead: str, is_new: bool, on_wait: Callable[[str], None]) -> None:
        """Writes the object when no living driver has one.

        Args:
            dead: The nonce of a driver that is known to be dead.
            is_new: Nobody else can be there.
            on_wait: As in `drive_alone`.

        Raises:
            ConfigError: Another driver lives, or was faster.
            SinkError: The store cannot be read or written.
        """
        if not is_new:
            found = await asyncio.to_thread(self._read)
            if found is not None and not (dead and _field(found, "nonce") == dead):
                await self._see_silence(found, on_wait)
        await asyncio.to_thread(self._put)
        if not is_new:
            await asyncio.sleep(self._lease.settle_s)
            found = await asyncio.to_thread(self._read)
            if found is None or _field(found, "nonce") != self.nonce:
                raise _being_played(str(self.storage), _driver(found))
        self._renewer.start()

    def give_up(self) -> bool:
        """Ends the renewals and removes the object, if it is still this driver's. Blocks; idempotent.

        Returns:
            False if the object may still be there, because the store is away.
        """
        self._is_over.set()
        if self._renewer.ident is not None:
            self._renewer.join()
        try:
            found = self._read()
            if found is not None and _field(found, "nonce") == self.nonce:
                self.storage.delete(_LOCK_NAME)
        except SinkError:
            return False  # the object is dead to others after its lease, and here by the file that stays
        return True

    async def _see_silence(self, found: bytes, on_wait: Callable[[str], None]) -> None:
        """Returns when the object does not change for a whole lease, or goes."""
        lease = self._lease
        loop = asyncio.get_running_loop()
        since_s = loop.time()
        on_wait(f"looking for {lease.lease_s:.0f} s whether {_driver(found)} still plays the run ...")
        while loop.time() - since_s < lease.lease_s:
            await asyncio.sleep(min(lease.renew_s, lease.lease_s) / 4)
            now = await asyncio.to_thread(self._read)
            if now is None:
                break
            if now != found:
                raise _being_played(str(self.storage), _driver(now))
        on_wait("")

    def _renew_forever(self) -> None:
        while self.taken_by is None and not self._is_over.wait(self._lease.renew_s):
            # A store that is away is tried again: whoever takes the run over meanwhile is found afterwards.
            with contextlib.suppress(SinkError):
                found = self._read()
                if found is None or _field(found, "nonce") != self.nonce:
                    self.taken_by = _driver(found)
                else:
                    self._num_renewals += 1
                    self._put()

    def _read(self) -> bytes | None:
        return self.storage.read_if_there(_LOCK_NAME)

    def _put(self) -> None:
        said = {"driver": _me(), "nonce": self.nonce, "renewals": self._num_renewals}
        self.storage.put(_LOCK_NAME, json.dumps(said).encode(), "driver")


def _driver(found: bytes | None) -> str:
    return (_field(found, "driver") if found is not None else "") or "another process"


def _field(found: bytes, name: str) -> str:
    """A field of a driver's object; "" where it is damaged."""
    with contextlib.suppress(ValueError):
        said: object = json.loads(found)
        if isinstance(said, dict):
            return str(cast("dict[str, Any]", said).get(name, ""))
    return ""
