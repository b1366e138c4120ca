"""What a search accepts from outside.

Nothing that is not finite, and no prior that is not a distribution, gets past these checks, so no NaN can
arise in a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from rollout.errors import SearchError
from rollout.search.base import OPEN_ENDED, NodeInfo, Outcome

__all__ = ["check_node", "check_outcome", "checked_prior"]

LARGEST = 1e100
"""Rewards and values beyond it are refused: their sums could overflow."""
PRIOR_TOLERANCE = 1e-3
"""How far priors may be from summing to 1; half-precision models are, and are scaled back exactly."""


def check_outcome(outcome: Outcome) -> None:
    """Checks what a trial led to.

    Raises:
        SearchError: Something in it is not finite or out of range, or a state that goes on has no action.
    """
    if not -LARGEST <= outcome.reward <= LARGEST:  # also false for NaN
        raise SearchError(f"a reward must be finite and within ±{LARGEST:g}, got {outcome.reward}")
    if outcome.discount is not None and not -1.0 <= outcome.discount <= 1.0:
        raise SearchError(f"a discount must be from -1 to 1, got {outcome.discount}")
    if not outcome.terminated:
        check_node(outcome.node, is_final=outcome.truncated or outcome.proven)


def check_node(info: NodeInfo, *, is_final: bool) -> None:
    """Checks what is known of a state that is not terminal; a final one needs no actions.

    Raises:
        SearchError: Its value is not finite, its prior no distribution over its actions, or it has none.
    """
    if not -LARGEST <= info.value <= LARGEST:
        raise SearchError(f"a value must be finite and within ±{LARGEST:g}, got {info.value}")
    if is_final or info.num_actions == OPEN_ENDED:
        return
    if info.num_actions < 1:
        raise SearchError(f"a state that is not final needs at least one action, got {info.num_actions}")
    if info.mask is not None:
        _check_mask(info.mask, info.num_actions)
    if info.prior is not None:
        _check_prior(info.prior, info.mask, info.num_actions)


def checked_prior(info: NodeInfo) -> Sequence[float] | None:
    """The prior of a checked state, scaled to sum to 1 exactly (to rounding); None if uniform."""
    if info.prior is None or info.num_actions < 1:
        return None
    total = fsum(info.prior)
    return [p / total for p in info.prior]


def _check_mask(mask: Sequence[bool], num_actions: int) -> None:
    if len(mask) != num_actions:
        raise SearchError(f"a mask of {len(mask)} entries for {num_actions} actions")
    if not any(mask):
        raise SearchError("the mask forbids every action")


def _check_prior(prior: Sequence[float], mask: Sequence[bool] | None, num_actions: int) -> None:
    if len(prior) != num_actions:
        raise SearchError(f"{len(prior)} priors for {num_actions} actions")
    for p in prior:
        if not 0.0 <= p <= 1.0 + PRIOR_TOLERANCE:
            raise SearchError(f"a prior must be a probability, got {p}")
    total = fsum(prior)
    if abs(total - 1.0) > PRIOR_TOLERANCE:
        raise SearchError(f"priors must sum to 1, got {total:.6g}")
    if mask is not None and any(p > 0.0 and not legal for p, legal in zip(prior, mask, strict=True)):
        raise SearchError("an action that the mask forbids has a prior above 0")
