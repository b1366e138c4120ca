"""Limits of running VMMs: processor time, with more of it at first, and memory.

A clone that has just been made does its dearest work in its first moments (waking, its first calls), so it
may have a boost: a larger share of a core for some seconds, and then its steady share. Enforced by control
groups; asked for where they cannot be made, it is an error and not a silence.
"""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle

from rollout.config import EngineConfig
from rollout.errors import ForkError
from rollout.sandbox.control_groups import ControlGroups, Group
from rollout.sandbox.microvm.vmm import Vmm

__all__ = ["VmmLimits"]


class VmmLimits:
    """Puts VMMs under an engine's limits. On the event loop only.

    Args:
        config: What is asked for; with nothing, nothing is made.

    Raises:
        BootError: It cannot be enforced here.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._groups: ControlGroups | None = None
        self._held: dict[int, tuple[Vmm, Group]] = {}
        self._boosts: dict[int, TimerHandle] = {}
        if self.names:
            self._groups = ControlGroups.make(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """The controllers that are asked for."""
        config = self._config
        wanted = (("cpu", config.cpu_share), ("memory", config.memory_ceiling_mib))
        return tuple(name for name, limit in wanted if limit is not None)

    def put_on(self, vmm: Vmm) -> None:
        """Limits a VMM that is about to run, from the start or anew.

        Raises:
            ForkError: It has ended, or the kernel refuses.
        """
        if self._groups is None:
            return
        self._let_go_of_ended()
        try:
            group = self._group_of(vmm)
            if (share := self._config.cpu_share) is not None:
                self._boost(vmm.pid, group, share)
        except OSError as error:
            raise ForkError.wrap(error, f"cannot limit VMM {vmm.pid}") from error

    def close(self) -> None:
        """Removes the groups; the VMMs must have ended. Idempotent."""
        for timer in self._boosts.values():
            timer.cancel()
        self._boosts.clear()
        if self._groups is not None:
            for _, group in self._held.values():
                self._groups.leave(group)
            self._held.clear()
            self._groups.close()

    def _group_of(self, vmm: Vmm) -> Group:
        assert self._groups is not None
        if vmm.pid in self._held:
            return self._held[vmm.pid][1]
        group = self._groups.new()
        if (ceiling_mib := self._config.memory_ceiling_mib) is not None:
            group.limit_memory(ceiling_mib << 20)
        group.add(vmm.pid)
        self._held[vmm.pid] = (vmm, group)
        return group

    def _boost(self, pid: int, group: Group, share: float) -> None:
        if (running := self._boosts.pop(pid, None)) is not None:
            running.cancel()
        if self._config.boost_s == 0:
            group.limit_cpu(share)
            return
        group.limit_cpu(max(share, self._config.boost_share))
        loop = asyncio.get_running_loop()
        self._boosts[pid] = loop.call_later(self._config.boost_s, self._end_boost, pid, group, share)

    def _end_boost(self, pid: int, group: Group, share: float) -> None:
        self._boosts.pop(pid, None)
        try:
            group.limit_cpu(share)
        except FileNotFoundError:  # the VMM has ended, and its group with it
            return

    def _let_go_of_ended(self) -> None:
        assert self._groups is not None
        for pid in [pid for pid, (vmm, _) in self._held.items() if vmm.is_closed]:
            self._groups.leave(self._held.pop(pid)[1])
            if (timer := self._boosts.pop(pid, None)) is not None:
                timer.cancel()
