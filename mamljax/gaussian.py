"""Normal distributions with a diagonal covariance, given by mean [..., a] and log-std, [..., a] or [a]."""

import math

import jax.numpy as jnp
from jax import Array


def from_noise(noise: Array, mean: Array, log_std: Array) -> Array:
    """Turn standard normal noise [..., a] into samples [..., a]."""
    return mean + jnp.exp(jnp.broadcast_to(log_std, mean.shape)) * noise


def log_prob(x: Array, mean: Array, log_std: Array) -> Array:
    """Logarithm of the density of x [..., a], in nats: [...].

    >>> round(float(log_prob(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2))), 4)  # - log(2 pi)
    -1.8379
    """
    log_std = jnp.broadcast_to(log_std, mean.shape)
    standardised = (x - mean) * jnp.exp(-log_std)
    return -jnp.sum(0.5 * standardised**2 + log_std + 0.5 * math.log(2 * math.pi), axis=-1)


def kl_divergence(mean: Array, log_std: Array, other_mean: Array, other_log_std: Array) -> Array:
    r"""Kullback-Leibler divergence from a distribution to another one, in nats: [...].

    $\sum_j \log \frac{\sigma'_j}{\sigma_j} + \frac{\sigma_j^2 + (\mu_j - \mu'_j)^2}{2 \sigma_j'^2} - \frac12$.

    >>> kl_divergence(jnp.zeros(2), jnp.zeros(2), jnp.ones(2), jnp.zeros(2)).item()
    1.0
    """
    mean, log_std, other_mean, other_log_std = jnp.broadcast_arrays(mean, log_std, other_mean, other_log_std)
    ratio = jnp.exp(2 * (log_std - other_log_std))
    distance = (mean - other_mean) * jnp.exp(-other_log_std)
    return jnp.sum(other_log_std - log_std + 0.5 * (ratio + distance**2 - 1), axis=-1)
