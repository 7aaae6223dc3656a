"""The neural statistician: its bound and its logits by hand, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamljax.baselines.neural_statistician import neural_statistician
from mamljax.losses import cross_entropy
from mamljax.types import Examples, Model, Task

WAYS, CONTEXT, LATENT, HIDDEN, PIXELS = 2, 3, 2, 5, 4
KEY = jax.random.key(0)
IDENTITY = Model(lambda key: {"none": jnp.zeros(())}, lambda params, x: x)
SIZES = {"ways": WAYS, "context_size": CONTEXT, "latent_size": LATENT, "hidden": HIDDEN, "tx": optax.sgd(0.1)}
IMAGES = jax.random.uniform(jax.random.key(1), (6, PIXELS))
TASK = Task(Examples(IMAGES[:3], jnp.array([0, 1, 1])), Examples(IMAGES[3:], jnp.array([1, 0, 0])))


def build(loss_fn=cross_entropy, **changes):
    return neural_statistician(IDENTITY, IMAGES[:1], loss_fn, **SIZES | changes)


def with_outputs(params, **outputs):
    """The parameters of networks whose outputs are these, whatever they see; the others have zeros."""
    networks = {name: jax.tree.map(jnp.zeros_like, network) for name, network in params.items()}
    for name, output in outputs.items():
        networks[name]["Dense_1"]["bias"] = jnp.asarray(output, jnp.float32)
    return networks


def loss_of(task, **outputs):
    learner = build()
    state = learner.init(KEY)
    state = state._replace(params=with_outputs(state.params, **outputs))
    return learner.update(KEY, state, jax.tree.map(lambda leaf: leaf[None], task))[1]["loss"]


def kl(mean, log_std, other_mean, other_log_std):
    """From a normal distribution to another, in one dimension, by the integral."""
    x = np.linspace(-40, 40, 400_001)
    log_p, log_q = (-((x - m) ** 2) / 2 / np.exp(2 * s) - s for m, s in ((mean, log_std), (other_mean, other_log_std)))
    return np.trapezoid(np.exp(log_p) / np.sqrt(2 * np.pi) * (log_p - log_q), x)


def test_the_bound_by_hand():
    """Per example; a class has one context, each of the six examples a latent variable and four pixels."""
    p = 1 / (1 + np.exp(-0.7))
    errors = -(IMAGES * np.log(p) + (1 - IMAGES) * np.log(1 - p)).sum(1).mean()
    np.testing.assert_allclose(loss_of(TASK, pixels=[0.7] * PIXELS), errors, rtol=1e-5)
    of_class = CONTEXT * kl(0.5, -0.2, 0, 0) * WAYS / 6
    of_latent = LATENT * kl(1.0, 0.1, -0.3, 0.4)
    networks = {"context": [0.5] * CONTEXT + [-0.2] * CONTEXT, "latent": [1.0] * LATENT + [0.1] * LATENT}
    networks |= {"prior": [-0.3] * LATENT + [0.4] * LATENT, "pixels": [0.7] * PIXELS}
    np.testing.assert_allclose(loss_of(TASK, **networks), errors + of_class + of_latent, rtol=1e-4)


def test_unlabelled_examples_do_not_count():
    unlabelled = TASK._replace(query=Examples(IMAGES[jnp.array([0, 1, 3, 4, 5])], jnp.array([-1, -1, 1, 0, 0])))
    np.testing.assert_allclose(loss_of(unlabelled, pixels=[0.7] * PIXELS), loss_of(TASK, pixels=[0.7] * PIXELS), rtol=1e-6)


def test_logits_by_hand():
    """Divergences from the context of a class, by the mean of its examples, to that of each query example alone."""
    params = build().init(KEY).params

    def dense(layer, x):
        return x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])

    def mlp(name, x):
        return dense(params[name]["Dense_1"], np.maximum(dense(params[name]["Dense_0"], x), 0))

    each = np.maximum(mlp("statistic", np.asarray(IMAGES)), 0)
    classes = mlp("context", np.stack([each[0], each[1:3].mean(0)]))
    queries = mlp("context", each[3:])
    expected = [
        [-sum(map(kl, a[:CONTEXT], a[CONTEXT:], b[:CONTEXT], b[CONTEXT:])) for a in classes.astype(np.float64)]
        for b in queries.astype(np.float64)
    ]
    assert np.ptp(expected) > 0.01
    learner = build(lambda logits, labels: jnp.abs(logits - jnp.array(expected)).max())
    np.testing.assert_allclose(learner.evaluate(KEY, learner.init(KEY), TASK)["loss"], [0.0], atol=1e-4)


def test_samples_differ_from_key_to_key():
    learner, tasks = build(), jax.tree.map(lambda leaf: leaf[None], TASK)
    state = learner.init(KEY)
    losses = {float(learner.update(key, state, tasks)[1]["loss"]) for key in jax.random.split(KEY, 3)}
    assert len(losses) == 3


@pytest.mark.parametrize("name", ["ways", "context_size", "latent_size", "hidden"])
def test_bad_sizes(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
        build(**{name: 0})
