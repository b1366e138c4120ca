"""Whether the state that a branch led to is saved at once, or only when something begins there.

Most leaves of a search are never branched from, and saving one is no small part of a branch: a process that
is saved must be woken for its playout, a machine writes pages. A state that is not saved is made by playing
its branch again, from its parent's checkpoint, when a job first names it; what it costs then is more than a
save. Which is cheaper is measured, by running medians over whole branches, so that whatever a save entails
later in a branch counts as well:

| way | what a branch costs |
|---|---|
| `save` | the branch, with its save |
| `defer` | the branch without it, and a replay for the share of such states that something began from |

Before anything is deferred, `NUM_SAVED` branches were saved, and `NUM_PROBES` of these were played again and
came out the same, in their state's hash where there is one, and in what was observed. One difference, or a
save that failed, and nothing is deferred from then on. Results never depend on the way that was taken:
a replay that comes out different is refused.

Seen on two cores, a FrozenLake at 64 simulations a move, random playouts: processes take a sixth to a third
less time and 20 to 40% less CPU; inline, where a save is a pickle, the two ways are about equal.

A branch without a playout may leave its sandbox as an heir (see `rollout.sandbox.heirs`), saved or not: a
state that was left unsaved is then saved late, from the heir, if its first child comes in time.

Ways that are not taken: replaying although the checkpoint is held, as a replay begins with a clone of an
ancestor and so costs a clone and the steps; and going on in a sandbox that was never saved, as nothing could
tell then that it is what a clone would be.

Pure bookkeeping; whoever does the work brings the seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout.sandbox.economics import RunningMedian, WayEstimate, choose_way

__all__ = ["NUM_PROBES", "NUM_SAVED", "Deferral"]

NUM_SAVED = 16
NUM_PROBES = 4
_PRIOR_NEEDED, _PRIOR_DEFERRED = 8, 16
"""What the share of states that are needed begins from: a half, as heavy as so many branches."""


@dataclass(slots=True)
class _Account:
    """Branches of one sort."""

    saved: RunningMedian = field(default_factory=RunningMedian)
    deferred: RunningMedian = field(default_factory=RunningMedian)
    num_saved: int = 0
    num_deferred: int = 0
    num_needed: int = 0


class Deferral:
    """Decides for one brancher. Branches with a playout and without have accounts of their own."""

    def __init__(self) -> None:
        self._accounts = {True: _Account(), False: _Account()}
        self._again = RunningMedian()
        self._num_probes_begun = 0
        self._num_probes_passed = 0
        self.is_forbidden = False

    @property
    def is_verified(self) -> bool:
        """Whether this environment was seen to repeat, and nothing spoke against it since."""
        return not self.is_forbidden and self._num_probes_passed >= NUM_PROBES

    @property
    def is_probing(self) -> bool:
        """Whether branches are still to be played again."""
        return not self.is_forbidden and self._num_probes_begun < NUM_PROBES

    def begins_probe(self) -> bool:
        """Whether the branch that was just saved is to be played again; true `NUM_PROBES` times."""
        num_saved = sum(account.num_saved for account in self._accounts.values())
        if self.is_forbidden or num_saved < NUM_SAVED or self._num_probes_begun >= NUM_PROBES:
            return False
        self._num_probes_begun += 1
        return True

    def probed(self, duration_s: float, *, is_same: bool) -> None:
        """Takes in what a probe came to."""
        if is_same:
            self._num_probes_passed += 1
            self._again.add(duration_s)
        else:
            self.forbid()

    def forbid(self) -> None:
        """Nothing is deferred any more."""
        self.is_forbidden = True

    def defers(self, *, has_playout: bool) -> bool:
        """Whether the next branch of this sort leaves its state unsaved."""
        if not self.is_verified:
            return False
        account = self._accounts[has_playout]
        needed_share = (account.num_needed + _PRIOR_NEEDED) / (account.num_deferred + _PRIOR_DEFERRED)
        later_s = min(1.0, needed_share) * self._again.value
        if later_s > account.saved.value:  # what is made later costs more alone: nothing to find out
            return False
        deferred_s = account.deferred.value + later_s
        save = WayEstimate("save", account.saved.value, account.num_saved)
        defer = WayEstimate("defer", deferred_s, account.num_deferred)
        return choose_way([save, defer]) == "defer"

    def branched(self, duration_s: float, *, has_playout: bool, is_deferred: bool) -> float:
        """Takes in a branch; returns the seconds that deferring saved, as far as is known now."""
        account = self._accounts[has_playout]
        if not is_deferred:
            account.num_saved += 1
            account.saved.add(duration_s)
            return 0.0
        account.num_deferred += 1
        account.deferred.add(duration_s)
        return account.saved.value - duration_s

    def needed(self, duration_s: float, *, has_playout: bool) -> None:
        """Takes in that a deferred state was made after all."""
        self._accounts[has_playout].num_needed += 1
        self._again.add(duration_s)
