"""Tree search: pure state machines over a struct-of-arrays tree.

In the order of reading:

    base          the contract: ask for trials, be told their outcomes
    tree          nodes, edges and outcomes as parallel columns            rows, column
    tree_search   the state machine: waves, retries, what is in flight
    descend       one simulation's way down          select, widening, normalise
    attach        what a branch led to becomes a node
    backward      one simulation's value goes up     prove
    decide        the move, and what to train towards
    algorithm     UCT and PUCT                       gumbel, ab_mcts, baselines, ensemble
    factory       a search from its configuration
    reroot, tree_json, seeds, checks
"""
