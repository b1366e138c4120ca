"""Plays what a run recorded again and compares it with its rows, up to the first difference.

The lineage in the rows is all that it takes, not the checkpoints, which are gone with their run:

- an episode is its task and seed, and for each move the action and what the branch did with its generators;
- a node of a search is the episode up to its move, and then the branches from the root of the tree to it.

An episode is compared observation by observation, with rewards, endings and, where the search asked for them,
digests of states. From a node, every branch that the search made below it is played again, and compared by
reward, ending and the digests of observation and state.

Not compared: `info`, which may hold times, and branches that failed. What was played with `unique` randomness
is only equal again where the environment does not use it; with `inherit` a node of a search can be reached
only as long as nothing else drew from the generators that it inherited.
"""

# pyarrow comes without type stubs: what it returns is unknown to the type checker.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.compute as pc

from rollout.branch import Brancher, BranchJob, BranchResult
from rollout.env import Env, Task
from rollout.errors import ConfigError
from rollout.sandbox.base import Checkpoint
from rollout.trajectory.columns import values_to_arrow
from rollout.trajectory.decode import value_of
from rollout.trajectory.digest import value_digest
from rollout.trajectory.reader import scan
from rollout.trajectory.storage import Location
from rollout.types import Randomness, RngPolicy, Step

__all__ = ["Difference", "RecordedEpisode", "Replay", "Replayer", "read_episode", "read_tree"]

