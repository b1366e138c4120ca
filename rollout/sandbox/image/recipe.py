"""What an image is made of. Pure: equal recipes have equal keys, and nothing here touches the machine.

The key says what was asked for; the digest of the built image (see `store`) says what came out. Debian's
archive moves, so one key can give different digests on different days.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata

from rollout.config import ImageConfig

__all__ = ["DEFAULT_WHEELS", "GUEST_PYTHON", "SUITE", "Recipe", "payload_digest", "recipe_of"]

SUITE = "bookworm"
"""The Debian release of guests."""
GUEST_PYTHON = "3.11"
"""The Python of that release; wheels are fetched for it, whatever the host runs."""
DEFAULT_WHEELS = ("msgpack", "numpy", "gymnasium")
"""What every guest has, at the host's versions, so that both sides compute alike."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an image is built from.

    Attributes:
        packages: Debian packages beside the minimal system and Python, sorted.
        wheels: Python requirements, sorted, with exact versions for the default ones.
        payload_sha256: Digest of the guest agent's files.
        suite: Debian release.
        container: Digest of the container image whose files the guest has instead of the Debian system's;
            empty for none.
        layout: Version of the builder's own layout: raised when the same parts would be assembled
            differently.
    """

    packages: tuple[str, ...]
    wheels: tuple[str, ...]
    payload_sha256: str
    suite: str = SUITE
    layout: int = 1
    container: str = ""

    @property
    def key(self) -> str:
        """Equal for equal recipes."""
        parts = asdict(self)
        if not self.container:
            del parts["container"]  # so that it has the key that it had before there were containers
        return _sha256_of(parts)

    @property
    def system_key(self) -> str:
        """The part of the key that decides the Debian system, the slowest stage of a build."""
        return _sha256_of({"packages": self.packages, "suite": self.suite, "layout": self.layout})


def recipe_of(config: ImageConfig, payload: Mapping[str, bytes], *, container: str = "") -> Recipe:
    """The recipe of a configured image with the agent's files as they are now.

    Args:
        config: What is configured.
        payload: The agent's files.
        container: Digest of a container image.
    """
    pinned = tuple(f"{name}=={metadata.version(name)}" for name in DEFAULT_WHEELS)
    return Recipe(
        packages=tuple(sorted(set(config.packages))),
        wheels=tuple(sorted({*pinned, *config.wheels})),
        payload_sha256=payload_digest(payload),
        container=container,
    )


def payload_digest(payload: Mapping[str, bytes]) -> str:
    """SHA-256 over the agent's files and their paths."""
    digest = hashlib.sha256()
    for path, content in sorted(payload.items()):
        digest.update(f"{path}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _sha256_of(value: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
