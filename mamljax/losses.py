"""Losses and metrics: (outputs, targets) -> scalar, the mean over examples.

An example whose class label is negative is unlabelled: the network sees it, but it does not count.
"""

import jax.numpy as jnp
import optax
from jax import Array


def mse(outputs: Array, targets: Array) -> Array:
    """Mean squared error over examples and target dimensions; both [n, d] float.

    >>> float(mse(jnp.zeros((2, 1)), jnp.full((2, 1), 3.0)))
    9.0
    """
    if outputs.shape != targets.shape:
        raise ValueError(
            f"outputs and targets must have one shape, got {outputs.shape} and {targets.shape}. Mind that [n] is not [n, 1]."
        )
    return jnp.mean((outputs - targets) ** 2)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean cross-entropy in nats; logits [n, N] float, labels [n] integer in 0..N-1, or -1 for examples without a label.

    Labels of N and above make it NaN, and its gradient, so that they are noticed in an inner loop too.

    >>> round(float(cross_entropy(jnp.zeros((3, 2)), jnp.array([0, 1, 1]))), 4)
    0.6931
    """
    _check_labels(logits, labels)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    # A factor, as the derivative of `where` between losses would be NaN for all of them.
    return jnp.mean(losses * jnp.where(labels < logits.shape[1], 1.0, jnp.nan), where=labels >= 0)


def accuracy(logits: Array, labels: Array) -> Array:
    """Share of examples whose largest logit is their label's, in [0, 1]; shapes as in `cross_entropy`.

    >>> float(accuracy(jnp.eye(2), jnp.array([0, 0])))
    0.5
    """
    _check_labels(logits, labels)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels, where=labels >= 0)


def _check_labels(logits: Array, labels: Array) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"expected logits [n, N] and integer labels [n], got {logits.shape} and {labels.dtype}{list(labels.shape)}."
        )