_WAVE = 16
"""Branches of a tree that are played again in one call."""

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RecordedEpisode:
    """An episode as a run recorded it.

    Attributes:
        episode: Its row.
        steps: Its steps by ascending t.
    """

    episode: Row
    steps: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing that came out different.

    Attributes:
        where: "the beginning", "move 3", "node 7 of move 3".
        what: "observation[2]", "reward", "terminated", "a failure", ...
        recorded: As the run has it.
        played: As it came out now.
    """

    where: str
    what: str
    recorded: str
    played: str


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


def read_episode(run_dir: Location, episode_id: str) -> RecordedEpisode:
    """Reads an episode.

    Raises:
        SinkError: The run has no such episode, or cannot be read.
        ConfigError: No step of it is recorded: it failed before it began.
    """
    is_wanted = pc.field("episode_id") == episode_id
    episodes = scan(run_dir, "episodes", filter=is_wanted).to_table().to_pylist()
    steps = scan(run_dir, "steps", filter=is_wanted).to_table().sort_by("t").to_pylist()
    if not episodes or not steps:
        raise ConfigError(f"no step of the episode {episode_id} is recorded: there is nothing to play again")
    return RecordedEpisode(episodes[0], steps)


def read_tree(run_dir: Location, episode_id: str, t: int) -> list[Row]:
    """The nodes of the tree of move `t`, by ascending id.

    Raises:
        SinkError: The run cannot be read.
        ConfigError: There is no such tree.
    """
    is_wanted = (pc.field("episode_id") == episode_id) & (pc.field("t") == t)
    rows = scan(run_dir, "nodes", filter=is_wanted).to_table().sort_by("node_id").to_pylist()
    if not rows:
        raise ConfigError(
            f"no tree of move {t} is recorded: the episode has no such move, was played without a search, or "
            "sink.record_nodes was off"
        )
    return rows


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
        self._max_steps = max_steps
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
        wanted, num_left_out = _below(by_id, node_id)  # refused before anything is played
        num_moves, difference, root = await self._moves(recorded, t)
        if difference is not None or root is None:
            await self._release(root)
            return Replay(num_moves, difference=difference)
        rows = [*_path(by_id, node_id), *wanted]
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
            _below(by_id, node_id)  # refused before anything is played
        _, difference, root = await self._moves(recorded, t)
        if difference is not None:
            await self._release(root)
            return [], difference
        if root is None:
            raise ConfigError(f"the episode ended before move {t}: no state is left of it")
        held = [root]
        try:
            for row in _path(by_id, node_id) if node_id else ():
                [result] = await self._brancher.run([self._job(held[-1], row, True)])
                if result.checkpoint is not None:
                    held.append(result.checkpoint)
                if (difference := self._compare_node(t, row, result)) is not None:
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
        difference = self._compare_state("the beginning", steps[0], opening.step)
        t, last = 0, min(num_moves, len(steps) - 1)
        try:
            while difference is None and t < last and steps[t]["action"] is not None:
                assert checkpoint is not None
                result = await self._play(checkpoint, steps[t], steps[t + 1]["state_hash"] is not None)
                await self._release(checkpoint)
                checkpoint = result.checkpoint
                difference = self._compare_move(t, steps[t], steps[t + 1], result)
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
            for wave in _waves(rows):
                jobs = [self._job(held[row["parent_id"]], row, row["node_id"] in parents) for row in wave]
                results = await self._brancher.run(jobs)
                for row, result in zip(wave, results, strict=True):
                    if result.checkpoint is not None:
                        held[row["node_id"]] = result.checkpoint
                for row, result in zip(wave, results, strict=True):
                    difference = self._compare_node(t, row, result)
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

    def _compare_move(self, t: int, row: Row, after: Row, result: BranchResult) -> Difference | None:
        where = f"move {t}"
        if result.failure is not None:
            return _failed(where, result)
        step = result.steps[-1]
        is_cut = t + 1 == self._max_steps and not step.terminated
        step = replace(step, truncated=step.truncated or is_cut)
        return _compare_outcome(where, row, step) or self._compare_state(where, after, step)

    def _compare_state(self, where: str, row: Row, step: Step) -> Difference | None:
        [played] = values_to_arrow(self._env.observation_space, [step.observation]).to_pylist()
        for what, recorded, now in _differences(row["observation"], played, "observation"):
            return Difference(where, what, recorded, now)
        return _compare("state_hash", where, row, step.state_hash)

    def _compare_node(self, t: int, row: Row, result: BranchResult) -> Difference | None:
        where = f"node {row['node_id']} of move {t}"
        if result.failure is not None:
            return _failed(where, result)
        step = result.steps[-1]
        return (
            _compare_outcome(where, row, step)
            or _compare("observation_digest", where, row, value_digest(step.observation))
            or _compare("state_hash", where, row, step.state_hash)
        )


def _compare_outcome(where: str, row: Row, step: Step) -> Difference | None:
    for what in ("reward", "terminated", "truncated"):
        for _, recorded, played in _differences(row[what], getattr(step, what), what):
            return Difference(where, what, recorded, played)
    return None


def _compare(what: str, where: str, row: Row, now: object) -> Difference | None:
    """Of a digest, which older rows, or searches that did not ask for it, do not have."""
    if row[what] is None or row[what] == now:
        return None
    return Difference(where, what, str(row[what]), str(now))


def _failed(where: str, result: BranchResult) -> Difference:
    assert result.failure is not None
    return Difference(where, "a failure", "none", f"{result.failure.boundary}: {result.failure.cause}")


def _differences(recorded: Any, played: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """(where, recorded, played) of every place in which two cells differ; NaN equals NaN."""
    if isinstance(recorded, dict) and isinstance(played, dict) and recorded.keys() == played.keys():
        for key, inner in recorded.items():
            yield from _differences(inner, played[key], f"{path}.{key}")
    elif isinstance(recorded, list) and isinstance(played, list) and len(recorded) == len(played):
        for index, (one, other) in enumerate(zip(recorded, played, strict=True)):
            yield from _differences(one, other, f"{path}[{index}]")
    elif recorded != played and not _both_nan(recorded, played):
        yield path, repr(recorded), repr(played)


def _both_nan(one: object, other: object) -> bool:
    return isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)


def _path(by_id: Mapping[int, Row], node_id: int) -> list[Row]:
    """The nodes from the root, which is left out, to a node."""
    path: list[Row] = []
    while (row := by_id[node_id])["parent_id"] is not None:
        path.append(row)
        node_id = row["parent_id"]
    return path[::-1]


def _below(by_id: Mapping[int, Row], node_id: int) -> tuple[list[Row], int]:
    """The nodes below a node, parents before their children; how many branches below it had failed.

    Raises:
        ConfigError: There is no such node, or its branch failed.
    """
    row = by_id.get(node_id)
    if row is None:
        raise ConfigError(f"the tree has no node {node_id}: its nodes are 0 to {max(by_id)}")
    if row["failure"] is not None:
        raise ConfigError(f"the branch of node {node_id} failed: it led to no state")
    found, num_failed = {node_id}, 0
    below: list[Row] = []
    for each in sorted(by_id.values(), key=lambda one: (one["depth"], one["node_id"])):
        if each["parent_id"] not in found:
            continue
        if each["failure"] is not None:
            num_failed += 1
            continue
        found.add(each["node_id"])
        below.append(each)
    return below, num_failed


def _waves(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of one depth, at most so many at a time."""
    wave: list[Row] = []
    for row in rows:
        if wave and (row["depth"] != wave[0]["depth"] or len(wave) == _WAVE):
            yield wave
            wave = []
        wave.append(row)
    if wave:
        yield wave
