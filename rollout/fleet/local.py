"""An engine in this process, without Ray and without a host, that leaves nothing however the process ends."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import AsyncGenerator

from rollout.config import RunConfig
from rollout.env import Env
from rollout.errors import BootError
from rollout.fleet.host import scratch_parent
from rollout.fleet.reaper import OWNER_MARK, Reaper, owned_folder, sweep
from rollout.sandbox.base import Checkpoint, Engine
from rollout.sandbox.branching import LocalBrancher
from rollout.sandbox.engines import make_engine

__all__ = ["local_engine", "prepared_brancher"]


@contextlib.asynccontextmanager
async def prepared_brancher(config: RunConfig, env: Env) -> AsyncGenerator[tuple[LocalBrancher, Checkpoint]]:
    """A brancher over the engine that a run asks for, and the prepared sandbox that its episodes begin from.

    Args:
        config: The run; of `fleet` only `concurrent_branches` counts.
        env: What is played; its spaces are known then.

    Raises:
        RolloutError: The engine cannot be made, or the environment.
    """
    async with local_engine(config) as engine:
        brancher = LocalBrancher(
            engine,
            env,
            image=config.image.name,
            limits=config.engine,
            concurrency=config.fleet.concurrent_branches,
        )
        yield brancher, await brancher.prepare()


@contextlib.asynccontextmanager
async def local_engine(config: RunConfig) -> AsyncGenerator[Engine]:
    """The engine that a run asks for.

    Raises:
        BootError: This machine lacks it.
    """
    parent, token = scratch_parent(), uuid.uuid4().hex[:12]
    sweep(parent)
    try:
        scratch = owned_folder(parent, token)
    except OSError as error:
        raise BootError.wrap(error, f"cannot make a scratch folder in {parent}") from error
    reaper = Reaper(token, [scratch])
    os.environ[OWNER_MARK] = token
    try:
        async with make_engine(config.engine, config.image, scratch) as engine:
            yield engine
    finally:
        del os.environ[OWNER_MARK]
        reaper.close()
