"""Seeds of branches: cheap, and the same on every machine."""

from __future__ import annotations

__all__ = ["branch_seed"]

MASK = (1 << 64) - 1
NODE, ACTION, DRAW = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xA0761D6478BD642F
"""Odd constants without a pattern: sums of their multiples do not meet for counts of any real size."""


def branch_seed(search_seed: int, node: int, action: int, draw: int) -> int:
    """The 63-bit seed of a branch: a function of the search's seed, the node, the action and the draw.

    SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014) over a linear combination: neighbouring
    counts give unrelated seeds.
    """
    z = (search_seed + node * NODE + action * ACTION + (draw + 1) * DRAW) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return (z ^ (z >> 31)) >> 1
