"""Reptile: its meta-update against loops written out, and what it learns."""

from functools import partial

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
from mamljax.rules import learned_by_step, learned_step_sizes
from mamljax.tasks.images import episodes
from mamljax.tasks.sinusoid import sinusoid
from mamljax.train import fit
from mamljax.types import Model, State, Task

MODEL = mlp(1, (8, 8), 1)
KEY = jax.random.key(0)
TASKS = jax.vmap(sinusoid(shots=3, queries=4))(jax.random.split(KEY, 3))
PARAMS = MODEL.init(KEY)


def updated(rule, tx, **sizes):
    learner = reptile(MODEL, mse, rule=rule, eval_steps=1, tx=tx, **sizes)
    return learner.update(KEY, State(PARAMS, tx.init(PARAMS)), TASKS)[0].params


@pytest.mark.parametrize("learned", [learned_step_sizes, partial(learned_by_step, inner_steps=2)], ids=["by array", "by step"])
def test_a_rule_that_it_would_not_learn_is_refused(learned):
    model, rule = learned(MODEL, 0.1)
    with pytest.raises(ValueError, match="reptile goes through no step, and so learns nothing of a rule"):
        reptile(model, mse, rule=rule, inner_steps=2, batch_size=4, eval_steps=1, tx=optax.sgd(1.0))


def test_it_moves_towards_the_mean_of_the_adapted_networks():
    """Five steps on four of seven examples each, in turn: a fourth of the way."""
    adapted, order = [], np.random.default_rng(0).permutation(7)
    for task in (jax.tree.map(lambda leaf, i=i: leaf[i], TASKS) for i in range(3)):
        x, y = (np.concatenate(parts) for parts in zip(*task, strict=True))
        params = PARAMS
        for step in range(5):
            rows = [order[(4 * step + i) % 7] for i in range(4)]
            gradient = jax.grad(lambda params, x, y: mse(MODEL.apply(params, x), y))(params, x[rows], y[rows])
            params = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, params, gradient)
        adapted.append(params)
    expected = jax.tree.map(lambda first, *ends: first + 0.25 * (sum(ends) / 3 - first), PARAMS, *adapted)
    ours = updated(0.1, optax.sgd(0.25), inner_steps=5, batch_size=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, expected)


def test_the_first_steps_see_every_class():
    """Of an episode, whose images come class by class; each class has one value here, and the network is that of the loss."""
    images = np.repeat(np.arange(5, dtype=np.uint8), 8).reshape(5, 8, 1, 1, 1)
    task = episodes(images, ways=5, shots=4, queries=4)(KEY)
    seen = []

    def record(outputs, targets):
        jax.debug.callback(lambda values: seen.append(np.asarray(values)), targets)
        return outputs.mean()

    model = Model(lambda key: jnp.zeros(()), lambda params, x: x.reshape(len(x)) + params)
    learner = reptile(model, record, rule=0.1, inner_steps=2, batch_size=20, eval_steps=1, tx=optax.sgd(1.0))
    learner.update(KEY, learner.init(KEY), jax.tree.map(lambda leaf: leaf[None], task))
    jax.effects_barrier()
    assert len(seen) >= 2
    assert all(set(labels.ravel()) == set(range(5)) for labels in seen)


def test_more_examples_than_a_task_has_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at most the 7 examples of a task, got 8"):
        updated(0.1, optax.sgd(1.0), inner_steps=2, batch_size=8)
    with pytest.raises(ValueError, match="inner_steps must be a whole number of at least 2, got 1. With a single one"):
        updated(0.1, optax.sgd(1.0), inner_steps=1, batch_size=7)


def test_it_learns_to_adapt():
    """After ten steps its error is below half of that of a network trained on all tasks at once."""
    shared = {"eval_steps": 10, "tx": optax.adam(3e-3)}
    model, sample = mlp(1, (40, 40), 1), sinusoid(shots=10, queries=10)
    learners = (
        reptile(model, mse, rule=0.01, inner_steps=10, batch_size=10, **shared),
        pretrain(model, mse, rule=0.005, **shared),
    )
    errors = []
    for learner in learners:
        state = fit(learner, sample, key=KEY, num_updates=1_000, num_tasks=10, log_every=1_000, progress=False).state
        errors.append(jnp.mean(evaluate(learner, state, sample, key=jax.random.key(1), num_tasks=200)["loss"][:, -1]))
    assert errors[0] < errors[1] / 2


def test_targets_of_several_parts_are_examples_as_others_are():
    """A dict of targets has as many entries as parts, not as many as there are examples."""

    def weighted(outputs, targets):
        return (targets["weight"] * (outputs - targets["y"]) ** 2).mean()

    def with_weights(examples):
        return examples._replace(y={"y": examples.y, "weight": jnp.ones_like(examples.y)})

    tasks = Task(with_weights(TASKS.support), with_weights(TASKS.query))
    learner = reptile(MODEL, weighted, rule=0.1, inner_steps=5, batch_size=4, eval_steps=1, tx=optax.sgd(0.25))
    found = learner.update(KEY, State(PARAMS, optax.sgd(0.25).init(PARAMS)), tasks)[0].params
    expected = updated(0.1, optax.sgd(0.25), inner_steps=5, batch_size=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)
