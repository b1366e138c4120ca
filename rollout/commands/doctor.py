"""`rollout doctor`: what this machine can do, one line each, and what to do about the rest.

Exit code 0 when an engine with a wall can run (process or microvm), 1 when none can.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from rollout.commands.output import print_json, stderr_console, stdout_console
from rollout.doctor import (
    Finding,
    Status,
    isolation_findings,
    machine_findings,
    paging_findings,
    verdicts,
    virtualisation_findings,
)
from rollout.errors import RolloutError
from rollout.report.text import size_text
from rollout.sandbox.image.build import REQUIRED_TOOLS
from rollout.sandbox.image.store import ImageStore, cache_dir
from rollout.sandbox.microvm.probe import probe_kvm

__all__ = ["command", "examine", "guest_image", "image_tools"]

_STYLES = {Status.OK: "green", Status.WARN: "yellow", Status.MISSING: "red"}


def command(
    image: Annotated[str, typer.Option(help="Name or digest of the guest image to look for.")] = "default",
    runs: Annotated[Path, typer.Option(help="Folder that runs are written to.")] = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Say what this machine can do, and what to do about the rest."""
    with stderr_console().status("trying what this machine can do"):
        groups = examine(image, runs)
    if json:
        print_json({name: [finding.to_json() for finding in findings] for name, findings in groups.items()})
    else:
        _print_lines(stdout_console(), groups)
    walls = [finding for finding in groups["engines"] if finding.name != "engine inline"]
    if all(finding.status is Status.MISSING for finding in walls):
        raise typer.Exit(1)


def examine(image: str, runs_folder: Path) -> dict[str, list[Finding]]:
    """All findings by group; the group "engines" says what the others mean for each engine."""
    groups = {
        "machine": machine_findings(runs_folder, cache_dir()),
        "microVMs": [*virtualisation_findings(), kvm_boot(image), guest_image(image), image_tools()],
        "isolation": isolation_findings(),
        "memory": paging_findings(),
    }
    groups["engines"] = verdicts([finding for findings in groups.values() for finding in findings])
    return groups


def kvm_boot(image_name: str) -> Finding:
    """Whether KVM boots Linux here: the microVM engine's own prober boots it, and remembers."""
    name = "Linux under KVM"
    try:
        probe = probe_kvm(ImageStore().find(image_name))
    except RolloutError as error:
        return Finding(name, Status.WARN, "not tried: it needs QEMU and a guest image", _remedy_of(error))
    if probe.works:
        return Finding(name, Status.OK, probe.reason)
    return Finding(name, Status.WARN, probe.reason, "nothing: microVMs run under TCG, several times slower")


def _remedy_of(error: RolloutError) -> str:
    """The part of a message behind its last colon, which is the command that helps."""
    return error.message.rpartition(": ")[2]


def guest_image(name: str, store: ImageStore | None = None) -> Finding:
    """Whether the image that microVMs boot is built and whole."""
    store = store or ImageStore()
    try:
        image = store.find(name)
        store.verify(image)
    except RolloutError as error:
        detail = error.message.partition("; ")[0]
        return Finding("guest image", Status.MISSING, detail, "rollout image build", ("microvm",))
    detail = f"{name}: {image.digest[:12]}, {size_text(image.size_bytes)}, checksums are right"
    return Finding("guest image", Status.OK, detail)


def image_tools() -> Finding:
    """The programs that build images; a machine with a built image does without."""
    missing = {tool: package for tool, package in REQUIRED_TOOLS.items() if shutil.which(tool) is None}
    if missing:
        return Finding(
            "image tools",
            Status.WARN,
            f"no {', '.join(missing)}: images cannot be built here",
            f"apt-get install {' '.join(sorted(set(missing.values())))}",
        )
    return Finding("image tools", Status.OK, ", ".join(REQUIRED_TOOLS))


def _print_lines(console: Console, groups: dict[str, list[Finding]]) -> None:
    findings = [finding for group in groups.values() for finding in group]
    width = max(len(finding.name) for finding in findings)
    for name, group in groups.items():
        console.print(Text(f"\n{name}", style="bold"))
        for finding in group:
            console.print(_line(finding, width), soft_wrap=True)


def _line(finding: Finding, width: int) -> Text:
    line = Text("  ")
    line.append(f"{finding.status.value:<8}", style=_STYLES[finding.status])
    line.append(f"{finding.name:<{width}}  {finding.detail}")
    if finding.remedy and finding.status is not Status.OK:
        line.append(f"  →  {finding.remedy}", style="cyan")
    return line
