"""Distributions against SciPy and against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from mamljax.distributions import Categorical, Gaussian

GENERATOR = np.random.default_rng(0)
X, MEAN, OTHER = GENERATOR.normal(size=(3, 5, 4, 2)).astype(np.float32)
LOG_STD = np.array([-1.0, 0.5], np.float32)
LOGITS, OTHER_LOGITS = GENERATOR.normal(size=(2, 5, 4, 3)).astype(np.float32)
CHOICES = GENERATOR.integers(3, size=(5, 4))
SAMPLES = 40_000


def test_log_prob_of_a_gaussian_is_scipys():
    expected = stats.norm.logpdf(X, MEAN, np.exp(LOG_STD)).sum(-1)
    np.testing.assert_allclose(Gaussian(MEAN, LOG_STD).log_prob(X), expected, rtol=1e-5)
    np.testing.assert_allclose(Gaussian(MEAN, np.broadcast_to(LOG_STD, X.shape)).log_prob(X), expected, rtol=1e-5)


def test_log_prob_of_a_choice():
    expected = np.take_along_axis(special.log_softmax(LOGITS, axis=-1), CHOICES[..., None], -1)[..., 0]
    np.testing.assert_allclose(Categorical(jnp.array(LOGITS)).log_prob(jnp.array(CHOICES)), expected, rtol=1e-5)


def samples(distribution):
    """Many of one distribution, and the distribution as a batch."""
    batch = jax.tree.map(lambda leaf: jnp.tile(leaf, (SAMPLES, 1)), distribution)
    return batch.from_noise(batch.noise(jax.random.key(0), (SAMPLES, len(distribution[0])))), batch


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Gaussian(jnp.array([0.3, -1.0]), jnp.array(LOG_STD)), Gaussian(jnp.array([0.0, -0.5]), jnp.zeros(2))),
        (Categorical(jnp.array([0.3, -1.0, 2.0])), Categorical(jnp.array([0.0, 1.0, 0.5]))),
    ],
    ids=["gaussian", "categorical"],
)
def test_kl_divergence_is_the_mean_log_ratio(one, other):
    """To within five standard errors."""
    x, batch = samples(one)
    log_ratio = batch.log_prob(x) - samples(other)[1].log_prob(x)
    assert abs(log_ratio.mean() - one.kl_divergence(other)) < 5 * log_ratio.std() / SAMPLES**0.5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Gaussian(MEAN, LOG_STD), Gaussian(OTHER, LOG_STD)),
        (Categorical(LOGITS), Categorical(OTHER_LOGITS)),
    ],
    ids=["gaussian", "categorical"],
)
def test_kl_divergence_from_itself_is_zero(one, other):
    assert (one.kl_divergence(one) == 0).all()
    assert (one.kl_divergence(other) > 0).all()
    assert one.kl_divergence(other).shape == (5, 4)


def test_samples_of_a_gaussian_have_its_mean_and_standard_deviation():
    x, _ = samples(Gaussian(jnp.array([1.0, -2.0]), jnp.array(LOG_STD)))
    standard_error = np.exp(LOG_STD) / SAMPLES**0.5
    assert (np.abs(x.mean(0) - np.array([1.0, -2.0])) < 5 * standard_error).all()
    assert (np.abs(x.std(0) - np.exp(LOG_STD)) < 5 * standard_error).all()


def test_choices_are_as_frequent_as_their_probabilities():
    x, _ = samples(Categorical(jnp.log(jnp.array([0.1, 0.2, 0.7]))))
    assert x.dtype == jnp.int32
    share = np.bincount(x, minlength=3) / SAMPLES
    np.testing.assert_allclose(share, [0.1, 0.2, 0.7], atol=5 * 0.5 / SAMPLES**0.5)


def test_what_is_ruled_out_is_never_chosen_and_has_no_gradient():
    logits = jnp.array([0.5, -1e9, 0.0])
    assert 1 not in samples(Categorical(logits))[0]
    gradient = jax.grad(lambda logits: Categorical(logits).log_prob(jnp.array(0)))(logits)
    assert jnp.isfinite(gradient).all()
    assert gradient[1] == 0
    assert jnp.isfinite(Categorical(logits).kl_divergence(Categorical(jnp.zeros(3))))
