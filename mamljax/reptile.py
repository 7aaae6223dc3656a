"""Reptile (Nichol, Achiam, Schulman 2018, arXiv 1803.02999): follow the networks that tasks are trained to."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from mamljax.checks import check_count, check_metric_fns, check_task
from mamljax.inner import adapt
from mamljax.maml import learning_curve
from mamljax.outer import meta_learner
from mamljax.rules import Rule, RuleLearningModel, rule_for
from mamljax.types import Examples, LossFn, MetaLearner, Metrics, Model, PyTree, State, Task


def reptile(
    model: Model,
    loss_fn: LossFn,
    *,
    rule: Rule,
    inner_steps: int,
    batch_size: int,
    eval_steps: int,
    tx: optax.GradientTransformation,
    metric_fns: Mapping[str, LossFn] = {},
    chunk_size: int | None = None,
) -> MetaLearner:
    r"""Learn an initialisation that lies near the networks that a few steps on each task lead to.

    $\theta \leftarrow \theta + \epsilon \frac1B \sum_{i=1}^B (\theta_i' - \theta)$, where $\theta_i'$ comes from $\theta$ by
    `inner_steps` steps of `rule`: with `tx=optax.sgd(epsilon)`, gradient descent on $\frac12 \|\theta - \theta_i'\|^2$ with
    $\theta_i'$ as a constant. It is of first order. Each step is on the next few of the task's examples, those of both sets in
    an order that mixes them and is always the same, and after the last it begins with the first again.

    Args:
        model: the network.
        loss_fn: (outputs, targets) -> scalar, the mean over examples.
        rule: the inner step size, or any Optax transformation; Adam without momentum in the paper.
        inner_steps: steps on a task in training, at least 2: a single one would be training on all tasks at once.
        batch_size: examples of a step, at most those of the task.
        eval_steps: steps of `rule` in evaluation, each on the whole support set.
        tx: the outer optimiser.
        metric_fns: further (outputs, targets) -> scalar to report in evaluation, by name.
        chunk_size: tasks adapted to at a time; see `outer.meta_learner`.

    Returns:
        A meta-learner of `Task(support, query)`. Its training `loss` is the mean of $\frac12 \|\theta - \theta_i'\|^2$;
        `evaluate` returns the `loss` and the metrics on the query set, each [eval_steps + 1].

    Raises:
        ValueError: a count that is too low, a step size that is not positive and finite, a model that learns its rule; at the
            first update, a malformed task, or one of fewer examples than `batch_size`.
    """
    check_count("inner_steps", inner_steps, "With a single one it would be pretrain().", minimum=2)
    check_count("batch_size", batch_size)
    check_count("eval_steps", eval_steps)
    check_metric_fns(metric_fns)
    if isinstance(model, RuleLearningModel):
        raise ValueError(
            "reptile goes through no step, and so learns nothing of a rule. Pass the network itself and a fixed rule."
        )
    rule = rule_for(model, rule, differentiable=False)

    def half_squared_distance(params: PyTree, task: Task) -> Array:
        check_task(task)
        pooled = jax.tree.map(lambda *parts: jnp.concatenate(parts), task.support, task.query)
        count = len(jax.tree.leaves(pooled)[0])
        if batch_size > count:
            raise ValueError(f"batch_size must be at most the {count} examples of a task, got {batch_size}.")
        mixed = np.random.default_rng(0).permutation(count)  # images of an episode come class by class
        in_turn = mixed[np.arange(inner_steps * batch_size) % len(mixed)].reshape(inner_steps, batch_size)

        def loss(params: PyTree, batch: Examples) -> Array:
            return loss_fn(model.apply(params, batch.x), batch.y)

        batches = jax.tree.map(lambda leaf: leaf[in_turn], pooled)
        adapted, _ = adapt(loss, params, batches, rule, differentiation="first_order", unroll_first=chunk_size != 1)
        return optax.tree.norm(optax.tree.sub(params, lax.stop_gradient(adapted)), squared=True) / 2

    def evaluate(key: Array, state: State, task: Task) -> Metrics:
        return learning_curve(model, loss_fn, state.params, task, rule, eval_steps, metric_fns=metric_fns)

    return meta_learner(model.init, half_squared_distance, evaluate, tx=tx, chunk_size=chunk_size)
