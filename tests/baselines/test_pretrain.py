"""One network for all tasks: what it is trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from battery import KEY

from mamljax.baselines.pretrain import pretrain
from mamljax.losses import mse
from mamljax.types import Examples, Model, Task

GUESS = Model(lambda key: {"guess": jnp.zeros((1, 1))}, lambda params, x: jnp.broadcast_to(params["guess"], x.shape))


def test_training_is_on_the_support_sets_alone():
    """A guess of 0, of the targets 1 and 3; those of the query sets are 10. By a quarter of the mean slope it is 1."""
    y = jnp.array([1.0, 3.0])[:, None, None] + jnp.zeros((1, 5, 1))
    tasks = Task(Examples(jnp.zeros_like(y), y), Examples(jnp.zeros_like(y), jnp.full_like(y, 10.0)))
    learner = pretrain(GUESS, mse, rule=0.1, eval_steps=1, tx=optax.sgd(0.25))
    state, metrics = learner.update(KEY, learner.init(KEY), tasks)
    np.testing.assert_allclose(metrics["loss"], (1.0**2 + 3.0**2) / 2, rtol=1e-6)
    np.testing.assert_allclose(state.params["guess"], [[1.0]], rtol=1e-6)
    # In evaluation it is fine-tuned on one, from 1 by a fifth of the way to 3, and judged by the other.
    task = jax.tree.map(lambda leaf: leaf[1], tasks)
    np.testing.assert_allclose(learner.evaluate(KEY, state, task)["loss"], [9.0**2, 8.6**2], rtol=1e-6)
