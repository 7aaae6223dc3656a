"""Normal distributions with a diagonal covariance."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Gaussian(NamedTuple):
    """One such distribution, or a batch of them."""

    mean: Array  # [..., a]
    log_std: Array  # [..., a] or [a], natural logarithm of the standard deviation


def from_noise(noise: Array, gaussian: Gaussian) -> Array:
    """Turn standard normal noise [..., a] into samples [..., a]."""
    mean, log_std = gaussian
    return mean + jnp.exp(jnp.broadcast_to(log_std, mean.shape)) * noise


def log_prob(x: Array, gaussian: Gaussian) -> Array:
    """Logarithm of the density of x [..., a], in nats: [...].

    >>> round(float(log_prob(jnp.zeros(2), Gaussian(jnp.zeros(2), jnp.zeros(2)))), 4)  # - log(2 pi)
    -1.8379
    """
    mean, log_std = gaussian
    log_std = jnp.broadcast_to(log_std, mean.shape)
    standardised = (x - mean) * jnp.exp(-log_std)
    return -jnp.sum(0.5 * standardised**2 + log_std + 0.5 * math.log(2 * math.pi), axis=-1)


def kl_divergence(gaussian: Gaussian, other: Gaussian) -> Array:
    r"""Kullback-Leibler divergence from a distribution to another one, in nats: [...].

    $\sum_j \log \frac{\sigma'_j}{\sigma_j} + \frac{\sigma_j^2 + (\mu_j - \mu'_j)^2}{2 \sigma_j'^2} - \frac12$.

    >>> kl_divergence(Gaussian(jnp.zeros(2), jnp.zeros(2)), Gaussian(jnp.ones(2), jnp.zeros(2))).item()
    1.0
    """
    mean, log_std, other_mean, other_log_std = jnp.broadcast_arrays(*gaussian, *other)
    ratio = jnp.exp(2 * (log_std - other_log_std))
    distance = (mean - other_mean) * jnp.exp(-other_log_std)
    return jnp.sum(other_log_std - log_std + 0.5 * (ratio + distance**2 - 1), axis=-1)
