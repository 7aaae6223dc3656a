"""The neural statistician, a comparison system of the paper's table 1: a variational autoencoder of sets of examples."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mamljax.checks import check_count, check_counts, check_task
from mamljax.comparison import evaluation, features_of
from mamljax.distributions import Gaussian
from mamljax.models import feature_size, mlp
from mamljax.outer import meta_learner
from mamljax.types import LossFn, MetaLearner, Model, PyTree, Task

Networks = Mapping[str, Callable[[Array], Array]]


class Noise(NamedTuple):
    """Standard normal numbers, of which samples of the approximate posteriors are made."""

    context: Array  # [N, c]
    latent: Array  # [n, z]


def neural_statistician(
    features: Model,
    x: Array,
    loss_fn: LossFn,
    *,
    ways: int,
    tx: optax.GradientTransformation,
    context_size: int = 512,
    latent_size: int = 16,
    hidden: int = 256,
    metric_fns: Mapping[str, LossFn] = {},
    chunk_size: int | None = None,
) -> MetaLearner:
    r"""The neural statistician (Edwards & Storkey 2017, arXiv 1606.02185, sections 3 and 4).

    A class has a context $c \sim N(0, 1)$, each of its examples a latent variable $z \sim p(z | c)$, and each of their pixels
    is 1 with a probability that $p(x | z, c)$ gives. $q(c | D)$ is what a network makes of a set $D$ of examples, by the mean
    over them, and $q(z | x, c)$ what another makes of one; all but pixels are distributed normally, each dimension for itself.
    The examples of each class of a task, support and query, are a set, and by the evidence lower bound

    $$E_q \left[ \sum_{x \in D} \log p(x | z, c) - KL(q(z | x, c) \| p(z | c)) \right] - KL(q(c | D) \| N(0, 1))$$

    it learns to make them more likely; of the labels it learns no more than which examples belong together. In evaluation the
    logit of a class with support examples $D$ is $-KL(q(c | D) \| q(c | x))$.

    Differs from the paper: the networks above the features are fully connected, with one hidden layer each, and so is that of
    the pixels; the features, where they are normalised, are so by all examples of a task; no examples are left out of $D$ at
    random; the terms of the bound have the same weights all the time.

    Args:
        features: [n, ...] -> [n, f].
        x: [n, ...] an example input, for its shape and dtype only; inputs are in [0, 1].
        loss_fn: (logits, labels) -> scalar, the mean over examples; reported in evaluation.
        ways: N, classes of a task, at least 2; labels are 0..N-1.
        tx: the outer optimiser.
        context_size: dimensions of c.
        latent_size: dimensions of z.
        hidden: units of each hidden layer.
        metric_fns: further (logits, labels) -> scalar to report in evaluation, by name.
        chunk_size: tasks differentiated at a time; see `outer.meta_learner`.

    Returns:
        A meta-learner of `Task(support, query)`. Its `loss` in training is the negative bound in nats per example; `evaluate`
        returns the `loss` of the logits and the metrics on the query set, each [1].

    Raises:
        ValueError: a count below 1, a single class; at the first update, a malformed task.
    """
    check_count("ways", ways, minimum=2)
    check_counts(context_size=context_size, latent_size=latent_size, hidden=hidden)
    seen = feature_size(features, x)
    models = {
        "features": features,
        "statistic": mlp(seen, (hidden,), hidden),  # of an example, to be averaged over a set
        "context": mlp(hidden, (hidden,), 2 * context_size),  # of such a mean: q(c | D)
        "prior": mlp(context_size, (hidden,), 2 * latent_size),  # p(z | c)
        "latent": mlp(seen + context_size, (hidden,), 2 * latent_size),  # q(z | x, c)
        "pixels": mlp(latent_size + context_size, (hidden,), x[0].size),  # p(x | z, c), as logits
    }

    def init(key: Array) -> PyTree:
        keys = jax.random.split(key, len(models))
        return {name: model.init(key) for (name, model), key in zip(models.items(), keys, strict=True)}

    def draw_noise(key: Array, params: PyTree, task: Task) -> tuple[Task, Noise]:
        check_task(task)
        num_images = len(task.support.y) + len(task.query.y)
        shapes = (ways, context_size), (num_images, latent_size)
        return task, Noise(*map(jax.random.normal, jax.random.split(key), shapes))

    def task_loss(params: PyTree, task_and_noise: tuple[Task, Noise]) -> Array:
        task, noise = task_and_noise
        images, labels = (jnp.concatenate(both) for both in zip(task.support, task.query, strict=True))
        return negative_bound(_applied(models, params), images, jax.nn.one_hot(labels, ways), noise)

    def compare(params: PyTree, task: Task) -> Array:
        network, (support, query) = _applied(models, params), features_of(features, params["features"], task)
        classes = contexts(network, support, jax.nn.one_hot(task.support.y, ways, axis=0))
        # Each query example is a set by itself.
        queries = contexts(network, query, jnp.eye(len(query)))
        one_by_one = jax.tree.map(lambda leaf: leaf[:, None], queries)
        # [N, c] against [n, 1, c]: each class with each query example.
        return -classes.kl_divergence(one_by_one)

    evaluate = evaluation(compare, loss_fn, metric_fns)
    return meta_learner(init, task_loss, evaluate, tx=tx, gather=draw_noise, chunk_size=chunk_size)


def negative_bound(network: Networks, images: Array, members: Array, noise: Noise) -> Array:
    """The negative evidence lower bound, in nats per example, of images [n, ...] whose classes [n, N] are 1."""
    vectors = network["features"](images)
    posterior = contexts(network, vectors, members.T)
    context = members @ posterior.from_noise(noise.context)  # [n, c], that of the class of each
    of_latent = _normal(network["latent"](jnp.concatenate([vectors, context], axis=1)))
    latent = of_latent.from_noise(noise.latent)
    logits = network["pixels"](jnp.concatenate([latent, context], axis=1))
    errors = optax.losses.sigmoid_binary_cross_entropy(logits, images.reshape(len(images), -1)).sum(1)
    of_example = errors + of_latent.kl_divergence(_normal(network["prior"](context)))
    of_class = posterior.kl_divergence(Gaussian(*jnp.zeros((2, *noise.context.shape))))
    # Examples without a label are members of no class, and do not count.
    return (members.sum(1) @ of_example + of_class.sum()) / members.sum()


def contexts(network: Networks, vectors: Array, members: Array) -> Gaussian:
    """q(c | D) for m sets of the features [n, f], whose members [m, n] are 1; both leaves [m, c]."""
    each = jax.nn.relu(network["statistic"](vectors))
    return _normal(network["context"](members @ each / jnp.maximum(members.sum(1, keepdims=True), 1)))


def _normal(outputs: Array) -> Gaussian:
    """The distribution that the outputs [n, 2 d] of a network stand for, both leaves [n, d]."""
    return Gaussian(*jnp.split(outputs, 2, axis=-1))


def _applied(models: Mapping[str, Model], params: PyTree) -> Networks:
    return {name: partial(model.apply, params[name]) for name, model in models.items()}
