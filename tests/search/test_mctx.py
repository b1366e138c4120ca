"""Whole searches against mctx, visit by visit, on random deterministic models with shared tables."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from random_worlds import config

from rollout.search.base import NodeInfo, Outcome
from rollout.search.factory import make_search

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries that are imported on the way
    mctx = pytest.importorskip("mctx", reason="mctx comes with the extra `bench`")
    import jax
    import jax.numpy as jnp

NUM_STATES, DISCOUNT = 97, 0.9


class Tables:
    def __init__(self, seed: int, num_actions: int) -> None:
        rng = np.random.default_rng(seed)
        self.logits = rng.normal(size=(NUM_STATES, num_actions)).astype(np.float32)
        self.value = rng.uniform(-1, 1, NUM_STATES).astype(np.float32)
        self.reward = rng.uniform(-1, 1, (NUM_STATES, num_actions)).astype(np.float32)
        self.after = rng.integers(0, NUM_STATES, (NUM_STATES, num_actions))

    def info(self, state: int) -> NodeInfo:
        weights = np.exp(self.logits[state].astype(float))
        return NodeInfo(len(weights), float(self.value[state]), tuple((weights / weights.sum()).tolist()))

    def mctx_output(self, policy, simulations: int, **settings: object):
        root = mctx.RootFnOutput(
            prior_logits=jnp.array(self.logits[:1]),
            value=jnp.array(self.value[:1]),
            embedding=jnp.zeros(1, int),
        )
        tables = [jnp.array(t) for t in (self.reward, self.logits, self.value, self.after)]

        def recurrent(params, key, action, state):
            reward, logits, value, after = tables
            new = after[state, action]
            return mctx.RecurrentFnOutput(
                reward=reward[state, action],
                discount=jnp.full_like(reward[state, action], DISCOUNT),
                prior_logits=logits[new],
                value=value[new],
            ), new

        return policy(
            params=(),
            rng_key=jax.random.PRNGKey(0),
            root=root,
            recurrent_fn=recurrent,
            num_simulations=simulations,
            **settings,
        )

    def ours(self, simulations: int, **settings: object):
        settings = {"simulations": simulations, "wave": 1, "discount": DISCOUNT, **settings}
        search = make_search(config(**settings), self.info(0), 0)
        states = {0: 0}
        while not search.done:
            for trial in search.ask(1):
                before = states[trial.source]
                after = states[trial.trial_id] = int(self.after[before, trial.action])
                reward = float(self.reward[before, trial.action])
                search.tell(trial.trial_id, Outcome(reward, self.info(after)))
        return search


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_actions", "simulations"), [(3, 20), (6, 60)])
def test_gumbel_search_is_mctxs(seed: int, num_actions: int, simulations: int) -> None:
    tables = Tables(seed, num_actions)
    theirs = tables.mctx_output(mctx.gumbel_muzero_policy, simulations, gumbel_scale=0.0)
    ours = tables.ours(simulations, algorithm="gumbel", gumbel_scale=0.0)
    assert list(ours.action_visits()) == theirs.search_tree.summary().visit_counts[0].astype(int).tolist()
    assert list(ours.policy_target()) == pytest.approx(theirs.action_weights[0].tolist(), abs=1e-4)
    assert ours.root_value() == pytest.approx(float(theirs.search_tree.summary().value[0]), abs=1e-4)
    assert ours.best() == int(theirs.action[0])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_actions", "simulations"), [(3, 20), (6, 60)])
def test_puct_search_is_mctxs(seed: int, num_actions: int, simulations: int) -> None:
    tables = Tables(seed, num_actions)
    theirs = tables.mctx_output(mctx.muzero_policy, simulations, dirichlet_fraction=0.0, temperature=0.0)
    ours = tables.ours(simulations, algorithm="puct")
    assert list(ours.action_visits()) == theirs.search_tree.summary().visit_counts[0].astype(int).tolist()
    assert ours.root_value() == pytest.approx(float(theirs.search_tree.summary().value[0]), abs=1e-4)
