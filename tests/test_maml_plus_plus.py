"""MAML++: the loss of every step, and what it counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from spying import spy

from mamljax.losses import mse
from mamljax.maml import fine_tune, maml
from mamljax.maml_plus_plus import maml_plus_plus
from mamljax.models import mlp
from mamljax.tasks.sinusoid import sinusoid

MODEL = mlp(1, (8,), 1)
KEY = jax.random.key(0)
TASKS = jax.vmap(sinusoid(shots=5, queries=6))(jax.random.split(KEY, 3))
SHARED = {"rule": 0.01, "inner_steps": 3, "eval_steps": 3, "tx": optax.sgd(0.01)}
BUILD = functools.partial(maml_plus_plus, MODEL, mse, multi_step_updates=4, **SHARED)


def at(path, step):
    return jax.tree.map(lambda leaf: leaf[step], path)


@jax.jit
@jax.value_and_grad
def weighted_loss(params, weights):
    return weights / 12 @ losses_by_step(params)


def losses_by_step(params):
    """The mean query loss after each of three steps."""

    def of_task(task):
        _, path = fine_tune(MODEL, mse, params, task.support, optax.sgd(0.01), 3)
        return jnp.stack([mse(MODEL.apply(at(path, step), task.query.x), task.query.y) for step in (1, 2, 3)])

    return jax.vmap(of_task)(TASKS).mean(0)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"differentiation": "reverse"}])
def test_earlier_steps_count_less_and_less(options):
    """A third each at first, three quarters of that after a quarter of the time, and nothing from its end on."""
    learner = BUILD(**options)
    update, state = jax.jit(learner.update), learner.init(KEY)
    for number, weights in enumerate([(4, 4, 4), (3, 3, 6), (2, 2, 8), (1, 1, 10), (0, 0, 12), (0, 0, 12)]):
        assert state.extra == number
        loss, gradient = weighted_loss(state.params, jnp.array(weights, jnp.float32))
        expected = optax.tree.add_scale(state.params, -0.01, gradient)
        state, metrics = update(KEY, state, TASKS)
        assert jnp.isfinite(loss)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, expected)


def test_both_losses_take_the_tasks_by_chunks():
    """That of all steps and that of the last one: an update computes either, its program has both."""
    for chunk_size, at_a_time in ((None, {3}), (1, set())):  # of the three tasks; one alone is not mapped
        spied_on, sizes = spy()
        loss_fn = lambda outputs, y, spied_on=spied_on: mse(outputs, spied_on(y))  # noqa: E731
        how = {"differentiation": "first_order", "chunk_size": chunk_size}
        learner = maml_plus_plus(MODEL, loss_fn, multi_step_updates=4, **SHARED, **how)
        jax.eval_shape(learner.update, KEY, jax.eval_shape(learner.init, KEY), TASKS)
        assert set(sizes) == at_a_time


def test_in_half_precision():
    """Of parameters and data alike: with both losses its metrics have the same dtypes."""
    model = MODEL._replace(init=lambda key: optax.tree.cast(MODEL.init(key), jnp.bfloat16))
    learner, state = maml_plus_plus(model, mse, multi_step_updates=1, **SHARED), None
    for _ in range(2):
        state, metrics = jax.jit(learner.update)(KEY, state or learner.init(KEY), optax.tree.cast(TASKS, jnp.bfloat16))
        assert {leaf.dtype for leaf in jax.tree.leaves((state.params, metrics["loss"]))} == {jnp.dtype(jnp.bfloat16)}
        assert jnp.isfinite(metrics["loss"])


def test_several_seeds_and_a_single_step():
    """Each seed counts for itself; with one step it is MAML from the beginning."""
    learner, plain = BUILD(inner_steps=1), maml(MODEL, mse, **SHARED | {"inner_steps": 1})
    states = jax.vmap(learner.init)(jax.random.split(KEY, 2))._replace(extra=jnp.array([0, 7], jnp.int32))
    ours, theirs = (jax.jit(jax.vmap(one.update, (None, 0, None)))(KEY, states, TASKS)[0] for one in (learner, plain))
    assert ours.extra.tolist() == [1, 8]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours.params, theirs.params)


def test_in_first_order_it_has_another_gradient():
    first, second = (BUILD(differentiation=name) for name in ("first_order", "mixed"))
    one, two = (jax.jit(learner.update)(KEY, learner.init(KEY), TASKS) for learner in (first, second))
    np.testing.assert_allclose(one[1]["loss"], two[1]["loss"], rtol=1e-6)
    assert abs(one[1]["grad_norm"] / two[1]["grad_norm"] - 1) > 1e-3


@pytest.mark.parametrize("name", ["inner_steps", "multi_step_updates", "eval_steps"])
def test_counts_are_positive(name):
    counts = {"inner_steps": 1, "multi_step_updates": 1, "eval_steps": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
        maml_plus_plus(MODEL, mse, rule=0.1, tx=optax.sgd(0.1), **counts)
