"""Normal distributions against SciPy and against their definition."""

import jax.numpy as jnp
import numpy as np
from scipy import stats

from mamljax import gaussian
from mamljax.gaussian import Gaussian

GENERATOR = np.random.default_rng(0)
X, MEAN, OTHER = GENERATOR.normal(size=(3, 5, 4, 2)).astype(np.float32)
NOISE = jnp.array(GENERATOR.normal(size=(40_000, 2)).astype(np.float32))
LOG_STD = np.array([-1.0, 0.5], np.float32)


def test_log_prob_is_scipys():
    expected = stats.norm.logpdf(X, MEAN, np.exp(LOG_STD)).sum(-1)
    np.testing.assert_allclose(gaussian.log_prob(X, Gaussian(MEAN, LOG_STD)), expected, rtol=1e-5)
    np.testing.assert_allclose(gaussian.log_prob(X, Gaussian(MEAN, np.broadcast_to(LOG_STD, X.shape))), expected, rtol=1e-5)


def test_kl_divergence_is_the_mean_log_ratio():
    """Over 40,000 samples, to within five standard errors."""
    one = Gaussian(jnp.array([0.3, -1.0]), jnp.array(LOG_STD))
    other = Gaussian(jnp.array([0.0, -0.5]), jnp.zeros(2))
    each = [policy._replace(mean=jnp.tile(policy.mean, (40_000, 1))) for policy in (one, other)]
    x = gaussian.from_noise(NOISE, each[0])
    log_ratio = gaussian.log_prob(x, each[0]) - gaussian.log_prob(x, each[1])
    expected = gaussian.kl_divergence(one, other)
    assert abs(log_ratio.mean() - expected) < 5 * log_ratio.std() / 200


def test_kl_divergence_from_itself_is_zero():
    assert (gaussian.kl_divergence(Gaussian(MEAN, LOG_STD), Gaussian(MEAN, LOG_STD)) == 0).all()
    assert (gaussian.kl_divergence(Gaussian(MEAN, LOG_STD), Gaussian(OTHER, LOG_STD)) > 0).all()


def test_samples_have_the_mean_and_the_standard_deviation():
    x = gaussian.from_noise(NOISE, Gaussian(jnp.tile(jnp.array([1.0, -2.0]), (40_000, 1)), jnp.array(LOG_STD)))
    standard_error = np.exp(LOG_STD) / 200
    assert (np.abs(x.mean(0) - np.array([1.0, -2.0])) < 5 * standard_error).all()
    assert (np.abs(x.std(0) - np.exp(LOG_STD)) < 5 * standard_error).all()
