"""Plays recorded episodes and trees again; see the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rollout.branch import Brancher, BranchJob, BranchResult
from rollout.env import Env, Task
from rollout.errors import ConfigError
from rollout.replay.comparison import Comparison, Difference
from rollout.replay.recorded import RecordedEpisode, Row, nodes_below, path_to, waves
from rollout.sandbox.base import Checkpoint
from rollout.trajectory.decode import value_of
from rollout.types import Randomness, RngPolicy

__all__ = ["Replay", "Replayer"]


@dataclass(frozen=True, slots=True)
class Replay:
    """How far a replay went, and whether all was equal.

    Attributes:
        num_moves: Moves of the episode that were played again and are equal.
        num_branches: Branches of a search's tree that were played again and are equal.
        num_left_out: Branches that had failed, and are not played again.
        difference: The first one; None if all is equal.
    """

    num_moves: int
    num_branches: int = 0
    num_left_out: int = 0
    difference: Difference | None = None


class Replayer:
    """Plays recorded episodes again.

    Args:
        env: What was played; known by now what its spaces are.
        brancher: What carries out branches.
        max_steps: After how many moves the run cut an episode.
        on_progress: Called with every move or branch that is equal.
    """

    def __init__(
        self,
        env: Env,
        brancher: Brancher,
        max_steps: int,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._env = env
        self._brancher = brancher
        self._compared = Comparison(env, max_steps)
        self._on_progress = on_progress

    async def play_episode(self, recorded: RecordedEpisode) -> Replay:
        """Plays an episode again from its seed, to its end or to the first difference.

        Raises:
            ConfigError: The environment has no such task.
            RolloutError: The episode cannot be begun.
        """
        num_moves, difference, checkpoint = await self._moves(recorded, len(recorded.steps))
        await self._release(checkpoint)
        return Replay(num_moves, difference=difference)

    async def play_tree(self, recorded: RecordedEpisode, tree: Sequence[Row], t: int, node_id: int) -> Replay:
        """Makes the state of a node again, and plays every branch below it again.

        Args:
            recorded: The episode.
            tree: All nodes of the tree of move `t`.
            t: The move.
            node_id: The node.

        Raises:
            ConfigError: The environment has no such task, or the tree no such node.
            RolloutError: The episode cannot be begun.
        """
        by_id = {row["node_id"]: row for row in tree}
        wanted, num_left_out = nodes_below(by_id, node_id)  # refused before anything is played
        num_moves, difference, root = await self._moves(recorded, t)
        if difference is not None or root is None:
            await self._release(root)
            return Replay(num_moves, difference=difference)
        rows = [*path_to(by_id, node_id), *wanted]
        num_branches, difference = await self._branches(rows, root, t)
        return Replay(num_moves, num_branches, num_left_out, difference)

    async def reach(
        self, recorded: RecordedEpisode, tree: Sequence[Row], t: int, node_id: int
    ) -> tuple[list[Checkpoint], Difference | None]:
        """Makes the state of a node again, and keeps it.

        Args:
            recorded: The episode.
            tree: All nodes of the tree of move `t`; only the root's, `node_id` 0, needs none.
            t: The move.
            node_id: The node.

        Returns:
            The states from the root of the tree to the node, for the caller to release, or none of them and
            the first difference from what is recorded.

        Raises:
            ConfigError: The environment has no such task, the tree no such node, or no state is left there.
            RolloutError: The episode cannot be begun.
        """
        by_id = {row["node_id"]: row for row in tree}
        if node_id:
            nodes_below(by_id, node_id)  # refused before anything is played
        _, difference, root = await self._moves(recorded, t)
        if difference is not None:
            await self._release(root)
            return [], difference
        if root is None:
            raise ConfigError(f"the episode ended before move {t}: no state is left of it")
        held = [root]
        try:
            for row in path_to(by_id, node_id) if node_id else ():
                [result] = await self._brancher.run([self._job(held[-1], row, True)])
                if result.checkpoint is not None:
                    held.append(result.checkpoint)
                if (difference := self._compared.of_node(t, row, result)) is not None:
                    await self._brancher.release(held)
                    return [], difference
                if result.checkpoint is None:
                    raise ConfigError(f"node {row['node_id']} ended the episode: no state is left of it")
        except BaseException:
            await self._brancher.release(held)
            raise
        return held, None

    async def _moves(
        self, recorded: RecordedEpisode, num_moves: int
    ) -> tuple[int, Difference | None, Checkpoint | None]:
        """Plays the first moves again: (equal ones, first difference, the state after them if it goes on)."""
        steps = recorded.steps
        opening = await self._brancher.open(self._task(recorded.episode), recorded.episode["seed"])
        checkpoint: Checkpoint | None = opening.checkpoint
        difference = self._compared.of_state("the beginning", steps[0], opening.step)
        t, last = 0, min(num_moves, len(steps) - 1)
        try:
            while difference is None and t < last and steps[t]["action"] is not None:
                assert checkpoint is not None
                result = await self._play(checkpoint, steps[t], steps[t + 1]["state_hash"] is not None)
                await self._release(checkpoint)
                checkpoint = result.checkpoint
                difference = self._compared.of_move(t, steps[t], steps[t + 1], result)
                if difference is None:
                    t += 1
                    self._on_progress()
                    if checkpoint is None:
                        break
        except BaseException:
            await self._release(checkpoint)
            raise
        return t, difference, checkpoint

    async def _branches(self, rows: Sequence[Row], root: Checkpoint, t: int) -> tuple[int, Difference | None]:
        """Plays nodes again, parents before their children: (equal ones, first difference)."""
        held: dict[int, Checkpoint] = {0: root}
        parents = {row["parent_id"] for row in rows}
        num_equal = 0
        try:
            for wave in waves(rows):
                jobs = [self._job(held[row["parent_id"]], row, row["node_id"] in parents) for row in wave]
                results = await self._brancher.run(jobs)
                for row, result in zip(wave, results, strict=True):
                    if result.checkpoint is not None:
                        held[row["node_id"]] = result.checkpoint
                for row, result in zip(wave, results, strict=True):
                    difference = self._compared.of_node(t, row, result)
                    if difference is not None:
                        return num_equal, difference
                    num_equal += 1
                    self._on_progress()
        finally:
            await self._brancher.release(list(held.values()))
        return num_equal, None

    async def _play(self, checkpoint: Checkpoint, row: Row, state_hash: bool) -> BranchResult:
        job = self._job(checkpoint, row, True)
        [result] = await self._brancher.run([replace(job, state_hash=state_hash)])
        return result

    def _job(self, checkpoint: Checkpoint, row: Row, keep: bool) -> BranchJob:
        policy = RngPolicy(row["rng_policy"] or RngPolicy.UNIQUE)
        randomness = Randomness(policy, row["rng_seed"] if policy is RngPolicy.SEEDED else None)
        action = value_of(self._env.action_space, row["action"])
        wants_hash = row["state_hash"] is not None
        return BranchJob(checkpoint, (action,), randomness, keep_checkpoint=keep, state_hash=wants_hash)

    async def _release(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            await self._brancher.release([checkpoint])

    def _task(self, episode: Row) -> Task:
        for task in self._env.tasks():
            if task.id == episode["task_id"]:
                return task
        raise ConfigError(f"the environment has no task {episode['task_id']!r} any more")
