"""Re-rooting: a node of the tree becomes the root; what is below it is kept, the rest is freed.

Counts, values and priors of what is kept do not change by a bit; only rows are renumbered. Work: O(kept).
"""

from __future__ import annotations

from rollout.search.base import ROOT_TRIAL
from rollout.search.tree import NONE, Tree

__all__ = ["reroot"]


def reroot(tree: Tree, root: int) -> None:
    """Makes `root` node 0 of the tree, in place, and its trial the root's."""
    nodes, edges, outcomes = _reachable(tree, root)
    new_node = {node: row for row, node in enumerate(nodes)}
    new_edge = {edge: row for row, edge in enumerate(edges)}
    new_outcome = {outcome: row for row, outcome in enumerate(outcomes)}
    new_outcome[NONE] = NONE
    kept = Tree()
    for node in nodes:
        _copy_node(tree, kept, node, tree.depth[node] - tree.depth[root], new_edge)
    for edge in edges:
        node = tree.edge_node[edge]
        kept.edge_node.append(new_node[node])
        kept.edge_slot.append(tree.edge_slot[edge] - tree.first_slot[node] + kept.first_slot[new_node[node]])
        kept.edge_outcome.append(new_outcome[tree.edge_outcome[edge]])
    for outcome in outcomes:
        node = new_node[tree.outcome_node[outcome]]
        kept.outcome_node.append(node)
        kept.outcome_edge.append(new_edge[tree.outcome_edge[outcome]])
        kept.outcome_next.append(new_outcome[tree.outcome_next[outcome]])
        if kept.entry[node] == NONE:  # rows ascend by age, so the first is the oldest that is left
            kept.entry[node] = new_outcome[outcome]
    _pick(tree, kept, edges, "edge_visits", "edge_draws", "edge_state")
    _pick(tree, kept, outcomes, "outcome_draws", "outcome_visits", "outcome_reward", "outcome_discount")
    kept.trial[0] = ROOT_TRIAL
    vars(tree).update(vars(kept))


def _reachable(tree: Tree, root: int) -> tuple[list[int], list[int], list[int]]:
    """The rows at and below `root`: nodes with it first, edges and outcomes, the older ones first."""
    seen, edges, outcomes, stack = {root}, list[int](), list[int](), [root]
    while stack:
        for edge in tree.edges(stack.pop()):
            if edge < 0:
                continue
            edges.append(edge)
            for outcome in tree.outcomes(edge):
                outcomes.append(outcome)
                node = tree.outcome_node[outcome]
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    return [root, *sorted(seen - {root})], sorted(edges), sorted(outcomes)


def _copy_node(tree: Tree, kept: Tree, node: int, depth: int, new_edge: dict[int, int]) -> None:
    copy = kept.add_node(
        0,
        open_ended=bool(tree.open_ended[node]),
        depth=depth,
        flags=tree.flags[node],
        state_hash=tree.state_hash[node],
        trial=tree.trial[node],
    )
    kept.visits[copy] = kept.begun[copy] = tree.visits[node]
    kept.value[copy] = tree.value[node]
    kept.raw_value[copy] = tree.raw_value[node]
    kept.evaluations[copy] = tree.evaluations[node]
    kept.num_actions[copy] = tree.num_actions[node]
    kept.num_unready[copy] = tree.num_unready[node]
    first, room = tree.first_slot[node], tree.room(node)
    if first == NONE:
        return
    kept.first_slot[copy] = len(kept.slots)
    kept.slots.extend(new_edge.get(edge, edge) for edge in tree.slots[first : first + room])
    kept.priors.extend(tree.priors[first : first + room])
    kept.slot_value.extend(tree.slot_value[first : first + room])
    kept.slot_begun.extend(tree.slot_begun[first : first + room])


def _pick(tree: Tree, kept: Tree, rows: list[int], *columns: str) -> None:
    for name in columns:
        column = getattr(tree, name)
        getattr(kept, name).extend(column[row] for row in rows)
