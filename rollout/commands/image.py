"""`rollout image`: builds and lists guest images."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from rollout.commands.output import print_json, stderr_console, stdout_console
from rollout.config import ImageConfig, load_config
from rollout.errors import ConfigError
from rollout.sandbox.image.build import build_image
from rollout.sandbox.image.oci import open_oci_image
from rollout.sandbox.image.recipe import recipe_of
from rollout.sandbox.image.store import ImageStore
from rollout.sandbox.payload import payload_contents

__all__ = ["app"]

app = typer.Typer()


@app.command("build")
def build(
    config: Annotated[
        str | None, typer.Option(help="Build the image of this run configuration instead of the default one.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the image in the store.")] = None,
    container: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Make it of a container image: an OCI layout (folder or archive) or a docker save.",
        ),
    ] = None,
) -> None:
    """Build a guest image (kernel, system, wheels, agent), or find it built, and print its digest."""
    image_config = load_config(config).image if config else ImageConfig()
    payload = payload_contents()
    begun_s = time.monotonic()
    console = stderr_console()

    def log(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - begun_s:6.1f} s[/]  {line}", highlight=False)

    store, target = ImageStore(), name or image_config.name
    if container is None:
        recipe = recipe_of(image_config, payload)
        typer.echo(build_image(recipe, payload, name=target, store=store, log=log).digest)
        return
    if name is None:
        raise ConfigError("give an image of a container a name of its own: --name NAME")
    with store.scratch() as scratch, open_oci_image(container, scratch) as opened:
        recipe = recipe_of(image_config, payload, container=opened.digest)
        image = build_image(recipe, payload, name=target, store=store, container=opened, log=log)
    typer.echo(image.digest)


@app.command("list")
def list_images(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the images in the store, with their names, sizes and what they were built from."""
    images = ImageStore().list()
    if json:
        print_json(
            [
                {
                    "digest": image.digest,
                    "names": names,
                    "size_bytes": image.size_bytes,
                    "path": str(image.path),
                    "recipe": dict(image.recipe),
                }
                for image, names in images
            ]
        )
        return
    if not images:
        stderr_console().print("no images yet; build one with: rollout image build")
        return
    table = Table("digest", "names", "MB", "packages", "wheels")
    for image, names in images:
        packages, wheels = (", ".join(image.recipe.get(part, ())) for part in ("packages", "wheels"))
        table.add_row(
            image.digest[:12], ", ".join(names), f"{image.size_bytes / 1e6:.0f}", packages or "-", wheels
        )
    stdout_console().print(table)


@app.command("verify")
def verify(name: Annotated[str, typer.Argument(help="Name or digest.")] = "default") -> None:
    """Read an image in full and compare its checksums."""
    store = ImageStore()
    image = store.find(name)
    store.verify(image)
    typer.echo(f"{image.digest} is whole")
