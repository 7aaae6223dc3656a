"""What methods have in common that compare examples by their features."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from mamljax.checks import check_metric_fns, check_task, returning_scalar
from mamljax.types import LossFn, Metrics, Model, PyTree, State, Task

Compare = Callable[[PyTree, Task], Array]  # (params, task) -> logits [n, N] of the query set


def features_of(features: Model, params: PyTree, task: Task) -> tuple[Array, Array]:
    """The features of the support set [N * K, d] and of the query set [n, d], which the network sees together."""
    vectors = features.apply(params, jnp.concatenate([task.support.x, task.query.x]))
    return vectors[: len(task.support.x)], vectors[len(task.support.x) :]


def prototypes(features: Array, labels: Array, ways: int) -> tuple[Array, Array]:
    """The mean of the features [n, d] of each class, [N, d], zero without examples; and which classes have any, [N]."""
    members = jax.nn.one_hot(labels, ways, axis=0)  # [N, n]
    counts = members.sum(1)
    # Divided by 1 where a class has no examples, as NaN would get into the gradient of all classes.
    return members @ features / jnp.maximum(counts, 1)[:, None], counts > 0


def cosine_similarity(a: Array, b: Array) -> Array:
    """The cosine of the angles between vectors [n, d] and [m, d]: [n, m]."""
    return unit(a) @ unit(b).T


def unit(vectors: Array) -> Array:
    """Vectors [..., d] scaled to length 1; zero stays zero."""
    # The small number is within the root, whose derivative is infinite at zero.
    return vectors / jnp.sqrt((vectors**2).sum(-1, keepdims=True) + 1e-12)


def largest_of_class(similarity: Array, labels: Array, ways: int) -> Array:
    """The largest of the similarities [n, m] with the examples of each class: [n, N], for their labels [m]."""
    of_class = labels[None] == jnp.arange(ways)[:, None]
    return jnp.where(of_class[None], similarity[:, None], -jnp.inf).max(-1)


def evaluation(compare: Compare, loss_fn: LossFn, metric_fns: Mapping[str, LossFn]) -> Callable:
    """The `evaluate` of a meta-learner that compares: the loss and the metrics on the query set, each [1]."""
    check_metric_fns(metric_fns)

    def evaluate(key: Array, state: State, task: Task) -> Metrics:
        check_task(task)
        logits = compare(state.params, task)
        named = {"loss": loss_fn, **metric_fns}
        return {name: returning_scalar(fn, name)(logits, task.query.y)[None] for name, fn in named.items()}

    return evaluate
