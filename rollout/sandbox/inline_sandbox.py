"""The inline engine's sandbox: an environment in this process, and a private folder if one is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Final, Self

from rollout.errors import CheckpointError, EnvError, ForkError, GuestError, RolloutError
from rollout.sandbox.base import DEFAULT_MAX_OUTPUT_BYTES, Checkpoint, gone_on
from rollout.sandbox.global_rng import GlobalState, OwnGenerators
from rollout.sandbox.guest_env import GuestEnv
from rollout.sandbox.guest_ops import ENV_OPERATIONS
from rollout.sandbox.inline_copy import COPIERS, Saved
from rollout.sandbox.inline_fidelity import Recipe, Trust
from rollout.sandbox.inline_files import PrivateFolder, run_command
from rollout.sandbox.inline_owner import InlineOwner, Record
from rollout.sandbox.inline_transfers import FolderTransfers
from rollout.types import ExecResult, Randomness, RngPolicy, Value

__all__ = ["InlineSandbox", "load_state"]

_PHASES: Final = {op: op.removeprefix("env.") for op in ENV_OPERATIONS}


class InlineSandbox(FolderTransfers):
    """One environment and its private folder; made by `InlineEngine`."""

    __slots__ = (
        "_commands",
        "_engine",
        "_env",
        "_folder",
        "_generators",
        "_hibernating",
        "_id",
        "_is_alive",
        "_owns_env",
        "_parent_id",
        "_recipe",
        "_saved_as",
        "_trust",
    )

    def __init__(
        self,
        engine: InlineOwner,
        sandbox_id: str,
        parent_id: str | None,
        env: GuestEnv,
        recipe: Recipe | None,
        trust: Trust | None,
        generators: OwnGenerators | None,
        folder: PrivateFolder | None,
    ) -> None:
        self._engine = engine
        self._id = sandbox_id
        self._parent_id = parent_id
        self._env = env
        self._recipe = recipe
        self._trust = trust
        self._generators = generators
        self._folder = folder
        self._commands: frozenset[asyncio.Future[ExecResult]] = frozenset()
        self._hibernating: Saved | None = None
        self._is_alive = True
        self._owns_env = parent_id is None
        self._saved_as: str | None = None

    @property
    def id(self) -> str:
        """Unique among the sandboxes of its engine."""
        return self._id

    @property
    def parent_id(self) -> str | None:
        """The checkpoint that it was forked from, or None after a boot."""
        return self._parent_id

    @property
    def recipe(self) -> Recipe | None:
        """How its environment was made; None if it has none."""
        return self._recipe if self._env.is_made or self._hibernating is not None else None

    async def call(self, op: str, /, *, timeout_s: float = 60.0, **args: Value) -> Value:
        """Calls an operation on the environment (`rollout.sandbox.guest_ops`), or `ping`.

        Raises:
            EnvError: The environment raised or refused.
            GuestError: There is no such operation, its arguments are wrong, or the sandbox is dead.
        """
        operation = ENV_OPERATIONS.get(op)
        self._go_on()
        if operation is None:
            if op == "ping":
                return None
            raise GuestError(f"the inline engine has no operation {op!r}")
        start_s = perf_counter()
        if op == "env.make":
            self._forget_kind()
        try:
            if self._generators is None:
                result = operation(self._env, args)
            else:
                with self._generators.installed():
                    result = operation(self._env, args)
        except RolloutError:
            raise
        except (Exception, SystemExit) as error:  # as the agent does: one bad request is one error
            raise GuestError.wrap(error, f"the operation {op} failed") from error
        if op == "env.make":
            self._recipe = Recipe.of(args)
        self._engine.timings.add(_PHASES[op], perf_counter() - start_s)
        return result

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
        """Runs a host command, in the sandbox's folder or one inside it.

        Raises:
            GuestError: It cannot be started, or the sandbox is dead.
        """
        self._go_on()
        folder = self._files()
        start_s = perf_counter()
        command = asyncio.ensure_future(
            run_command(
                argv,
                stdin=stdin,
                timeout_s=timeout_s,
                cwd=folder.path() if cwd is None else folder.resolve(cwd),
                env=env or {},
                max_output_bytes=max_output_bytes,
            )
        )
        self._commands |= {command}
        try:
            return await command
        except asyncio.CancelledError:
            self._check_alive()  # cancelled by `kill`, not by who waits here
            raise
        finally:
            self._commands -= {command}
            self._engine.timings.add("exec", perf_counter() - start_s)

    async def read_file(self, path: str) -> bytes:
        """Reads a file of the sandbox's folder.

        Raises:
            GuestError: It is missing, unreadable or outside the folder, or the sandbox is dead.
        """
        self._go_on()
        place = self._files().resolve(path)
        try:
            return place.read_bytes()
        except OSError as error:
            raise GuestError(f"cannot read {path!r}: {error.strerror}") from error

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Writes a file of the sandbox's folder, with its parent folders.

        Raises:
            GuestError: It cannot be written or is outside the folder, or the sandbox is dead.
        """
        self._go_on()
        place = self._files().resolve(path)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
            place.chmod(mode)
        except OSError as error:
            raise GuestError(f"cannot write {path!r}: {error.strerror}") from error

    async def checkpoint(self) -> Checkpoint:
        """Copies the environment; its first time, after a test of its copies.

        Raises:
            CheckpointError: Copies of this environment do not behave as the original, or it or the folder
                cannot be copied.
            GuestError: The sandbox is dead.
        """
        self._wake()
        start_s = perf_counter()
        self._establish_trust()
        record = Record(
            saved=self._save(),
            recipe=self._recipe,
            trust=self._trust,
            globals=None if self._generators is None else self._generators.state,
            folder=None if self._folder is None else self._folder.freeze(),
        )
        checkpoint = self._engine.keep(record, self._parent_id)
        self._saved_as = checkpoint.id
        self._engine.timings.add("checkpoint", perf_counter() - start_s)
        return checkpoint

    async def take_over(self, randomness: Randomness) -> None:
        """Reseeds it where it is; see `Sandbox.take_over`.

        Raises:
            CheckpointError: It was never saved, or has gone on since.
            ForkError: It was hibernated and could not be made again.
            GuestError: The sandbox is dead.
        """
        start_s = perf_counter()
        self._check_alive()
        if self._saved_as is None:
            raise gone_on(self._id)
        self._wake()
        self.reseed(randomness)
        self._parent_id, self._saved_as = self._saved_as, None
        self._engine.timings.add("restore", perf_counter() - start_s)

    def reseed(self, randomness: Randomness) -> None:
        """Gives its generators what a clone's get."""
        if randomness.policy is RngPolicy.INHERIT:
            return
        seed = secrets.randbits(63) if randomness.seed is None else randomness.seed
        if self._generators is None:
            self._env.reseed(seed)
        else:
            with self._generators.installed():
                self._env.reseed(seed)

    async def hibernate(self) -> None:
        """Keeps the environment in its copied form alone. Idempotent.

        Raises:
            CheckpointError: It cannot be copied faithfully; the sandbox is awake as before.
            GuestError: The sandbox is dead.
        """
        self._check_alive()
        if self._hibernating is None:
            self._establish_trust()
            self._hibernating = self._save()
            self._env = GuestEnv(seeds_globals=self._generators is not None)

    async def wake(self) -> None:
        """Makes the environment again. Idempotent.

        Raises:
            ForkError: It could not be made.
            GuestError: The sandbox is dead.
        """
        self._go_on()

    async def kill(self) -> None:
        """Drops the environment and the folder, and ends commands. Idempotent, never raises."""
        if not self._is_alive:
            return
        self._is_alive = False
        self._engine.forget(self)
        if self._commands:
            for command in self._commands:
                command.cancel()
            await asyncio.shield(asyncio.wait(self._commands))
        if self._folder is not None:
            self._folder.remove()
        if self._owns_env:
            # Only what was made here is closed: a copy may name resources that are its siblings' too.
            with contextlib.suppress(EnvError):  # whatever it thinks of its end
                self._env.close()
        self._hibernating = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()

    def _check_alive(self) -> None:
        if not self._is_alive:
            raise GuestError(f"the sandbox {self._id} has been killed")

    def _go_on(self) -> None:
        """Something is asked of it: from now on it is not as it was saved."""
        self._wake()
        self._saved_as = None

    def _wake(self) -> None:
        self._check_alive()
        if self._hibernating is not None:
            state = load_state(self._hibernating)
            self._env = GuestEnv(seeds_globals=self._generators is not None, state=state)
            self._hibernating = None

    def _forget_kind(self) -> None:
        """What is known of the environment so far does not hold for the one that is about to be made."""
        self._recipe = self._trust = None
        if self._generators is None:
            self._generators = OwnGenerators(GlobalState.seeded(secrets.randbits(63)))
            self._env = GuestEnv(seeds_globals=True, state=self._env.state)

    def _establish_trust(self) -> None:
        """Before the first copy of an environment is made, copies of its kind must have passed their test."""
        if self._trust is None and self._recipe is not None and self._env.is_made:
            self._trust = self._engine.trust(self._recipe)
            if not self._trust.uses_globals:
                self._generators = None
                self._env = GuestEnv(seeds_globals=False, state=self._env.state)

    def _save(self) -> Saved:
        copier = COPIERS[0] if self._trust is None else self._trust.copier
        try:
            return copier.save(self._env.state)
        except Exception as error:  # environments and what they hold raise anything when they are copied
            raise CheckpointError.wrap(error, f"the environment cannot be copied by {copier.name}") from error

    def place(self, path: str) -> Path:
        """See `FolderTransfers.place`."""
        self._go_on()
        return self._files().resolve(path)

    def _files(self) -> PrivateFolder:
        if self._folder is None:
            self._folder = PrivateFolder(self._engine.scratch)
        return self._folder


def load_state(saved: Saved) -> tuple[Any, Any]:
    """The state of a `GuestEnv`.

    Raises:
        ForkError: It cannot be made again.
    """
    try:
        return saved.load()
    except Exception as error:  # environments and what they hold raise anything when they are copied
        raise ForkError.wrap(error, "a copy of the environment could not be made") from error
