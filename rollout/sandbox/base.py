"""The contract of the three engines: what an engine, a sandbox and a checkpoint are.

Invariants, which one contract suite checks on every engine:

- A checkpoint is a value. It outlives the sandbox that it was taken from, and any number of clones at any
  depth.
- `fork(checkpoint, n)` gives exactly n sandboxes or raises, and then none of them is left.
- Siblings share nothing that one of them can change.
- Every clone passed its handshake: it confirmed its identity and its randomness before anyone could use it.
- `kill` and `close` are idempotent; nothing outlives its engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from rollout.errors import CheckpointError
from rollout.types import ExecResult, Randomness, Value

if TYPE_CHECKING:
    from rollout.sandbox.commands import Command

__all__ = ["Capabilities", "Checkpoint", "Engine", "PhaseTimings", "Sandbox", "gone_on"]

DEFAULT_MAX_OUTPUT_BYTES = 1 << 20
"""How much of each of stdout and stderr `exec` returns unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved sandbox: an immutable value that names content held by its engine.

    Attributes:
        id: Unique name.
        parent_id: The checkpoint that the saved sandbox was forked from, or None after a boot.
        engine: Name of the engine that can restore it.
        fingerprint: What must be the same to restore it (VMM build, machine shape, CPU model, versions).
        image_digest: The image that it was booted from.
        private_bytes: What holding it costs, beyond what it shares with its base or parent.
    """

    id: str
    parent_id: str | None
    engine: str
    fingerprint: str
    image_digest: str
    private_bytes: int


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine offers on this machine, and what it does not.

    Attributes:
        engine: Its name.
        wall: One line: what stands between the guest and the host.
        trusted_only: True when code in the sandbox can reach the host.
        forks_background_processes: True when a checkpoint holds every process of the sandbox, not only the
            agent.
        isolates_files: True when files written in one sandbox are invisible to its siblings.
        survives_host_restart: True when a checkpoint can be restored by another process.
        synchronous: True when its methods never suspend: they gain nothing from concurrency, and no deadline
            can interrupt them.
        background_commands: True when commands can be spawned: heard, signalled and fed while they run.
        limits: Limits that are enforced, by name ("memory", "pids", "cpu", ...).
        notes: Caveats, one line each.
    """

    engine: str
    wall: str
    trusted_only: bool
    forks_background_processes: bool
    isolates_files: bool
    survives_host_restart: bool
    synchronous: bool = False
    background_commands: bool = True
    limits: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class PhaseTimings:
    """Seconds and calls spent in each phase ("start", "restore", "handshake", "step", "checkpoint", ...)."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])
    calls: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, phase: str, duration_s: float) -> None:
        """Counts one call of `phase`."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + duration_s
        self.calls[phase] = self.calls.get(phase, 0) + 1

    def merge(self, other: PhaseTimings) -> None:
        """Adds another's seconds and calls."""
        for phase, seconds in other.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
            self.calls[phase] = self.calls.get(phase, 0) + other.calls[phase]


