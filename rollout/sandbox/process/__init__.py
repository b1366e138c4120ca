"""The process engine: sandboxes are processes in Linux namespaces, checkpoints are frozen ones.

Read `engine` first, then `keeper`, which tells how a checkpoint works. This package also runs inside the
namespaces, where importing `ProcessEngine` would bring in all of the host's side: it is found on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rollout.sandbox.process.engine import ProcessEngine

__all__ = ["ProcessEngine"]


def __getattr__(name: str) -> object:
    if name == "ProcessEngine":
        from rollout.sandbox.process.engine import ProcessEngine

        return ProcessEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
