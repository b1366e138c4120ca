"""Moves a sandbox to another host, by a folder that both can reach: it hibernates here and wakes there.

It is the same sandbox afterwards: its name, its host name, its memory, files and processes, and what its
guest had open are as they were, and nothing is reseeded; only the guest's wall clock is set.

Invariants:

- It lives on one host at a time. It ends here only when all of it is in the folder, and whoever takes it
  removes its file there first; the second one to try is refused.
- Whatever fails on the way out, it is hibernated here as before. What fails on the way in leaves it in the
  folder, but for a death between the removal of that file and the first request: then its checkpoint, which
  stays, can be imported (`rollout.sandbox.microvm.export`).

Not guaranteed: that two hosts which take it from an object store in the same instant do not both get it. A
folder of a file system lets only one remove a file. Nor, where a store took the record, lost its answer and
cannot be reached to take the record back, that nobody takes it there while the sandbox stays here.
"""

from __future__ import annotations

import asyncio
import contextlib

from rollout.errors import CheckpointError
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.microvm.export import export_checkpoints, import_content
from rollout.sandbox.microvm.sandbox import MicroVMSandbox
from rollout.sandbox.microvm.transfer import Depot

__all__ = ["move_in", "move_out"]


async def move_out(engine: MicroVMEngine, sandbox: MicroVMSandbox, location: str) -> None:
    """Writes a sandbox to a folder and ends it here.

    Args:
        engine: Whose sandbox.
        sandbox: In any state but dead.
        location: A local path or a URI of `pyarrow.fs`.

    Raises:
        CheckpointError: It could not be saved or written, or its commands are listened to.
        GuestError: It is dead.
    """
    depot = Depot(location)
    async with sandbox.departing() as checkpoint:
        try:
            await export_checkpoints(engine, [checkpoint], location)
            record = {
                "checkpoint": checkpoint.id,
                "parent_id": sandbox.parent_id,
                "generation": sandbox.generation,
                "keeps_running": sandbox.keeps_running,
                "has_background": sandbox.has_background,
            }
            try:
                await engine.in_thread(lambda: depot.put_record(sandbox.id, record, kind="sandboxes"))
            except BaseException:  # cancelled, or the answer was lost: it stays here, so it must not be there
                with contextlib.suppress(CheckpointError):  # it is not
                    await asyncio.shield(engine.in_thread(lambda: depot.take(sandbox.id)))
                raise
        finally:
            await engine.discard(checkpoint)


async def move_in(engine: MicroVMEngine, location: str, sandbox_id: str) -> MicroVMSandbox:
    """Takes a sandbox from a folder; it wakes with its next request.

    Args:
        engine: Where it is to live.
        location: A local path or a URI of `pyarrow.fs`.
        sandbox_id: Its name.

    Raises:
        CheckpointError: It is not there (any more), damaged, or of another machine.
        BootError: Its image is of another version of this package, or the cache cannot be written.
        CapacityError: There is no room.
        ForkError: One of that name lives here.
    """
    depot = Depot(location)
    record = await engine.in_thread(lambda: depot.record(sandbox_id, kind="sandboxes"))
    match record:
        case {
            "checkpoint": str(checkpoint_id),
            "parent_id": str() | None as parent_id,
            "generation": int(generation),
            "keeps_running": bool(keeps_running),
            "has_background": bool(has_background),
        }:
            pass
        case _:
            raise CheckpointError(f"the sandbox {sandbox_id} in {depot.location} is damaged")
    content = await import_content(engine, location, checkpoint_id)
    sandbox = engine.admit(sandbox_id, parent_id, *content)
    sandbox.generation = generation
    is_taken = False

    def take() -> None:
        nonlocal is_taken
        depot.take(sandbox_id)
        is_taken = True

    try:
        await engine.in_thread(take)
    except BaseException:
        if is_taken:  # cancelled: it goes back to where it was
            await asyncio.shield(
                engine.in_thread(lambda: depot.put_record(sandbox_id, record, kind="sandboxes"))
            )
        await sandbox.kill()
        raise
    sandbox.keep_running(keeps_running)
    if has_background:
        sandbox.expect_background()
    return sandbox
