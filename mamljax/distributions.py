"""Probability distributions: normal ones of vectors, and choices among a few.

A value of either type is one distribution, or a batch of them.
"""

import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array


class Gaussian(NamedTuple):
    """A normal distribution with a diagonal covariance."""

    mean: Array  # [..., a]
    log_std: Array  # [..., a] or [a], natural logarithm of the standard deviation

    @staticmethod
    def noise(key: Array, shape: tuple[int, ...]) -> Array:
        """Draw what `from_noise` makes samples of, [..., a]."""
        return jax.random.normal(key, shape)

    def from_noise(self, noise: Array) -> Array:
        """Turn standard normal noise [..., a] into samples [..., a]."""
        # Broadcast by hand: `log_std` may be [a], and a program may have JAX forbid rank promotion.
        return self.mean + jnp.exp(jnp.broadcast_to(self.log_std, self.mean.shape)) * noise

    def log_prob(self, x: Array) -> Array:
        """Logarithm of the density of x [..., a], in nats: [...].

        >>> round(Gaussian(jnp.zeros(2), jnp.zeros(2)).log_prob(jnp.zeros(2)).item(), 4)  # - log(2 pi)
        -1.8379
        """
        log_std = jnp.broadcast_to(self.log_std, self.mean.shape)
        standardised = (x - self.mean) * jnp.exp(-log_std)
        return -jnp.sum(0.5 * standardised**2 + log_std + 0.5 * math.log(2 * math.pi), axis=-1)

    def kl_divergence(self, other: "Gaussian") -> Array:
        r"""Kullback-Leibler divergence from this distribution to another one, in nats: [...].

        $\sum_j \log \frac{\sigma'_j}{\sigma_j} + \frac{\sigma_j^2 + (\mu_j - \mu'_j)^2}{2 \sigma_j'^2} - \frac12$.

        >>> Gaussian(jnp.zeros(2), jnp.zeros(2)).kl_divergence(Gaussian(jnp.ones(2), jnp.zeros(2))).item()
        1.0
        """
        mean, log_std, other_mean, other_log_std = jnp.broadcast_arrays(*self, *other)
        ratio = jnp.exp(2 * (log_std - other_log_std))
        distance = (mean - other_mean) * jnp.exp(-other_log_std)
        return jnp.sum(other_log_std - log_std + 0.5 * (ratio + distance**2 - 1), axis=-1)


class Categorical(NamedTuple):
    """A choice of one among n."""

    logits: Array  # [..., n] logarithms of the probabilities, up to a constant; as low as one likes, but finite

    @staticmethod
    def noise(key: Array, shape: tuple[int, ...]) -> Array:
        """Draw what `from_noise` makes samples of, [..., n]."""
        return jax.random.gumbel(key, shape)

    def from_noise(self, noise: Array) -> Array:
        """Turn Gumbel noise [..., n] into samples [...] int32, from 0 to n - 1."""
        return jnp.argmax(self.logits + noise, axis=-1).astype(jnp.int32)

    def log_prob(self, x: Array) -> Array:
        """Logarithm of the probability of x [...], in nats: [...].

        >>> jnp.exp(Categorical(jnp.zeros(4)).log_prob(jnp.array(2))).item()
        0.25
        """
        return jnp.take_along_axis(jax.nn.log_softmax(self.logits), x[..., None], axis=-1)[..., 0]

    def kl_divergence(self, other: "Categorical") -> Array:
        """Kullback-Leibler divergence from this distribution to another one, in nats: [...].

        >>> round(Categorical(jnp.array([0.0, -1e9])).kl_divergence(Categorical(jnp.zeros(2))).item(), 4)  # log 2
        0.6931
        """
        log_p, log_q = jax.nn.log_softmax(self.logits), jax.nn.log_softmax(other.logits)
        # It is for this product that logits must be finite: with -inf it would be 0 times infinity.
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


Distribution: TypeAlias = Gaussian | Categorical