class Sandbox(Protocol):
    """A running machine or process. An async context manager: leaving it kills the sandbox.

    Every method raises `GuestError` when the guest is gone, late or answers garbage; the sandbox is then
    dead, and every later call but `kill` raises `GuestError` too.
    """

    @property
    def id(self) -> str:
        """Unique among the sandboxes of its engine."""
        ...

    @property
    def parent_id(self) -> str | None:
        """The checkpoint that it was forked from, or None after a boot."""
        ...

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float = 60.0,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        max_output_bytes: int = DEFAULT_MAX_OUTPUT_BYTES,
    ) -> ExecResult:
        """Runs a command to its end; a non-zero exit and a time-out are data.

        Raises:
            GuestError: The guest is gone, or the command cannot be started at all (`retryable=False`).
        """
        ...

    async def read_file(self, path: str) -> bytes:
        """Reads a whole file.

        Raises:
            GuestError: The file is missing or unreadable; the sandbox stays usable.
        """
        ...

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Writes a whole file, with its parent folders.

        Raises:
            GuestError: The file cannot be written; the sandbox stays usable.
        """
        ...

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        keep_stdin_open: bool = False,
        timeout_s: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        max_output_bytes: int = DEFAULT_MAX_OUTPUT_BYTES,
    ) -> Command:
        """Starts a command and leaves it running in a process group of its own.

        Args:
            argv: The program and its arguments.
            stdin: Input to begin with.
            keep_stdin_open: More follows, by `Command.write`.
            timeout_s: Seconds of guest time until its whole process group is killed; None is never.
            cwd: Where it starts.
            env: Added to the environment.
            max_output_bytes: How much of each output is kept until somebody listens.

        Raises:
            GuestError: It cannot be started, the engine has no background commands, or the guest is gone.
        """
        ...

    async def commands(self) -> Sequence[Command]:
        """The commands that nobody has waited for, those that a clone has from its checkpoint included.

        A clone whose commands should go on between requests needs to be asked for them.

        Raises:
            GuestError: The guest is gone, late or answers garbage.
        """
        ...

    async def upload(
        self, source: Path, path: str, *, timeout_s: float = 600.0, max_bytes: int = 1 << 30
    ) -> None:
        """Copies a file or folder of the host to `path`; permission bits and links are kept.

        A folder's content joins a folder that is there. Links below `source` are not followed. Needs `tar`
        in the sandbox.

        Raises:
            GuestError: The source is missing, unreadable, longer than `max_bytes` or holds something that is
                neither folder, file nor link; or it cannot be written (a part may have been).
        """
        ...

    async def download(
        self,
        path: str,
        target: Path,
        *,
        timeout_s: float = 600.0,
        max_bytes: int = 1 << 30,
        max_entries: int = 100_000,
    ) -> None:
        """Copies a file or folder of the sandbox to `target` on the host, whole or not at all.

        Permission bits and links are kept; the sandbox is not trusted: a name or a link that leads out of
        what was asked for is refused, and so is more than the given bytes or entries. Needs `tar` in the
        sandbox.

        Args:
            path: A file or a folder.
            target: Missing, or an empty folder for a folder; its parents are made.
            timeout_s: Seconds until the transfer is given up.
            max_bytes: Most bytes that come.
            max_entries: Most files, folders and links.

        Raises:
            GuestError: It is missing, unreadable, refused as above, or the target cannot be made.
        """
        ...

    async def call(self, op: str, /, *, timeout_s: float = 60.0, **args: Value) -> Value:
        """Calls an operation of the guest agent (see `rollout.sandbox.agent`).

        Raises:
            EnvError: The environment raised or refused; the sandbox stays usable.
            GuestError: The agent refused the call, or is gone, late or answers garbage.
        """
        ...

    async def checkpoint(self) -> Checkpoint:
        """Saves the sandbox, which goes on afterwards.

        Raises:
            CheckpointError: It could not be saved; nothing is left of the attempt.
        """
        ...

    async def take_over(self, randomness: Randomness) -> None:
        """Makes it what a fresh clone of its last checkpoint would be: the child goes on in the parent.

        It shakes hands as a clone does: entropy, clock and generators are a clone's, and `parent_id` names
        that checkpoint from now on. `id` and host name stay, which no other sandbox has. Only for a sandbox
        that was asked for nothing since `checkpoint` (a read counts, `hibernate` does not); the checkpoint
        may have been discarded.

        Raises:
            CheckpointError: It was never saved, or has gone on since; it is as before.
            ForkError: It did not confirm its handshake, or could not be woken; it is dead.
            CapacityError: The machine has no memory for it to run in; it may be dead: kill it.
        """
        ...

    async def hibernate(self) -> None:
        """Releases memory and CPU; state, files and identity stay. Idempotent.

        Raises:
            CheckpointError: The state could not be saved. If the sandbox refused (the message names what
                runs or is open), it is awake as before; if it broke or was late meanwhile, it is dead.
        """
        ...

    async def wake(self) -> None:
        """Brings a hibernated sandbox back. Idempotent; a call to a hibernated sandbox wakes it too.

        Raises:
            ForkError: The saved state could not be restored.
        """
        ...

    async def kill(self) -> None:
        """Ends it and frees what it held. Idempotent, never raises, shielded from cancellation."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def gone_on(sandbox_id: str) -> CheckpointError:
    """The error of `Sandbox.take_over` for a sandbox that is not as a checkpoint left it."""
    return CheckpointError(
        f"the sandbox {sandbox_id} is not as its last checkpoint was taken (it has none, or has gone on "
        "since): fork the checkpoint instead"
    )


class Engine(Protocol):
    """Makes sandboxes and restores checkpoints. An async context manager: leaving it closes the engine."""

    @property
    def capabilities(self) -> Capabilities:
        """What it offers on this machine."""
        ...

    @property
    def timings(self) -> PhaseTimings:
        """Where its time went since it was made."""
        ...

    @property
    def num_sandboxes(self) -> int:
        """Live sandboxes."""
        ...

    async def boot(self, image: str) -> Sandbox:
        """Makes a fresh sandbox of an image (a digest or a name; engines without images ignore it).

        Raises:
            BootError: The image is missing or damaged, or the guest did not come up in time.
            CapacityError: There is no room.
        """
        ...

    async def fork(
        self, checkpoint: Checkpoint, n: int = 1, *, randomness: Sequence[Randomness] | None = None
    ) -> Sequence[Sandbox]:
        """Makes exactly n clones, or none and an error.

        Args:
            checkpoint: What to restore; of any depth.
            n: Number of clones, at least 1.
            randomness: One per clone; `unique` for each when None.

        Raises:
            ForkError: A clone could not be started or did not confirm its handshake.
            CheckpointError: The checkpoint is unknown, damaged, or of another engine or fingerprint.
            CapacityError: There is no room for n more.
        """
        ...

    async def rebase(self, checkpoint: Checkpoint) -> None:
        """Says that very many sandboxes will descend from a checkpoint; nothing else about it changes.

        An engine may take time and memory once to make its forks, and what descends from them, cheaper.

        Raises:
            BootError: There is no memory for it; the checkpoint is as before.
            CheckpointError: It is unknown or damaged, where the engine looks.
        """
        ...

    async def discard(self, checkpoint: Checkpoint) -> None:
        """Frees what a checkpoint holds.

        Idempotent; its live clones, and checkpoints of those, stay valid.
        """
        ...

    async def close(self) -> None:
        """Kills every sandbox and frees every checkpoint. Idempotent, shielded from cancellation."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
