"""The sinusoid sampler: its ranges and distributions, each within its own standard error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamljax.tasks.sinusoid import sinusoid

COUNT = 4000


def draw(seed=0, **arguments):
    sample = sinusoid(**{"shots": 5, "queries": 7} | arguments)
    return jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(seed), COUNT))


def assert_uniform(values, low, high):
    """Mean and variance of U[low, high] within four standard errors, and nothing outside."""
    values = np.asarray(values, np.float64).ravel()
    assert values.min() >= low
    assert values.max() <= high
    width = high - low
    assert abs(values.mean() - (low + high) / 2) < 4 * width / np.sqrt(12 * values.size)
    # Var of the variance estimate of a uniform: width^4 (1/80 - 1/144) / n.
    assert abs(values.var() - width**2 / 12) < 4 * width**2 * np.sqrt((1 / 80 - 1 / 144) / values.size)


def test_amplitude_phase_and_inputs_are_uniform():
    tasks = draw(reveal=True)
    assert_uniform(tasks.support.x[..., 0], -5, 5)
    assert_uniform(tasks.query.x[..., 0], -5, 5)
    assert_uniform(tasks.support.x[:, 0, 1], 0.1, 5)
    assert_uniform(tasks.support.x[:, 0, 2], 0, np.pi)


def test_targets_are_the_curve_of_the_task():
    tasks = draw(reveal=True)
    for examples in tasks:
        x, amplitude, phase = np.moveaxis(np.asarray(examples.x, np.float64), -1, 0)
        np.testing.assert_allclose(examples.y[..., 0], amplitude * np.sin(x - phase), atol=1e-5)
    np.testing.assert_array_equal(tasks.support.x[:, 0, 1:], tasks.query.x[:, 0, 1:])


def test_draws_are_independent():
    tasks = draw(reveal=True)
    columns = np.stack(
        [tasks.support.x[:, 0, 0], tasks.support.x[:, 1, 0], tasks.query.x[:, 0, 0], *tasks.support.x[:, 0, 1:].T]
    )
    correlations = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlations).max() < 4.5 / np.sqrt(COUNT)


def test_shapes_and_dtypes():
    task = sinusoid(shots=5, queries=7)(jax.random.key(0))
    assert (task.support.x.shape, task.support.y.shape) == ((5, 1), (5, 1))
    assert (task.query.x.shape, task.query.y.shape) == ((7, 1), (7, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(task)} == {jnp.dtype("float32")}


def test_same_key_same_task_whatever_is_shown_of_it():
    plain, told = draw(), draw(reveal=True)
    np.testing.assert_array_equal(plain.support.x, told.support.x[..., :1])
    np.testing.assert_array_equal(plain.query.y, told.query.y)
    assert (draw(seed=1).support.x != plain.support.x).any()


def test_support_from_half_of_the_range():
    tasks = draw(support_range=(-5.0, 0.0))
    assert_uniform(tasks.support.x, -5, 0)
    assert_uniform(tasks.query.x, -5, 5)


@pytest.mark.parametrize("name", ["shots", "queries"])
def test_counts_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
        sinusoid(**{"shots": 1, "queries": 1} | {name: 0})
