"""The outer loop: the mean over tasks, what is differentiated, what the optimiser is given."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from spying import spy

from mamljax.outer import meta_learner
from mamljax.types import State

KEY = jax.random.key(0)


def learner_with(task_loss, **arguments):
    arguments = {"tx": optax.sgd(1.0)} | arguments
    return meta_learner(lambda key: jnp.float32(3.0), task_loss, lambda key, state, task: {}, **arguments)


def test_descends_the_mean_over_tasks():
    learner = learner_with(lambda params, task: 0.5 * (params - task) ** 2)
    state, metrics = learner.update(KEY, learner.init(KEY), jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(metrics["loss"], (2**2 / 2 + 1**2 / 2) / 2)
    np.testing.assert_allclose(metrics["grad_norm"], 1.5)
    np.testing.assert_allclose(state.params, 3.0 - 1.5)


def test_the_loss_of_a_task_is_alone():
    learner = learner_with(lambda params, task: (params, {"more": task}))
    with pytest.raises(ValueError, match=r"the loss must be a scalar, got tuple. Return nothing beside it."):
        learner.update(KEY, learner.init(KEY), jnp.ones(2))


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_the_loss_of_a_task_is_a_scalar(num_tasks):
    learner = learner_with(lambda params, task: jnp.stack([params, task]))
    with pytest.raises(ValueError, match=r"the loss must be a scalar, got shape \(2,\). Take its mean"):
        learner.update(KEY, learner.init(KEY), jnp.ones(num_tasks))


def test_gather_is_not_differentiated():
    def gather(key, params, task):
        return params * task

    seen = []

    def task_loss(params, data):
        seen.append(data.shape)
        return params * data

    learner = learner_with(task_loss, gather=gather)
    state, _ = learner.update(KEY, learner.init(KEY), jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(state.params, 3.0 - (3.0 * 1 + 3.0 * 2) / 2)
    assert seen == [()]  # the loss sees one task at a time


def test_gather_has_a_key_of_its_own_for_each_task_and_update():
    learner = learner_with(
        lambda params, data: params * data[0] + data[1], gather=lambda key, _, task: (task, jax.random.normal(key))
    )

    def mean_noise(key):
        return learner.update(key, learner.init(KEY), jnp.zeros(2))[1]["loss"]

    one, other = (float(jax.random.normal(key)) for key in jax.random.split(KEY, 2))
    assert one != other
    np.testing.assert_allclose(mean_noise(KEY), (one + other) / 2, rtol=1e-5)
    assert mean_noise(jax.random.key(1)) != mean_noise(KEY)


def test_optimiser_gets_value_gradient_and_loss_function():
    """An optimiser that re-evaluates the loss, as a line search does."""

    def update(updates, state, params, *, value, grad, value_fn, **_):
        np.testing.assert_allclose(value_fn(params), value)
        better = value_fn(params - 0.5 * grad) < value
        return jax.tree.map(lambda g: jnp.where(better, -0.5 * g, 0.0), updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    learner = learner_with(lambda params, task: 0.5 * (params - task) ** 2, tx=tx)
    state, _ = learner.update(KEY, learner.init(KEY), jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(state.params, 3.0 - 0.5 * 2.0)


def test_extra_state_is_left_alone():
    learner = learner_with(lambda params, task: params * task)
    before = State(jnp.float32(3.0), learner.init(KEY).opt, extra={"count": jnp.int32(4)})
    after, _ = learner.update(KEY, before, jnp.ones(2))
    assert after.extra == {"count": 4}


@pytest.mark.parametrize("tx", [1e-3, optax.adam])
def test_the_optimiser_is_an_optax_transformation(tx):
    with pytest.raises(ValueError, match=r"tx must be an Optax transformation, such as optax.adam\(1e-3\), got"):
        meta_learner(lambda key: jnp.zeros(1), None, None, tx=tx)


def test_meta_parameters_are_floating_point():
    learner = meta_learner(lambda key: {"w": jnp.ones(2), "n": jnp.ones(3, int)}, None, None, tx=optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"params\['n'\] has dtype int32, but only floating-point parameters have gradients"):
        learner.init(KEY)


def test_chunks_of_tasks_give_the_same_update():
    tasks = jax.random.normal(KEY, (6, 4))
    results = []
    for chunk_size in (None, 12, 6, 5, 4, 3, 2, 1):  # of 5 and 4 the rest is a smaller chunk, of one task and of two
        learner = learner_with(lambda params, task: jnp.sin(params * task).sum(), chunk_size=chunk_size)
        state, metrics = jax.jit(learner.update)(KEY, learner.init(KEY), tasks)
        results.append((state.params, metrics["loss"], metrics["grad_norm"]))
    np.testing.assert_allclose(results, [results[0]] * 8, rtol=1e-5)


def test_the_loss_function_of_the_optimiser_goes_by_chunks_too():
    """Whatever evaluates the loss sees two tasks at a time."""
    spied_on, sizes = spy()

    def update(updates, state, params, *, value, value_fn, **_):
        sizes.clear()
        np.testing.assert_allclose(value_fn(params), value)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    learner = learner_with(lambda params, task: 0.5 * (params - spied_on(task)) ** 2, tx=tx, chunk_size=2)
    learner.update(KEY, learner.init(KEY), jnp.arange(6.0))
    assert set(sizes) == {2}


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0])
def test_chunk_size_must_be_a_count(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size must be a whole number of at least 1, got {chunk_size}"):
        learner_with(lambda params, task: params * task, chunk_size=chunk_size)
