"""`rollout checkpoint`: moves the state of a node of a run to another machine.

Checkpoints live in the memory of an engine, which ends with its run. So an export makes the node again, from
the lineage that the run recorded, compares it with the record, and writes it to a folder or an object store.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rollout.commands.output import RUN_HELP, find_run, print_json
from rollout.commands.show import find_episode
from rollout.config import EngineConfig, ImageConfig
from rollout.errors import CheckpointError, ConfigError, EnvError
from rollout.report.summary import summarise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rollout.config import RunConfig
    from rollout.replay import RecordedEpisode, Row

__all__ = ["app"]

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Where = Annotated[str, typer.Argument(help="Folder, or a URI such as s3://bucket/checkpoints.")]


@app.command("export")
def export(
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
    episode: Annotated[str, typer.Argument(help="Number of an episode, or the beginning of its id.")],
    to: Annotated[str, typer.Option(help="Folder, or a URI such as s3://bucket/checkpoints.")],
    move: Annotated[int, typer.Option(min=0, help="Before this move.")] = 0,
    node: Annotated[int, typer.Option(min=0, help="A node of the tree of that move; 0 is its root.")] = 0,
    json: Json = False,
) -> None:
    """Make the state of a node again and export it with its ancestors, its base and its image."""
    from rollout.fleet.record import read_description
    from rollout.fleet.resume import recorded_config
    from rollout.replay import read_episode, read_tree

    folder = find_run(run)
    config = recorded_config(read_description(folder))
    if config.engine.kind not in ("microvm", "auto"):
        raise ConfigError(f"only checkpoints of microVMs move; this run was played on {config.engine.kind}")
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": "microvm"})})
    chosen = find_episode(summarise(folder), episode)
    recorded = read_episode(folder, chosen.episode_id)
    tree = read_tree(folder, chosen.episode_id, move) if node else []
    origin = {
        "run_id": recorded.episode["run_id"],
        "episode_id": chosen.episode_id,
        "move": move,
        "node": node,
        "env": config.env.model_dump(mode="json"),
    }
    checkpoint_id, num_ancestors = asyncio.run(_export(config, recorded, tree, origin, to))
    if json:
        print_json({"id": checkpoint_id, "ancestors": num_ancestors, "to": to, "origin": origin})
    else:
        print(checkpoint_id)


@app.command("import")
def import_(
    location: Where,
    checkpoint: Annotated[str, typer.Argument(help="Its id; may be left out if there is only one.")] = "",
    json: Json = False,
) -> None:
    """Read a checkpoint in full, restore it once and say what it is; exit 1 if that fails."""
    found = asyncio.run(_import(location, checkpoint))
    if json:
        print_json(found)
        return
    for name, value in found.items():
        print(f"{name.replace('_', ' ')}: {'-' if value is None else value}")


@app.command("list")
def list_checkpoints(location: Where) -> None:
    """List the checkpoints in a folder."""
    from rollout.sandbox.microvm.transfer import Depot

    for name in Depot(location).ids():
        print(name)


async def _export(
    config: RunConfig, recorded: RecordedEpisode, tree: list[Row], origin: Mapping[str, Any], to: str
) -> tuple[str, int]:
    from rollout.fleet.local import local_engine
    from rollout.loading import load_env
    from rollout.replay import Replayer
    from rollout.sandbox.branching import LocalBrancher
    from rollout.sandbox.microvm.engine import MicroVMEngine
    from rollout.sandbox.microvm.export import export_checkpoints

    env = load_env(config.env)
    async with local_engine(config) as engine:
        assert isinstance(engine, MicroVMEngine)
        brancher = LocalBrancher(engine, env, image=config.image.name, limits=config.engine)
        await brancher.prepare()
        replayer = Replayer(env, brancher, config.max_steps)
        lineage, first = await replayer.reach(recorded, tree, origin["move"], origin["node"])
        if first is not None:
            raise CheckpointError(
                f"the node cannot be made again: at {first.where}, {first.what} was {first.recorded}, "
                f"and is {first.played} now"
            )
        await export_checkpoints(engine, lineage, to, origin=origin)
        return lineage[-1].id, len(lineage) - 1


async def _import(location: str, checkpoint_id: str) -> dict[str, Any]:
    from rollout.sandbox.microvm.engine import MicroVMEngine
    from rollout.sandbox.microvm.export import import_checkpoint
    from rollout.sandbox.microvm.transfer import Depot
    from rollout.types import Randomness, RngPolicy

    depot = Depot(location)
    if not checkpoint_id:
        there = depot.ids()
        if len(there) != 1:
            raise ConfigError(
                f"{location} has {len(there)} checkpoints: name one of them (see checkpoint list)"
            )
        checkpoint_id = there[0]
    # Not as a run gets one, which needs a guest image first: the image comes with the checkpoint.
    async with MicroVMEngine(_config_for(depot.record(checkpoint_id)), ImageConfig()) as engine:
        lineage, origin = await import_checkpoint(engine, location, checkpoint_id)
        checkpoint = lineage[-1]
        [clone] = await engine.fork(checkpoint, randomness=[Randomness(RngPolicy.INHERIT)])
        try:
            state_hash = await clone.call("env.state_hash")
        except EnvError:  # there is no environment in it
            state_hash = None
    return {
        "id": checkpoint.id,
        "ancestors_here": len(lineage) - 1,
        "parent": checkpoint.parent_id,
        "image": checkpoint.image_digest,
        "fingerprint": checkpoint.fingerprint,
        "state_hash": state_hash,
        "origin": origin,
    }


def _config_for(record: Mapping[str, Any]) -> EngineConfig:
    """Settings of an engine for a checkpoint, as far as this machine can have them."""
    try:
        machine = record["machine"]
        memory_mib, accel = int(machine["memory_mib"]), machine["accel"]
        if accel not in ("kvm", "tcg") or not 64 <= memory_mib <= 65536:
            raise ValueError("there is no such machine")
    except (LookupError, ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint is damaged: {error!r}") from error
    return EngineConfig(kind="microvm", memory_mib=memory_mib, accel=accel)
