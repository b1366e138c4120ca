"""The inline engine: sandboxes are objects of this process. The reference, the fastest, and no wall at all.

A sandbox is an environment; a checkpoint is a copy of it; a clone is a copy of that. So this engine is for
trusted environments only, and only for those that can be copied: before the first checkpoint of an
environment is trusted, copies of it must pass `rollout.sandbox.fidelity`, for which an instance is made and
played apart. Nobody can forget that test, because `checkpoint` makes it.

Invariants beside the engine contract:

- No method suspends but `exec`: forks, checkpoints and environment calls are plain function calls in async
  clothes, and no deadline can interrupt them.
- The process-wide generators (`random`, numpy's legacy one) of the host are never disturbed. An environment
  that was seen to use them in its fidelity test has states of them for each sandbox, at some cost.

Not isolated: modules, classes, the working directory, everything outside the environment's own objects.
"""

from __future__ import annotations

import platform
import secrets
from collections.abc import Sequence
from time import perf_counter
from types import TracebackType
from typing import Any, Final, Self

import gymnasium
import numpy as np

from rollout.config import EngineConfig
from rollout.errors import BootError, CapacityError, CheckpointError
from rollout.sandbox.base import Capabilities, Checkpoint, PhaseTimings, Sandbox
from rollout.sandbox.global_rng import GlobalState, OwnGenerators
from rollout.sandbox.guest_env import GuestEnv
from rollout.sandbox.inline_fidelity import Recipe, Trust, examine
from rollout.sandbox.inline_files import PrivateFolder, ScratchFolder
from rollout.sandbox.inline_owner import Record
from rollout.sandbox.inline_sandbox import InlineSandbox, load_state
from rollout.types import Randomness

__all__ = ["InlineEngine", "InlineSandbox"]

_CAPABILITIES: Final = Capabilities(
    engine="inline",
    wall="none: environments run in this process",
    trusted_only=True,
    forks_background_processes=False,
    isolates_files=False,
    survives_host_restart=False,
    synchronous=True,
    background_commands=False,
    notes=(
        "a checkpoint relies on pickling or copy.deepcopy; each environment's copies are tested against the "
        "original before its first checkpoint",
        "an environment's own files and module-level state are shared by all sandboxes",
        "read_file, write_file and the start folder of exec are private and fork with a checkpoint; commands "
        "see the host's other files",
        "what a command leaves in the background is killed when it ends, and none can be spawned there",
    ),
)


