"""Metric learning: features in which examples of one class lie near each other, compared instead of adapted.

Matching and siamese networks are in the paper's table 1, prototypical ones came after it. The support and the query set go
through the network together, so that one that normalises by the examples at hand sees both alike.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mamljax.checks import check_count, check_task
from mamljax.comparison import Compare, cosine_similarity, evaluation, features_of, largest_of_class, prototypes
from mamljax.models import with_linear_head
from mamljax.outer import meta_learner
from mamljax.types import LossFn, MetaLearner, Model, PyTree, Task


def matching(
    features: Model,
    loss_fn: LossFn,
    *,
    ways: int,
    tx: optax.GradientTransformation,
    metric_fns: Mapping[str, LossFn] = {},
    chunk_size: int | None = None,
) -> MetaLearner:
    r"""Matching networks (Vinyals et al. 2016, arXiv 1606.04080), without their context embeddings.

    A query example has the classes of the support set with probability $p(y | x) = \sum_{i: y_i = y} a(x, x_i)$, where the
    attention $a$ is the softmax over the support set of the cosine similarity of features.

    Args:
        features: [n, ...] -> [n, d].
        loss_fn: (logits, labels) -> scalar, the mean over examples.
        ways: N, classes of a task, at least 2; labels are 0..N-1.
        tx: the outer optimiser.
        metric_fns: further (logits, labels) -> scalar to report in evaluation, by name.
        chunk_size: tasks differentiated at a time; see `outer.meta_learner`.

    Returns:
        A meta-learner of `Task(support, query)` whose `evaluate` returns the `loss` and the metrics on the query set, each [1].

    Raises:
        ValueError: `ways` below 2; at the first update, a malformed task.
    """
    check_count("ways", ways, minimum=2)

    def compare(params: PyTree, task: Task) -> Array:
        support, query = features_of(features, params, task)
        similarity = cosine_similarity(query, support)
        members = jax.nn.one_hot(task.support.y, ways)
        present = members.any(0)
        probabilities = jax.nn.softmax(similarity) @ members
        # The inner `where` keeps log(0) out of the gradient, in which 0 times infinity would be NaN.
        return jnp.where(present, jnp.log(jnp.where(present, probabilities, 1)), -jnp.inf)

    return _learner(features.init, compare, loss_fn, tx, metric_fns, chunk_size)


def prototypical(
    features: Model,
    loss_fn: LossFn,
    *,
    ways: int,
    tx: optax.GradientTransformation,
    metric_fns: Mapping[str, LossFn] = {},
    chunk_size: int | None = None,
) -> MetaLearner:
    r"""Prototypical networks (Snell et al. 2017, arXiv 1703.05175, algorithm 1).

    The logit of a class is $-\|f(x) - c\|^2$, with $c$ the mean of the features of its support examples. Arguments, errors and
    what is returned are those of `matching`.
    """
    check_count("ways", ways, minimum=2)

    def compare(params: PyTree, task: Task) -> Array:
        support, query = features_of(features, params, task)
        means, present = prototypes(support, task.support.y, ways)
        return jnp.where(present, -((query[:, None] - means[None]) ** 2).sum(-1), -jnp.inf)

    return _learner(features.init, compare, loss_fn, tx, metric_fns, chunk_size)


def siamese(
    features: Model,
    x: Array,
    loss_fn: LossFn,
    *,
    ways: int,
    tx: optax.GradientTransformation,
    metric_fns: Mapping[str, LossFn] = {},
    chunk_size: int | None = None,
) -> MetaLearner:
    r"""Siamese networks (Koch et al. 2015, section 3.1): are two examples of one class?

    The logit of that is $\sum_j \alpha_j |f_j(x) - f_j(x')| + \beta$, with learned $\alpha$ and $\beta$. It learns from all
    pairs of a query and a support example, by the binary cross-entropy in which pairs of one class and of two count half each.
    In evaluation, the logit of a class is the largest with one of its support examples. Arguments, errors and what is returned
    are those of `matching`.

    Args:
        x: [n, ...] an example input, for its shape and dtype only.
    """
    check_count("ways", ways, minimum=2)
    model = with_linear_head(features, x, 1)

    def pairs(params: PyTree, task: Task) -> Array:
        """The logits of all pairs, [n, N * K]."""
        support, query = features_of(features, params["features"], task)
        head = params["head"]
        return jnp.abs(query[:, None] - support[None]) @ head["kernel"][:, 0] + head["bias"][0, 0]

    def task_loss(params: PyTree, task: Task) -> Array:
        check_task(task)
        alike = task.query.y[:, None] == task.support.y[None]
        counted = task.query.y[:, None] >= 0
        losses = optax.losses.sigmoid_binary_cross_entropy(pairs(params, task), alike)

        def mean_of(chosen: Array) -> Array:  # not `mean`, which is NaN where a task has no such pair
            return losses.sum(where=chosen) / jnp.maximum(chosen.sum(), 1)

        return (mean_of(counted & alike) + mean_of(counted & ~alike)) / 2

    def compare(params: PyTree, task: Task) -> Array:
        return largest_of_class(pairs(params, task), task.support.y, ways)

    return _learner(model.init, compare, loss_fn, tx, metric_fns, chunk_size, task_loss)


def _learner(
    init: Callable[[Array], PyTree],
    compare: Compare,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    metric_fns: Mapping[str, LossFn],
    chunk_size: int | None,
    task_loss: Callable[[PyTree, Task], Array] | None = None,
) -> MetaLearner:
    """A meta-learner that descends `task_loss`, by default the loss of the comparison."""

    def query_loss(params: PyTree, task: Task) -> Array:
        check_task(task)
        return loss_fn(compare(params, task), task.query.y)

    evaluate = evaluation(compare, loss_fn, metric_fns)
    return meta_learner(init, task_loss or query_loss, evaluate, tx=tx, chunk_size=chunk_size)
