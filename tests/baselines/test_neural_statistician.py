"""The neural statistician: its bound and its logits by hand, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamljax.baselines.neural_statistician import Noise, negative_bound, neural_statistician
from mamljax.losses import cross_entropy
from mamljax.models import mlp
from mamljax.types import Examples, Model, Task

WAYS, CONTEXT, LATENT, HIDDEN, PIXELS = 2, 3, 2, 5, 4
KEY = jax.random.key(0)
IDENTITY = Model(lambda key: {"none": jnp.zeros(())}, lambda params, x: x)
SIZES = {"ways": WAYS, "context_size": CONTEXT, "latent_size": LATENT, "hidden": HIDDEN, "tx": optax.sgd(0.1)}
IMAGES = jax.random.uniform(jax.random.key(1), (6, PIXELS))
TASK = Task(Examples(IMAGES[:3], jnp.array([0, 1, 1])), Examples(IMAGES[3:], jnp.array([1, 0, 0])))

MODELS = {
    "features": IDENTITY,
    "statistic": mlp(PIXELS, (HIDDEN,), HIDDEN),
    "context": mlp(HIDDEN, (HIDDEN,), 2 * CONTEXT),
    "prior": mlp(CONTEXT, (HIDDEN,), 2 * LATENT),
    "latent": mlp(PIXELS + CONTEXT, (HIDDEN,), 2 * LATENT),
    "pixels": mlp(LATENT + CONTEXT, (HIDDEN,), PIXELS),
}


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


def noise_of(size):
    rng = np.random.default_rng(2)
    return Noise(rng.normal(size=(WAYS, CONTEXT)), rng.normal(size=(size, LATENT)))


def dense(layer, x):
    return x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])


def apply_mlp(params, name, x):
    return dense(params[name]["Dense_1"], np.maximum(dense(params[name]["Dense_0"], x), 0))


def bound_by_numpy(params, images, labels, noise):
    """One class and one example at a time."""
    total, labels = 0.0, np.asarray(labels)
    for label in range(WAYS):
        of_class = np.flatnonzero(labels == label)
        pooled = np.maximum(apply_mlp(params, "statistic", images[of_class]), 0).mean(0)
        posterior = apply_mlp(params, "context", pooled)
        context = posterior[:CONTEXT] + np.exp(posterior[CONTEXT:]) * noise.context[label]
        total += sum(kl(mean, log_std, 0, 0) for mean, log_std in posterior.reshape(2, -1).T)
        prior = apply_mlp(params, "prior", context)
        for i in of_class:
            latent = apply_mlp(params, "latent", np.append(images[i], context))
            z = latent[:LATENT] + np.exp(latent[LATENT:]) * noise.latent[i]
            logits = apply_mlp(params, "pixels", np.append(z, context))
            total += (images[i] * np.logaddexp(0, -logits) + (1 - images[i]) * np.logaddexp(0, logits)).sum()
            total += sum(map(kl, latent[:LATENT], latent[LATENT:], prior[:LATENT], prior[LATENT:]))
    return total / (labels >= 0).sum()


@pytest.mark.parametrize("unlabelled", [0, 2])
def test_the_bound_by_numpy(unlabelled):
    """With networks that see their inputs; images without a label are nowhere in it."""
    learner, others = build(), jax.random.uniform(jax.random.key(3), (unlabelled, PIXELS))
    params = jax.tree.map(lambda leaf: leaf + 0.1, learner.init(KEY).params)
    images, labels = np.concatenate([IMAGES, others]), jnp.array([0, 1, 1, 1, 0, 0, *[-1] * unlabelled])
    noise = noise_of(len(labels))
    expected = bound_by_numpy(jax.tree.map(np.float64, params), images, labels, noise)
    network = {name: functools.partial(model.apply, params[name]) for name, model in MODELS.items()}
    found = negative_bound(network, jnp.asarray(images), jax.nn.one_hot(labels, WAYS), jax.tree.map(jnp.float32, noise))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_logits_by_hand():
    """Divergences from the context of a class, by the mean of its examples, to that of each query example alone."""
    params = build().init(KEY).params

    each = np.maximum(apply_mlp(params, "statistic", np.asarray(IMAGES)), 0)
    classes = apply_mlp(params, "context", np.stack([each[0], each[1:3].mean(0)]))
    queries = apply_mlp(params, "context", each[3:])
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


def test_samples_of_contexts_are_not_those_of_latent_variables(monkeypatch):
    """By a loss that counts what both have."""
    shared = lambda network, images, members, noise: 1.0 * jnp.isin(noise.context, noise.latent).sum()  # noqa: E731
    monkeypatch.setattr("mamljax.baselines.neural_statistician.negative_bound", shared)
    learner = build()
    assert learner.update(KEY, learner.init(KEY), jax.tree.map(lambda leaf: leaf[None], TASK))[1]["loss"] == 0


def test_malformed_tasks_are_refused():
    learner = build()
    state = learner.init(KEY)
    with pytest.raises(ValueError, match="x and y of the support set must have one length"):
        learner.update(
            KEY, state, jax.tree.map(lambda leaf: leaf[None], TASK._replace(support=Examples(IMAGES, jnp.arange(2))))
        )


@pytest.mark.parametrize(("name", "least"), [("ways", 2), ("context_size", 1), ("latent_size", 1), ("hidden", 1)])
def test_bad_sizes(name, least):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least {least}, got 0"):
        build(**{name: 0})
