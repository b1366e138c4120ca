"""Ray: the cluster of a run, and the clients of host actors on it. The only module that knows Ray.

Without `RAY_ADDRESS` a run gets a Ray of its own: on loopback, without dashboard, in a folder of its own that
a reaper removes when the driver is gone, however it goes. With it (`ray job submit` sets it) the run is a
guest on that cluster and leaves it as it was.

A host actor is created with `num_cpus=0`: what it starts is not Ray's to count, and a node with two cores
must not wait for a third.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import uuid
from collections.abc import Awaitable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray._private import ray_constants
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rollout.branch import BranchJob, BranchResult, Opening
from rollout.config import RunConfig
from rollout.env import Task
from rollout.errors import BootError, RolloutError
from rollout.fleet.client import HostLostError
from rollout.fleet.host import Host
from rollout.fleet.messages import HostInfo, HostStats, Reply
from rollout.fleet.reaper import OWNER_MARK, Reaper, owned_folder, sweep
from rollout.sandbox.base import Checkpoint

__all__ = ["Cluster", "RayHostClient", "cluster"]

T = TypeVar("T")

_OBJECT_STORE_BYTES = 256 << 20
_MAX_SOCKET_FOLDER = 40
"""Longest folder below which Ray's socket names stay within the 107 bytes that the kernel allows."""
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray that is connected to.

    Attributes:
        address: Where it is.
        node_ids: Its living nodes, in a fixed order; hosts are spread over them in turn.
        is_own: It was started for this run, and ends with it.
    """

    address: str
    node_ids: Sequence[str]
    is_own: bool


@contextlib.contextmanager
def cluster(num_hosts: int) -> Generator[Cluster]:
    """Connects to the Ray that is there, or starts one for as long as the context lasts.

    Raises:
        BootError: It cannot be reached or started.
    """
    if ray.is_initialized():
        yield _connected(is_own=False)
        return
    with contextlib.ExitStack() as stack:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        is_own = not os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        reaper: Reaper | None = None
        if is_own:
            folder, reaper = stack.enter_context(_own_folder())
            options |= {
                "address": "local",
                "num_cpus": num_hosts,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_temp_dir": str(folder),
            }
            stack.enter_context(_loopback_only())
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises bare exceptions here, of any kind
            if is_own:
                raise BootError.wrap(error, "cannot start a local Ray") from error
            raise BootError.wrap(
                error,
                f"cannot reach the Ray at {os.environ['RAY_ADDRESS']} (one that asks for a token needs "
                "RAY_AUTH_MODE=token, and the token in the folder .ray of the home directory)",
            ) from error
        stack.callback(ray.shutdown)
        if reaper is not None:
            reaper.note_descendants()  # Ray's processes hide their marks
        yield _connected(is_own)


class RayHostClient:
    """A `HostClient` over an actor that is created here.

    Args:
        config: The run.
        node_id: The node that the actor goes to, as long as it is there.
    """

    def __init__(self, config: RunConfig, node_id: str) -> None:
        where = NodeAffinitySchedulingStrategy(node_id, soft=True)
        actor_class: Any = ray.remote(Host)
        self._actor: Any = actor_class.options(
            num_cpus=0, max_restarts=0, max_task_retries=0, scheduling_strategy=where
        ).remote(config, node_id)

    async def start(self, epoch: int) -> HostInfo:
        """See `Host.start`."""
        return await _answer(self._actor.start.remote(epoch))

    async def open(self, epoch: int, key: str, task: Task, seed: int) -> Reply[Opening]:
        """See `Host.open`."""
        return await _answer(self._actor.open.remote(epoch, key, task, seed))

    async def run(self, epoch: int, key: str, jobs: Sequence[BranchJob]) -> Reply[list[BranchResult]]:
        """See `Host.run`."""
        return await _answer(self._actor.run.remote(epoch, key, jobs))

    async def release(self, epoch: int, checkpoints: Sequence[Checkpoint]) -> None:
        """See `Host.release`."""
        await _answer(self._actor.release.remote(epoch, checkpoints))

    async def renew(self, epoch: int) -> HostStats:
        """See `Host.renew`."""
        return await _answer(self._actor.renew.remote(epoch))

    async def close(self) -> None:
        """See `Host.close`."""
        await _answer(self._actor.close.remote())

    def kill(self) -> None:
        """Ends the actor's process at once. Idempotent."""
        ray.kill(self._actor, no_restart=True)


async def _answer(reference: Awaitable[T]) -> T:
    """Waits for a call; a Ray error becomes ours."""
    try:
        return await reference
    except RayTaskError as error:
        cause: object = error.cause
        if isinstance(cause, RolloutError):
            raise cause from None
        raise
    except RayError as error:  # the actor died, was killed for want of memory, or cannot be reached
        raise HostLostError(f"the host is gone: {str(error).splitlines()[0]}") from error


def _connected(is_own: bool) -> Cluster:
    nodes: list[dict[str, Any]] = ray.nodes()
    living = sorted(str(node["NodeID"]) for node in nodes if node["Alive"])
    return Cluster(ray.get_runtime_context().gcs_address, living, is_own)


@contextlib.contextmanager
def _loopback_only() -> Generator[None]:
    """Makes a Ray that is started here listen on loopback alone.

    Ray has no argument for that: asked for 127.0.0.1 it takes the address of a network interface instead,
    unless this switch, made for systems whose firewall would ask the user, says that the machine is no part
    of a larger cluster. It is read from the environment when Ray is imported, here and in Ray's own
    processes.
    """
    before = os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        if before[0] is None:
            del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]
        else:
            os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = before[0]
        ray_constants.ENABLE_RAY_CLUSTER = before[1]


@contextlib.contextmanager
def _own_folder() -> Generator[tuple[Path, Reaper]]:
    """A folder for Ray's own files; when this process is gone, so are they and Ray's processes."""
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > _MAX_SOCKET_FOLDER:
        parent = Path("/tmp")
    sweep(parent)
    token = uuid.uuid4().hex[:12]
    before = os.environ.get(OWNER_MARK)
    folder = owned_folder(parent, token)
    reaper = Reaper(token, [folder])
    os.environ[OWNER_MARK] = token
    try:
        yield folder, reaper
    finally:
        if before is None:
            del os.environ[OWNER_MARK]
        else:
            os.environ[OWNER_MARK] = before
        reaper.close()
