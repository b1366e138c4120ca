"""Chooses one move: a search is asked for trials, branches carry them out, it is told what came of them.

The search is a pure state machine that knows numbers; the brancher clones machines; the evaluator values
leaves. This module is the loop between the three, and the record of what happened in it.

Invariants:

- Every checkpoint that a branch made is released: at once when no later trial can name it, else at the end of
  the move, also when the move fails. A tree that is to be gone on with keeps its own until `drop`, or until
  the next move shows which of them are still below the root.
- Every branch is a row: one that became a node, and one that failed (without visits and value).
- A seed gives the same trials, values and rows whatever the engine, the number of workers and the timing, if
  the search is deterministic and its randomness is not `unique`. Durations and checkpoint ids differ.

Not guaranteed: that a search learns of an outcome as soon as it is there. It is told a whole wave at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rollout.branch import Brancher, BranchJob, BranchResult, Lookahead
from rollout.config import SearchConfig
from rollout.env import Env
from rollout.errors import PolicyError, SearchError
from rollout.policy.evaluators import Evaluation, Evaluator, Leaf
from rollout.policy.trials import Position, Source, TrialBook, child_of
from rollout.sandbox.base import PhaseTimings
from rollout.search.base import NodeInfo, Outcome, Search, Trial
from rollout.search.factory import make_search
from rollout.trajectory.rows import NodeRow
from rollout.types import Failure, Randomness, RngPolicy, Value, derive_seed

__all__ = ["Move", "Planner", "RandomPlanner", "SearchPlanner", "randomness_of"]


@dataclass(frozen=True, slots=True)
class Move:
    """A chosen action and what it was chosen by.

    Attributes:
        action: What to play.
        legal_actions: What it was chosen from.
        node_id: The node that it leads to in the search's tree.
        visits: Visits of the root.
        value: Value of the root after the search.
        action_visits: Visits of each legal action.
        policy_target: The policy to train towards, one probability per legal action.
        nodes: The tree and the failed branches, as rows.
        thread: What the next move may go on with; whoever does not hand it on drops it.
    """

    action: Value
    legal_actions: Sequence[Value]
    node_id: int | None = None
    visits: int | None = None
    value: float | None = None
    action_visits: Sequence[int] | None = None
    policy_target: Sequence[float] | None = None
    nodes: Sequence[NodeRow] = ()
    thread: Thread | None = None


@dataclass(frozen=True, slots=True)
class Thread:
    """A search that has chosen a move, and the record of its trials."""

    search: Search
    book: TrialBook
    action: int


class Planner(Protocol):
    """Chooses moves; holds no state of any one episode."""

    async def choose(self, position: Position, t: int, seed: int, thread: Thread | None = None) -> Move:
        """Chooses the move `t` of an episode.

        Args:
            position: Where it is; its checkpoint stays valid.
            t: Number of the move, for the rows.
            seed: Every random choice derives from it.
            thread: Of the move before, which is used up, also when no move can be chosen.

        Raises:
            RolloutError: Of the boundary that failed, when no move can be chosen.
        """
        ...

    async def drop(self, thread: Thread | None) -> None:
        """Frees what a move left for the next one."""
        ...


class RandomPlanner:
    """Plays uniformly among the legal actions, without a search."""

    def __init__(self, env: Env) -> None:
        self._env = env

    async def choose(self, position: Position, t: int, seed: int, thread: Thread | None = None) -> Move:
        """A legal action that depends on `seed` alone."""
        actions = self._env.actions(position.step)
        return Move(actions[derive_seed(seed, "random move") % len(actions)], actions)

    async def drop(self, thread: Thread | None) -> None:
        """There is nothing."""


def randomness_of(policy: RngPolicy, seed: int) -> Randomness:
    """The randomness of a branch under a policy; `seed` counts only where branches are seeded."""
    return Randomness.seeded(seed) if policy is RngPolicy.SEEDED else Randomness(policy)


class SearchPlanner:
    """Chooses by tree search over clones.

    Args:
        env: What is played.
        brancher: What carries out the branches.
        config: The search.
        evaluator: Values leaves.
        timings: Gets the seconds spent in `ask` and `tell`, as "search".
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        env: Env,
        brancher: Brancher,
        config: SearchConfig,
        evaluator: Evaluator,
        timings: PhaseTimings,
        clock: Callable[[], float],
    ) -> None:
        self._env = env
        self._brancher = brancher
        self._config = config
        self._evaluator = evaluator
        self._timings = timings
        self._clock = clock

    async def choose(self, position: Position, t: int, seed: int, thread: Thread | None = None) -> Move:
        """A search from `position`; it goes on with the one before if that has the position in its tree."""
        book = thread.book if thread is not None else TrialBook(position, self._env.actions(position.step))
        keeps = False
        try:
            with self._evaluator.searching():
                search = await self._go_on(thread, position, seed)
                if search is None:
                    await self.drop(thread)
                    book = TrialBook(position, self._env.actions(position.step))
                    search = make_search(self._config, await self._root(position, book, seed), seed)
                await self._run(search, book)
            best = search.best()
            move = Move(
                action=book.root_actions[best],
                legal_actions=book.root_actions,
                node_id=child_of(search, 0, best),
                visits=int(search.tree.visits[0]),
                value=search.root_value(),
                action_visits=search.action_visits(),
                policy_target=search.policy_target(),
                nodes=book.rows(search, t, self._config.randomness),
                thread=Thread(search, book, best) if self._config.tree_reuse else None,
            )
            keeps = self._config.tree_reuse
            return move
        finally:
            if not keeps:
                await self._brancher.release(book.held())

    async def drop(self, thread: Thread | None) -> None:
        """Releases the checkpoints of a tree that is not gone on with."""
        if thread is not None:
            await self._brancher.release(thread.book.held())

    async def _go_on(self, thread: Thread | None, position: Position, seed: int) -> Search | None:
        """The search of the move before, with the played move's state as its root; None if it has none."""
        if thread is None:
            return None
        state_hash = position.step.state_hash
        if state_hash is None or not thread.search.advance(thread.action, state_hash, seed):
            return None
        actions = self._env.actions(position.step)
        await self._brancher.release(thread.book.reroot(thread.search, position, actions))
        return thread.search

    async def _root(self, position: Position, book: TrialBook, seed: int) -> NodeInfo:
        """What is known of the root before the search: its value is an evaluation like any other's."""
        request = self._evaluator.request(seed)
        if isinstance(request, Lookahead):
            request = replace(request, begin=position.step)
        playout = None
        if request is not None:
            randomness = randomness_of(self._config.randomness, derive_seed(seed, "root branch"))
            job = BranchJob(position.checkpoint, (), randomness, request, keep_checkpoint=False)
            [result] = await self._brancher.run([job])
            playout = result.playout
            # A root whose playout failed is searched all the same, from the value that nothing is known of.
        [evaluation] = await self._evaluate([Leaf(position.step, book.root_actions, playout)])
        return NodeInfo(len(book.root_actions), evaluation.value, evaluation.prior, position.step.state_hash)

    async def _run(self, search: Search, book: TrialBook) -> None:
        while not search.done:
            start_s = self._clock()
            trials = search.ask(self._config.wave)
            self._timings.add("search", self._clock() - start_s)
            if not trials:
                if search.done:
                    return
                raise SearchError(
                    "the search asks for nothing although nothing is in flight and it is not done"
                )
            last = book.last_of(search, trials, advances=self._config.tree_reuse)
            jobs = [self._job(trial, book, is_last=trial.trial_id in last) for trial in trials]
            results = await self._brancher.run(jobs)
            outcomes = await self._outcomes(trials, results, book)
            start_s = self._clock()
            commits = [
                commit
                for trial, outcome in zip(trials, outcomes, strict=True)
                for commit in search.tell(trial.trial_id, outcome)
            ]
            self._timings.add("search", self._clock() - start_s)
            useless = [*book.commit(commits), *book.spend(search, trials)]
            if useless:
                await self._brancher.release(useless)

    def _job(self, trial: Trial, book: TrialBook, *, is_last: bool) -> BranchJob:
        source = book.sources[trial.source]
        return BranchJob(
            checkpoint=source.checkpoint,
            actions=(source.actions[trial.action],),
            randomness=randomness_of(self._config.randomness, trial.seed),
            playout=self._evaluator.request(trial.seed),
            state_hash=self._config.wants_state_hash,
            is_last=is_last,
        )

    async def _outcomes(
        self, trials: Sequence[Trial], results: Sequence[BranchResult], book: TrialBook
    ) -> list[Outcome | Failure]:
        """What to tell the search of a wave; notes in the book what later trials may begin from."""
        leaves: list[Leaf] = []
        for trial, result in zip(trials, results, strict=True):
            book.results[trial.trial_id] = (trial, result)
            if result.failure is None and not result.steps[-1].terminated:
                step = result.steps[-1]
                actions = () if step.truncated else self._env.actions(step)
                leaves.append(Leaf(step, actions, result.playout))
                if result.checkpoint is not None:
                    book.sources[trial.trial_id] = Source(result.checkpoint, actions)
        evaluations = iter(await self._evaluate(leaves) if leaves else ())
        counts = iter(leaves)
        outcomes: list[Outcome | Failure] = []
        for result in results:
            if result.failure is not None:
                outcomes.append(result.failure)
                continue
            step = result.steps[-1]
            if step.terminated:
                node = NodeInfo(0, state_hash=step.state_hash)
            else:
                evaluation = next(evaluations)
                node = NodeInfo(
                    len(next(counts).actions), evaluation.value, evaluation.prior, step.state_hash
                )
            # A search has no word for an ungraded step: no reward there, and null in the rows.
            reward = step.reward if step.reward is not None else 0.0
            outcomes.append(Outcome(reward, node, step.terminated, step.truncated))
        return outcomes

    async def _evaluate(self, leaves: Sequence[Leaf]) -> list[Evaluation]:
        evaluations = await self._evaluator.evaluate(leaves)
        if len(evaluations) != len(leaves):
            raise PolicyError(f"the evaluator gave {len(evaluations)} values for {len(leaves)} leaves")
        return evaluations
