"""Which sandboxes are kept after their branch, and which children go on in one instead of a clone.

A branch that was saved and not spoilt by a playout leaves a sandbox that is exactly as its checkpoint: the
checkpoint's *heir*. The next job that names the checkpoint may go on in it (`Sandbox.take_over`). Three ways
lead to a child, and running medians decide, once each was tried:

| way | what is done |
|---|---|
| `clone` | the checkpoint is forked; the heir waits for another child |
| `continue` | the heir goes on as the child; the checkpoint stays for others |
| `inherit` | the last child of a node: the checkpoint is given up first, and the heir goes on |

A checkpoint of the process engine is the stopped sandbox itself: while it is held, what goes on is a copy,
which costs what a clone does, and only to inherit is cheap there. A checkpoint that is given up is as one
that was evicted: if the last child fails, its next attempt makes it again. So that is only done where states
were seen to repeat, and while nobody else needs it.

Seen on two busy cores, FrozenLake, medians in ms of `rollout bench sandbox`: a child from its parent's
checkpoint to its own (sandbox, step, save),

| engine | in a clone | in its parent's sandbox | inheriting it |
|---|---|---|---|
| inline | 0.131 | 0.071 | 0.071 |
| process | 15.6 | 15.3 | 6.8 |
| microvm | 30.2 | 19.7 | 18.7 |

Rollouts without a search, where every child is the last, ran 1.3 to 1.4 times as fast inline, 2.3 to 2.5
times with processes, 1.6 times with microVMs. In a search that values leaves 0 a seventh to a third of the
children find an heir, eight slots being all that live at once; what that saved was within the noise.

Invariants: a checkpoint has at most one heir, which is taken once; of those that must make room the least
recently kept goes first. There is no heir after a playout, which spoils the sandbox. One of a state that was
left unsaved is saved when its child comes.

Pure bookkeeping: whoever takes a sandbox from here owns it, and the place that it takes up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from rollout.branch import BranchJob
from rollout.sandbox.base import Sandbox
from rollout.sandbox.economics import WINDOW, Economics, choose_way

__all__ = ["WAYS", "Heirs"]

WAYS: Final = ("inherit", "continue", "clone")
"""The ways to a child of a state that is held."""
_SELDOM = 16
"""If fewer than one in so many heirs found a child, only one in so many sandboxes is kept."""


class Heirs:
    """The heirs of one brancher.

    Args:
        economics: What the ways have cost.
        ways: Those that may be taken; `clone` is always the last resort.
    """

    def __init__(self, economics: Economics, ways: Collection[str] = WAYS) -> None:
        self._economics = economics
        self._ways = frozenset(ways)
        self._heirs: dict[str, Sandbox] = {}
        self._fates: deque[bool] = deque(maxlen=WINDOW)
        """Of the last heirs that are gone: whether a child took them; `_num_taken` of them."""
        self._num_taken = 0
        self._num_passed_over = 0

    def __len__(self) -> int:
        return len(self._heirs)

    def wants_one(self) -> bool:
        """Whether the sandbox that a branch has left is worth keeping.

        It is if some way that needs it is not the dearer one, and a child is likely to come in time.
        """
        if len(self._fates) == WINDOW and self._num_taken * _SELDOM < WINDOW:
            self._num_passed_over = (self._num_passed_over + 1) % _SELDOM
            if self._num_passed_over:
                return False
        return any(self._choose([way, "clone"]) == way for way in ("continue", "inherit"))

    @property
    def continues(self) -> bool:
        """Whether a child goes on in a sandbox that nobody else has a use for, instead of a clone."""
        return self._choose(["continue", "clone"]) == "continue"

    def put(self, checkpoint_id: str, sandbox: Sandbox) -> None:
        """Keeps a sandbox as the heir of a checkpoint that has none."""
        assert checkpoint_id not in self._heirs
        self._heirs[checkpoint_id] = sandbox

    def take(self, checkpoint_id: str) -> Sandbox | None:
        """The heir of a checkpoint, for its child."""
        return self._remove(checkpoint_id, is_taken=True)

    def drop(self, checkpoint_id: str) -> Sandbox | None:
        """The heir of a checkpoint that nobody will name again."""
        return self._remove(checkpoint_id, is_taken=False)

    def drop_oldest(self) -> Sandbox | None:
        """The heir that was kept first, whose place is needed."""
        return self._remove(next(iter(self._heirs), ""), is_taken=False)

    def claims(
        self, jobs: Sequence[BranchJob], may_give_up: Callable[[BranchJob], bool]
    ) -> Mapping[int, str]:
        """Which jobs go on in an heir: at most one of each checkpoint, the last child if it is there.

        Args:
            jobs: Of one call.
            may_give_up: Whether the checkpoint of a job that is the last could be given up for it.

        Returns:
            `continue` or `inherit`, by index.
        """
        if not self._heirs:
            return {}
        by_checkpoint: dict[str, list[int]] = {}
        for index, job in enumerate(jobs):
            if job.checkpoint.id in self._heirs:
                by_checkpoint.setdefault(job.checkpoint.id, []).append(index)
        claims: dict[int, str] = {}
        for indices in by_checkpoint.values():
            index = next((i for i in indices if jobs[i].is_last), indices[0])
            is_alone = len(indices) == 1
            way = self._way(jobs[index], is_alone=is_alone, may_give_up=may_give_up)
            if way != "clone":
                claims[index] = way
        return claims

    def _remove(self, checkpoint_id: str, *, is_taken: bool) -> Sandbox | None:
        heir = self._heirs.pop(checkpoint_id, None)
        if heir is not None:
            if len(self._fates) == WINDOW:
                self._num_taken -= self._fates[0]
            self._fates.append(is_taken)
            self._num_taken += is_taken
        return heir

    def _way(self, job: BranchJob, *, is_alone: bool, may_give_up: Callable[[BranchJob], bool]) -> str:
        if not job.is_last:
            return self._choose(["continue", "clone"])
        # The last child inherits, whatever is cheaper elsewhere: nobody else has a use for the sandbox.
        if is_alone and may_give_up(job):
            return self._choose(["inherit", "continue"])
        return self._choose(["continue"])

    def _choose(self, ways: Sequence[str]) -> str:
        allowed = [way for way in ways if way in self._ways]
        return choose_way([self._economics.estimate(way) for way in allowed]) if allowed else "clone"
