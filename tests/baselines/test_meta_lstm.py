"""The meta-learner LSTM: its steps against NumPy, what its gates begin with, what is learned."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamljax.baselines.meta_lstm import meta_lstm, seen
from mamljax.evaluate import evaluate
from mamljax.inner import adapt
from mamljax.losses import mse
from mamljax.maml import maml
from mamljax.models import mlp
from mamljax.tasks.sinusoid import sinusoid
from mamljax.train import fit
from mamljax.types import Model

KEY = jax.random.key(0)
WEIGHTS = Model(lambda key: {"a": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}, lambda params, x: x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_two_steps_are_those_of_the_paper():
    """Written out for each coordinate, of a loss whose gradient is three times the parameters."""
    model, rule = meta_lstm(WEIGHTS, 0.1, hidden=2)
    params = model.init(KEY)
    noise = iter(jax.random.split(jax.random.key(1), 10))
    params["cell"] = jax.tree.map(lambda leaf: leaf + jax.random.normal(next(noise), leaf.shape), params["cell"])
    cell = jax.tree.map(np.asarray, params["cell"])

    def loss(params, _):
        return 1.5 * sum((leaf**2).sum() for leaf in jax.tree.leaves(params["theta"]))

    final, _ = adapt(loss, params, jnp.zeros(2), rule)
    np.testing.assert_array_equal(final["cell"]["lstm_kernel"], cell["lstm_kernel"])
    expected = []
    for theta in (1.0, -2.0, 0.5):
        hidden, memory, taken, kept = np.zeros(2), np.zeros(2), 0.0, 0.0
        for _ in range(2):
            slope = 3 * theta
            inputs = [math.log(abs(slope)) / 10, np.sign(slope), *hidden]
            i, f, o, g = (inputs @ cell["lstm_kernel"] + cell["lstm_bias"][0]).reshape(4, 2)
            memory = sigmoid(f) * memory + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(memory)
            taken = sigmoid(np.array([*hidden, theta, taken]) @ cell["input_kernel"] + cell["input_bias"])
            kept = sigmoid(np.array([*hidden, theta, kept]) @ cell["forget_kernel"] + cell["forget_bias"])
            theta = kept * theta - taken * slope
        expected.append(theta)
    np.testing.assert_allclose(np.concatenate([final["theta"]["a"], final["theta"]["b"]]), expected, rtol=1e-5)


@pytest.mark.parametrize(("inner_lr", "atol"), [(0.03, 0.01), (0.5, 0.03)])
def test_it_begins_as_gradient_descent_that_keeps_nearly_everything(inner_lr, atol):
    model, rule = meta_lstm(mlp(1, (8,), 1), inner_lr)
    params = model.init(KEY)
    gradient = jax.tree.map(lambda leaf: jax.random.normal(KEY, leaf.shape), params)
    updates, _ = rule.update(gradient, rule.init(params), params)
    for update, slope, leaf in zip(*map(jax.tree.leaves, (updates["theta"], gradient["theta"], params["theta"])), strict=True):
        np.testing.assert_allclose(update, -inner_lr * slope - 0.007 * leaf, atol=atol)


def test_what_it_sees_of_gradients_of_all_sizes():
    slopes = jnp.array([1.0, -math.exp(-5), math.exp(-11), 0.0])
    np.testing.assert_allclose(seen(slopes), [[0, 1], [-0.5, -1], [-1, math.exp(-1)], [-1, 0]], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("inner_lr", [0.0, 1.0, -0.1, float("nan"), optax.sgd(0.1)])
def test_a_gate_is_between_zero_and_one(inner_lr):
    with pytest.raises(ValueError, match="step size.*must be (positive|below 1).*, got"):
        meta_lstm(mlp(1, (8,), 1), inner_lr)


def test_its_size_is_checked():
    with pytest.raises(ValueError, match="hidden must be a whole number of at least 1, got 0"):
        meta_lstm(mlp(1, (8,), 1), 0.1, hidden=0)


@pytest.mark.slow
def test_it_learns_to_adapt():
    """Sinusoids, in three steps: far better than before them, and than after those that it began with."""
    model, rule = meta_lstm(mlp(1, (20, 20), 1), 0.01, hidden=4)
    sizes = {"inner_steps": 3, "eval_steps": 3, "differentiation": "first_order"}
    learner = maml(model, mse, rule=rule, tx=optax.adam(2e-2), **sizes)
    sample = sinusoid(shots=10, queries=10)
    trained = fit(learner, sample, key=KEY, num_updates=250, num_tasks=8).state
    errors, at_first = (
        evaluate(learner, state, sample, key=jax.random.key(1), num_tasks=200)["loss"].mean(0)
        for state in (trained, learner.init(KEY))
    )
    assert errors[3] < 0.5 * min(errors[0], at_first[3])
