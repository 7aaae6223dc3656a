"""Simulations that break down: what a training makes of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamljax.rl.collect import collect_with
from mamljax.rl.environment import Environment, Step
from mamljax.rl.maml_rl import maml_rl
from mamljax.types import Model

KEY = jax.random.key(0)
HORIZON = 4


def breaking_env():
    """The reward is the action. The simulation breaks down at the step that the task is, 0 for never, and, in half of the rows,
    at the first one where the task is -1."""

    def reset(key, task):
        return (jnp.int32(0), jax.random.bernoulli(key)), jnp.zeros(1)

    def step(key, state, action, task):
        count, weak = state[0] + 1, state[1]
        breaks = (count == task) | (weak & (task == -1))
        return Step((count, weak), jnp.zeros(1), jnp.where(breaks, jnp.nan, action[0]), jnp.array(False))

    return Environment(lambda key: jnp.int32(0), reset, step, observation_size=1, action_size=1)


@pytest.fixture(scope="module")
def learner():
    """Its policy does 0 whatever it sees, nearly without noise; its rule adds 1 to that, whatever the gradient is."""

    def apply(params, x):
        return jnp.broadcast_to(params, (*x.shape[:-1], 1)), jnp.full((1,), -7.0)

    policy = Model(lambda key: jnp.zeros(1), apply)
    rule = optax.stateless(lambda gradient, params: jax.tree.map(jnp.ones_like, gradient))
    gather = collect_with(policy, breaking_env(), horizon=HORIZON, trajectories=8)
    return maml_rl(gather, rule=rule, inner_steps=1, eval_steps=1, tx=optax.sgd(0.0))


def test_tasks_whose_simulation_breaks_down_do_not_hinder_the_others(learner):
    """One never, one at every first step, so that no step of it counts, and one at every second step."""
    state, metrics = jax.jit(learner.update)(KEY, learner.init(KEY), jnp.array([0, 1, 2]))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((state, metrics)))
    np.testing.assert_allclose([metrics["return_before"], metrics["return_after"]], [0, HORIZON], atol=0.01)
    np.testing.assert_allclose(metrics["unstable"], (4 + 2) / (1 + 4 + 2))  # of each row's trajectories


def test_evaluation_counts_the_rows_that_did_not_break_down(learner):
    metrics = jax.jit(learner.evaluate)(KEY, learner.init(KEY), jnp.int32(-1))
    assert ((metrics["unstable"] > 0) & (metrics["unstable"] < 1)).all()
    for name in ("return", "return_of_first"):
        np.testing.assert_allclose(metrics[name], [0, HORIZON], atol=0.01)
