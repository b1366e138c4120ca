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

from rollout.replay.comparison import Difference
from rollout.replay.recorded import RecordedEpisode, Row, read_episode, read_tree
from rollout.replay.replayer import Replay, Replayer

__all__ = ["Difference", "RecordedEpisode", "Replay", "Replayer", "Row", "read_episode", "read_tree"]
