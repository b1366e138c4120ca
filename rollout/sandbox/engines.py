"""Picks and makes the engine that a configuration asks for, or says what this machine lacks for it.

`auto` takes the strongest wall that is there: microvm, then process. It never takes `inline`, which has no
wall: that one is asked for by name. What is checked here is cheap (programs, an image, one bubblewrap call);
whether KVM really boots Linux is probed by the microvm engine itself, which falls back to TCG.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import BootError
from rollout.sandbox.base import Engine

__all__ = ["EngineChoice", "EngineKind", "choose_engine_kind", "make_engine", "what_is_missing"]

EngineKind = Literal["inline", "process", "microvm"]

_PROBE_TIMEOUT_S = 20.0
_WALLS: dict[EngineKind, str] = {
    "inline": "no wall: environments run in this process, so trust them",
    "process": "a process in Linux namespaces: it shares this machine's kernel",
    "microvm": "a whole virtual machine with its own kernel",
}


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """What `choose_engine_kind` decided.

    Attributes:
        kind: The engine to make.
        wall: One line: what stands between a guest and this machine.
        hint: None, or one line: why it is not the strongest wall, and how to get that one.
    """

    kind: EngineKind
    wall: str
    hint: str | None = None


def choose_engine_kind(engine: EngineConfig, image: ImageConfig) -> EngineChoice:
    """The engine that is asked for, or for `auto` the strongest that this machine has.

    Raises:
        BootError: This machine lacks it; the message names what is missing and the command that installs it.
    """
    if engine.kind != "auto":
        if missing := what_is_missing(engine.kind, image):
            raise BootError(f"the {engine.kind} engine cannot run here: {missing}")
        return EngineChoice(engine.kind, _WALLS[engine.kind])
    no_microvm = what_is_missing("microvm", image)
    if no_microvm is None:
        return EngineChoice("microvm", _WALLS["microvm"])
    no_process = what_is_missing("process", image)
    if no_process is None:
        return EngineChoice("process", _WALLS["process"], f"for microVMs: {no_microvm}")
    raise BootError(
        f"no engine with a wall can run here: microvm: {no_microvm}; process: {no_process}; "
        "for environments that you trust, set engine.kind to 'inline'"
    )


def what_is_missing(kind: EngineKind, image: ImageConfig) -> str | None:
    """What this machine lacks for an engine and the command that brings it; None if nothing does."""
    if kind == "inline":
        return None
    if kind == "process":
        return _missing_for_process()
    return _missing_for_microvm(image)


def make_engine(engine: EngineConfig, image: ImageConfig, scratch_dir: Path) -> Engine:
    """Makes the engine that `choose_engine_kind` picks.

    Args:
        engine: Its settings.
        image: The guest image of microVMs.
        scratch_dir: An existing folder for what the engine holds while it lives; the caller removes it.

    Raises:
        BootError: This machine lacks it.
    """
    kind = choose_engine_kind(engine, image).kind
    if kind == "inline":
        from rollout.sandbox.inline import InlineEngine

        return InlineEngine(engine)
    if kind == "process":
        from rollout.sandbox.process import ProcessEngine

        return ProcessEngine(engine, scratch_dir)
    from rollout.sandbox.microvm.engine import MicroVMEngine

    return MicroVMEngine(engine, image, scratch_dir)


def _missing_for_process() -> str | None:
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed; run: apt-get install bubblewrap"
    probe = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    try:
        done = subprocess.run(probe, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"bubblewrap did not make namespaces within {_PROBE_TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return None
    reason = done.stderr.decode(errors="replace").strip().splitlines()
    return (
        f"namespaces are not allowed ({reason[-1] if reason else f'bwrap exits {done.returncode}'}); "
        "run as root, or: sysctl -w kernel.unprivileged_userns_clone=1"
    )


def _missing_for_microvm(image: ImageConfig) -> str | None:
    if shutil.which("qemu-system-x86_64") is None:
        return "QEMU is not installed; run: apt-get install qemu-system-x86"
    from rollout.sandbox.image.store import ImageStore
    from rollout.sandbox.payload import payload_contents

    try:
        ImageStore().find_current(image.name, payload_contents())
    except BootError as error:
        return error.message
    return None
