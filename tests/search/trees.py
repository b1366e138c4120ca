"""Trees written down by hand, for tests of formulas."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.search.tree import Tree


def one_node(
    priors: Sequence[float],
    visits: Sequence[int],
    values: Sequence[float],
    *,
    raw: float = 0.0,
    value: float | None = None,
    in_flight: Sequence[int] | None = None,
    mask: Sequence[bool] | None = None,
) -> Tree:
    """A root whose visited actions each led to one leaf; N = 1 + ΣN(a), V as told or the mean."""
    tree = Tree()
    tree.add_node(len(priors), prior=priors, mask=mask)
    in_flight = in_flight or [0] * len(priors)
    for action, (n, q, o) in enumerate(zip(visits, values, in_flight, strict=True)):
        if n or o:
            edge = tree.add_edge(0, action)
            tree.edge_visits[edge], tree.slot_value[action], tree.slot_begun[action] = n, q, n + o
            if n:
                leaf = tree.add_node(1, depth=1)
                outcome = tree.add_outcome(edge, leaf, q, 1.0)
                tree.outcome_draws[outcome], tree.outcome_visits[outcome] = 1, n
                tree.visits[leaf] = n
    total = sum(visits)
    tree.visits[0], tree.evaluations[0], tree.raw_value[0] = 1 + total, 1, raw
    tree.begun[0] = tree.visits[0] + sum(in_flight)
    mean = (raw + sum(n * q for n, q in zip(visits, values, strict=True))) / (1 + total)
    tree.value[0] = mean if value is None else value
    return tree
