"""The package's files that a guest needs: the agent and what it imports, and nothing else of this package.

A guest that has them on its path, with msgpack (and gymnasium with numpy, for environments), can run
`python -m rollout.sandbox.agent`.
"""

from __future__ import annotations

from importlib import resources
from typing import Final

__all__ = ["PAYLOAD", "payload_contents"]

PAYLOAD: Final = (
    "rollout/__init__.py",
    "rollout/errors.py",
    "rollout/spaces.py",
    "rollout/types.py",
    "rollout/sandbox/__init__.py",
    "rollout/sandbox/agent.py",
    "rollout/sandbox/agent_args.py",
    "rollout/sandbox/agent_command.py",
    "rollout/sandbox/agent_exec.py",
    "rollout/sandbox/agent_machine.py",
    "rollout/sandbox/agent_ops.py",
    "rollout/sandbox/guest_env.py",
    "rollout/sandbox/guest_hash.py",
    "rollout/sandbox/guest_init.py",
    "rollout/sandbox/guest_loop.py",
    "rollout/sandbox/guest_ops.py",
    "rollout/sandbox/guest_rng.py",
    "rollout/sandbox/wire.py",
)
"""Paths relative to the folder that goes on the guest's path."""


def payload_contents() -> dict[str, bytes]:
    """The files of `PAYLOAD`, by path."""
    package = resources.files("rollout")
    return {path: package.joinpath(path.removeprefix("rollout/")).read_bytes() for path in PAYLOAD}
