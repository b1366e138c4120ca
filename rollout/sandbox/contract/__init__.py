"""The engine contract as checks that any engine can be run through: ours in the tests, yours in your own.

    for check in CHECKS:
        async with make_my_engine() as engine:
            await check(engine)

Each check gets a fresh engine, boots what it needs, and raises `ContractViolation` (an `AssertionError`) that
says what was promised. The sandboxes need Python with gymnasium, a POSIX shell and the usual small
programs, tar among them. Paths are relative: where a sandbox's private files lie is the engine's affair.

Not checked: walls, limits, speed, what is left behind after `close` (that needs a look from outside), and
behaviour under faults.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from rollout.sandbox.base import Engine
from rollout.sandbox.contract import commands, episodes, forks, takeovers
from rollout.sandbox.contract.episodes import seeded_trace
from rollout.sandbox.contract.tools import ContractViolation

__all__ = ["CHECKS", "Check", "ContractViolation", "seeded_trace"]

Check = Callable[[Engine], Awaitable[None]]

CHECKS: Final[tuple[Check, ...]] = (
    commands.check_boot,
    commands.check_exec,
    commands.check_exec_that_cannot_start,
    commands.check_exec_time_limit,
    commands.check_exec_output_limit,
    commands.check_cancelled_exec,
    commands.check_files,
    commands.check_background_commands,
    commands.check_signals,
    commands.check_saved_commands,
    commands.check_folders,
    episodes.check_calls,
    episodes.check_arrays,
    episodes.check_seeded,
    episodes.check_unique,
    episodes.check_inherit,
    episodes.check_playout,
    episodes.check_state_hash,
    forks.check_checkpoint,
    forks.check_checkpoint_again,
    forks.check_another_life,
    forks.check_depth,
    forks.check_siblings,
    forks.check_rebase,
    forks.check_exactly_n,
    forks.check_hibernate,
    forks.check_kill,
    forks.check_discard,
    forks.check_foreign_checkpoints,
    forks.check_many_at_once,
    forks.check_close,
    takeovers.check_take_over_seeded,
    takeovers.check_take_over_unique,
    takeovers.check_take_over_inherit,
    takeovers.check_take_over_again,
    takeovers.check_take_over_spoilt,
    takeovers.check_take_over_siblings,
    takeovers.check_take_over_without_checkpoint,
)
"""All of them; each wants an engine of its own."""
