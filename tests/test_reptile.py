"""Reptile: its meta-update against loops written out, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamljax.baselines.pretrain import pretrain
from mamljax.evaluate import evaluate
from mamljax.losses import mse
from mamljax.models import mlp
from mamljax.reptile import reptile
from mamljax.tasks.sinusoid import sinusoid
from mamljax.train import fit
from mamljax.types import State

MODEL = mlp(1, (8, 8), 1)
KEY = jax.random.key(0)
TASKS = jax.vmap(sinusoid(shots=3, queries=4))(jax.random.split(KEY, 3))
PARAMS = MODEL.init(KEY)


def updated(rule, tx, **sizes):
    learner = reptile(MODEL, mse, rule=rule, eval_steps=1, tx=tx, **sizes)
    return learner.update(KEY, State(PARAMS, tx.init(PARAMS)), TASKS)[0].params


def test_it_moves_towards_the_mean_of_the_adapted_networks():
    """Five steps on four of seven examples each, in turn: a fourth of the way."""
    adapted = []
    for task in (jax.tree.map(lambda leaf, i=i: leaf[i], TASKS) for i in range(3)):
        x, y = (np.concatenate(parts) for parts in zip(*task, strict=True))
        params = PARAMS
        for step in range(5):
            rows = [(4 * step + i) % 7 for i in range(4)]
            gradient = jax.grad(lambda params, x, y: mse(MODEL.apply(params, x), y))(params, x[rows], y[rows])
            params = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, params, gradient)
        adapted.append(params)
    expected = jax.tree.map(lambda first, *ends: first + 0.25 * (sum(ends) / 3 - first), PARAMS, *adapted)
    ours = updated(0.1, optax.sgd(0.25), inner_steps=5, batch_size=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, expected)


def test_one_step_is_training_on_all_tasks_at_once():
    """On the first three examples, which are the support set, that the pretrained network learns from."""
    learner = pretrain(MODEL, mse, rule=0.1, eval_steps=1, tx=optax.sgd(0.1))
    expected = learner.update(KEY, State(PARAMS, optax.sgd(0.1).init(PARAMS)), TASKS)[0].params
    ours = updated(0.1, optax.sgd(1.0), inner_steps=1, batch_size=3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, expected)


def test_more_examples_than_a_task_has_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at most the 7 examples of a task, got 8"):
        updated(0.1, optax.sgd(1.0), inner_steps=2, batch_size=8)
    with pytest.raises(ValueError, match="inner_steps"):
        updated(0.1, optax.sgd(1.0), inner_steps=0, batch_size=7)


def test_it_learns_to_adapt():
    """After ten steps its error is below half of that of a network trained on all tasks at once."""
    shared = {"eval_steps": 10, "tx": optax.adam(1e-3)}
    model, sample = mlp(1, (40, 40), 1), sinusoid(shots=10, queries=10)
    learners = (
        reptile(model, mse, rule=0.01, inner_steps=10, batch_size=10, **shared),
        pretrain(model, mse, rule=0.005, **shared),
    )
    errors = []
    for learner in learners:
        state = fit(learner, sample, key=KEY, num_updates=3_000, num_tasks=10, log_every=3_000, progress=False).state
        errors.append(jnp.mean(evaluate(learner, state, sample, key=jax.random.key(1), num_tasks=200)["loss"][:, -1]))
    assert errors[0] < errors[1] / 2