class InlineEngine:
    """Sandboxes of this process; see the module for what that means.

    Args:
        config: `max_sandboxes` is what it heeds; there is no deadline that could interrupt it.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._token = secrets.token_hex(4)
        self._fingerprint = (
            f"inline-{self._token}-python{platform.python_version()}"
            f"-numpy{np.__version__}-gymnasium{gymnasium.__version__}"
        )
        self._timings = PhaseTimings()
        self._sandboxes: dict[str, InlineSandbox] = {}
        self._records: dict[str, Record] = {}
        self._trusted: dict[Recipe, Trust] = {}
        self._num_sandboxes_made = 0
        self._num_checkpoints_made = 0
        self._is_closed = False
        self._scratch = ScratchFolder()

    @property
    def capabilities(self) -> Capabilities:
        """No wall."""
        return _CAPABILITIES

    @property
    def timings(self) -> PhaseTimings:
        """Where its time went since it was made."""
        return self._timings

    @property
    def num_sandboxes(self) -> int:
        """Live sandboxes."""
        return len(self._sandboxes)

    async def boot(self, image: str) -> InlineSandbox:
        """An empty sandbox; there are no images.

        Raises:
            BootError: The engine is closed.
            CapacityError: There is no room.
        """
        if self._is_closed:
            raise BootError("the inline engine is closed")
        self._make_room(1)
        generators = OwnGenerators(GlobalState.seeded(secrets.randbits(63)))
        env = GuestEnv(seeds_globals=True)
        return self._admit(None, env, None, None, generators, None)

    async def fork(
        self, checkpoint: Checkpoint, n: int = 1, *, randomness: Sequence[Randomness] | None = None
    ) -> list[Sandbox]:
        """Makes exactly n clones, or none and an error.

        Raises:
            ForkError: A copy could not be made.
            CheckpointError: The checkpoint is unknown, discarded, or of another engine.
            CapacityError: There is no room for n more.
            ValueError: n is less than 1, or not the number of randomness policies.
        """
        start_s = perf_counter()
        policies = [Randomness()] * n if randomness is None else randomness
        if n < 1 or len(policies) != n:
            raise ValueError(f"{n} clones with {len(policies)} randomness policies")
        record = self._find(checkpoint)
        self._make_room(n)
        states = [load_state(record.saved) for _ in range(n)]
        clones: list[Sandbox] = [
            self._clone(checkpoint.id, record, state, policy)
            for state, policy in zip(states, policies, strict=True)
        ]
        self._timings.add("restore", perf_counter() - start_s)
        return clones

    async def self_check(self, sandbox: InlineSandbox) -> None:
        """Tests copies of a sandbox's environment (again), as its first checkpoint does.

        Raises:
            CheckpointError: They do not behave as the original; the first difference is named.
            EnvError: The environment cannot be made a second time.
        """
        recipe = sandbox.recipe
        if recipe is not None:
            self._trusted.pop(recipe, None)
            self.trust(recipe)

    async def rebase(self, checkpoint: Checkpoint) -> None:
        """See `Engine.rebase`; a copy costs the same whatever was copied before."""

    async def discard(self, checkpoint: Checkpoint) -> None:
        """Frees what a checkpoint holds. Idempotent."""
        record = self._records.pop(checkpoint.id, None)
        if record is not None and record.folder is not None:
            record.folder.release()

    async def close(self) -> None:
        """Ends every sandbox and checkpoint. Idempotent."""
        self._is_closed = True
        for sandbox in list(self._sandboxes.values()):
            await sandbox.kill()
        self._records.clear()
        self._scratch.remove()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # What its sandboxes need of it

    @property
    def scratch(self) -> ScratchFolder:
        """Where folders are made."""
        return self._scratch

    def trust(self, recipe: Recipe) -> Trust:
        """How environments of a kind are copied; found out once.

        Raises:
            CheckpointError: Copies do not behave as the original.
            EnvError: The environment cannot be made a second time.
        """
        trust = self._trusted.get(recipe)
        if trust is None:
            start_s = perf_counter()
            trust = self._trusted[recipe] = examine(recipe)
            self._timings.add("fidelity", perf_counter() - start_s)
        return trust

    def keep(self, record: Record, parent_id: str | None) -> Checkpoint:
        """Takes in a record and names it."""
        self._num_checkpoints_made += 1
        checkpoint_id = f"inline-{self._token}-{self._num_checkpoints_made}"
        self._records[checkpoint_id] = record
        size = record.saved.private_bytes + (0 if record.folder is None else record.folder.size_bytes)
        return Checkpoint(checkpoint_id, parent_id, "inline", self._fingerprint, "", size)

    def forget(self, sandbox: InlineSandbox) -> None:
        """A sandbox has ended."""
        self._sandboxes.pop(sandbox.id, None)

    def _find(self, checkpoint: Checkpoint) -> Record:
        record = self._records.get(checkpoint.id)
        if checkpoint.fingerprint != self._fingerprint:
            raise CheckpointError(
                f"checkpoint {checkpoint.id} belongs to another {checkpoint.engine} engine "
                f"({checkpoint.fingerprint}); this one is {self._fingerprint}"
            )
        if record is None:
            raise CheckpointError(f"checkpoint {checkpoint.id} is unknown here, or has been discarded")
        return record

    def _make_room(self, n: int) -> None:
        limit = self._config.max_sandboxes
        if len(self._sandboxes) + n > limit:
            live = len(self._sandboxes)
            raise CapacityError(
                f"{live} sandboxes live, {n} more exceed max_sandboxes = {limit}", retryable=True
            )

    def _clone(
        self, checkpoint_id: str, record: Record, state: tuple[Any, Any], how: Randomness
    ) -> InlineSandbox:
        generators = None if record.globals is None else OwnGenerators(record.globals)
        env = GuestEnv(seeds_globals=generators is not None, state=state)
        folder = None if record.folder is None else PrivateFolder(self._scratch, record.folder.hold())
        clone = self._admit(checkpoint_id, env, record.recipe, record.trust, generators, folder)
        clone.reseed(how)
        return clone

    def _admit(
        self,
        parent_id: str | None,
        env: GuestEnv,
        recipe: Recipe | None,
        trust: Trust | None,
        generators: OwnGenerators | None,
        folder: PrivateFolder | None,
    ) -> InlineSandbox:
        self._num_sandboxes_made += 1
        sandbox_id = f"inline-{self._num_sandboxes_made}"
        sandbox = InlineSandbox(self, sandbox_id, parent_id, env, recipe, trust, generators, folder)
        self._sandboxes[sandbox_id] = sandbox
        return sandbox
