"""Losses against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamljax.losses import accuracy, cross_entropy, mse


def test_mse_is_the_mean_over_examples_and_dimensions():
    outputs = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(mse(outputs, jnp.array([[1.0, 0.0], [0.0, 4.0]])), (0 + 4 + 9 + 0) / 4)


def test_cross_entropy_is_the_mean_over_examples():
    logits = jnp.log(jnp.array([[0.2, 0.8], [0.5, 0.5]]))
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([0, 1])), -(np.log(0.2) + np.log(0.5)) / 2, rtol=1e-6)


def test_accuracy():
    logits = jnp.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    np.testing.assert_allclose(accuracy(logits, jnp.array([1, 0, 0])), 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(accuracy(logits, jnp.array([1, -1, 0])), 1 / 2, rtol=1e-6)  # of those with a label


def test_mse_does_not_broadcast():
    with pytest.raises(ValueError, match=r"one shape, got \(3, 1\) and \(3,\)"):
        mse(jnp.zeros((3, 1)), jnp.zeros(3))


@pytest.mark.parametrize("loss_fn", [cross_entropy, accuracy])
@pytest.mark.parametrize("labels", [jnp.zeros(2, int), jnp.zeros((3, 2), int), jnp.zeros(3)])
def test_labels_must_be_one_integer_an_example(loss_fn, labels):
    with pytest.raises(ValueError, match="expected logits"):
        loss_fn(jnp.zeros((3, 2)), labels)


def test_labels_that_no_logit_stands_for_have_no_gradient_either():
    """An inner loop sees the gradient alone; of an unlabelled example it is zero."""
    logits = jnp.zeros((3, 2))
    assert jnp.isnan(jax.grad(cross_entropy)(logits, jnp.array([0, 2, 1]))[1]).all()
    gradient = jax.grad(cross_entropy)(logits, jnp.array([0, -1, 1]))
    np.testing.assert_allclose(gradient, [[-0.25, 0.25], [0.0, 0.0], [0.25, -0.25]])
