"""Proto-MAML (Triantafillou et al. 2020, Meta-Dataset, arXiv 1903.03096): adaptation that begins with prototypes."""

from collections.abc import Mapping
from functools import partial

import jax.numpy as jnp
import optax
from jax import Array

from mamljax.checks import check_choice, check_count, check_metric_fns, check_task
from mamljax.comparison import prototypes
from mamljax.inner import Differentiation
from mamljax.maml import fine_tune, learning_curve
from mamljax.models import with_linear_head
from mamljax.outer import meta_learner
from mamljax.rules import Rule, rule_for
from mamljax.types import Examples, LossFn, MetaLearner, Metrics, Model, PyTree, State, Task


def proto_maml(
    features: Model,
    x: Array,
    loss_fn: LossFn,
    *,
    ways: int,
    rule: Rule,
    inner_steps: int,
    eval_steps: int,
    tx: optax.GradientTransformation,
    differentiation: Differentiation = "mixed",
    metric_fns: Mapping[str, LossFn] = {},
    chunk_size: int | None = None,
) -> MetaLearner:
    """Learn features from which a few steps go further than the comparison of prototypes, with which they begin.

    A task's network is the features with a linear layer on top, which begins as `with_prototypes` makes it of the support set.
    Then all is adapted as by `maml`. The meta-gradient goes through the steps and through that beginning, so that the
    meta-parameters are those of the features alone. Before the first step it is a prototypical network.

    Args:
        features: [n, ...] -> [n, d].
        x: [n, ...] an example input, for its shape and dtype only.
        loss_fn: (logits, labels) -> scalar, of the inner and the outer loop, the mean over examples.
        ways: N, classes of a task, at least 2; labels are 0..N-1.
        rule: the inner step size, or any Optax transformation of {"features": ..., "head": {"kernel": [d, N], "bias": [1, N]}}.
        inner_steps: S, adaptation steps in training.
        eval_steps: adaptation steps in evaluation.
        tx: the outer optimiser.
        differentiation: "mixed" or "reverse" (both exact), or "first_order", through the beginning alone; see `inner.adapt`.
        metric_fns: further (logits, labels) -> scalar to report in evaluation, by name.
        chunk_size: tasks differentiated at a time; see `outer.meta_learner`.

    Returns:
        A meta-learner of `Task(support, query)`; `evaluate` returns `loss` and metrics of the query set, [eval_steps + 1].

    Raises:
        ValueError: a count out of range, a step size that is not positive and finite, a rule without finite meta-gradients, an
            unknown `differentiation`; at the first update, a malformed task.
    """
    check_count("inner_steps", inner_steps, "For no adaptation use prototypical().")
    check_count("eval_steps", eval_steps)
    check_count("ways", ways, minimum=2)
    check_choice("differentiation", differentiation, Differentiation)
    check_metric_fns(metric_fns)
    network = with_linear_head(features, x, ways)
    rule = rule_for(network, rule, differentiable=differentiation != "first_order")
    adapt_task = partial(fine_tune, network, loss_fn, differentiation=differentiation, unroll_first=chunk_size != 1)

    def task_loss(params: PyTree, task: Task) -> Array:
        check_task(task)
        start = with_prototypes(features, params, task.support, ways)
        adapted, _ = adapt_task(start, task.support, rule, inner_steps)
        return loss_fn(network.apply(adapted, task.query.x), task.query.y)

    def evaluate(key: Array, state: State, task: Task) -> Metrics:
        check_task(task)
        start = with_prototypes(features, state.params, task.support, ways)
        return learning_curve(network, loss_fn, start, task, rule, eval_steps, metric_fns=metric_fns)

    return meta_learner(features.init, task_loss, evaluate, tx=tx, chunk_size=chunk_size)


def with_prototypes(features: Model, params: PyTree, support: Examples, ways: int) -> PyTree:
    r"""Put a linear layer on features that does what a prototypical network does; for `models.with_linear_head(features, ...)`.

    The logit of a class with the prototype $c$, the mean of the features of its support examples, is
    $2 c \cdot f(x) - \|c\|^2$: that is $-\|f(x) - c\|^2$ but for $\|f(x)\|^2$, which all classes share.

    Args:
        features: [n, ...] -> [n, d].
        params: of the features.
        support: labels are 0..N-1; a class without examples gets a logit of minus infinity.
        ways: N.

    Returns:
        {"features": params, "head": {"kernel": [d, N], "bias": [1, N]}}.
    """
    means, present = prototypes(features.apply(params, support.x), support.y, ways)
    bias = jnp.where(present, -(means**2).sum(1), -jnp.inf)
    return {"features": params, "head": {"kernel": 2 * means.T, "bias": bias[None]}}
