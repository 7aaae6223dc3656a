"""The mean of networks that were each trained on a task of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import KEY

from mamljax.baselines.multi_task import multi_task, no_penalty, squared_distance, squared_norm
from mamljax.losses import mse
from mamljax.types import Examples, Model, Task

# One number, which a task's network must guess.
CONSTANT = Model(lambda key: {"guess": jnp.ones((1, 1))}, lambda params, x: jnp.broadcast_to(params["guess"], x.shape))
TRAIN = functools.partial(multi_task, CONSTANT, mse, task_tx=optax.sgd(0.2), task_steps=60, rule=0.1, eval_steps=2)


def tasks_of(*numbers):
    """Tasks whose support targets are a number below these, and whose query targets one above."""
    y = jnp.array(numbers, jnp.float32)[:, None, None] + jnp.zeros((1, 3, 1))
    return Task(Examples(jnp.zeros_like(y), y - 1), Examples(jnp.zeros_like(y), y + 1))


def means(learner, *batches):
    state, found = learner.init(KEY), []
    for numbers in batches:
        state, metrics = learner.update(KEY, state, tasks_of(*numbers))
        found.append(state.params["mean"]["guess"].item())
    np.testing.assert_array_equal(state.params["first"]["guess"], [[1.0]])
    return found, metrics


def test_is_the_mean_over_all_tasks_so_far():
    found, metrics = means(TRAIN(penalty=no_penalty), (2.0, 4.0), (9.0, 9.0), (-5.0, 1.0))
    np.testing.assert_allclose(found, [3.0, 6.0, 20 / 6], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (11.0**2 + 5.0**2) / 4, rtol=1e-5)  # from the mean before


def test_penalties_draw_towards_zero_and_towards_the_mean():
    """The loss is (guess - y)^2 and a constant, so that a penalty of the same weight ends half way."""
    np.testing.assert_allclose(means(TRAIN(penalty=squared_norm), (2.0, 4.0))[0], [1.5], rtol=1e-5)
    found, _ = means(TRAIN(penalty=squared_distance), (3.0, 5.0), (8.0, 8.0))
    np.testing.assert_allclose(found, [2.5, (2.5 + (8.0 + 2.5) / 2) / 2], rtol=1e-5)


def test_evaluation_fine_tunes_the_mean():
    learner = TRAIN()
    state, _ = learner.update(KEY, learner.init(KEY), tasks_of(2.0, 4.0))
    task = jax.tree.map(lambda leaf: leaf[0], tasks_of(6.0))
    # From 3 towards 5, by a fifth of the way each step; the query targets are 7.
    np.testing.assert_allclose(learner.evaluate(KEY, state, task)["loss"], [4.0**2, 3.6**2, 3.28**2], rtol=1e-5)


@pytest.mark.parametrize("name", ["task_steps", "eval_steps"])
def test_counts_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
        TRAIN(**{name: 0})
