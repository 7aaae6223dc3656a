"""The multi-task baselines of the paper's table 2: the mean of networks that were each trained on a task of its own."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import optax
from jax import Array, lax

from mamljax.checks import check_count, check_metric_fns, check_task
from mamljax.inner import adapt
from mamljax.maml import learning_curve
from mamljax.outer import meta_learner
from mamljax.rules import Rule, rule_for
from mamljax.types import LossFn, MetaLearner, Metrics, Model, PyTree, State, Task

Penalty = Callable[[PyTree, PyTree], Array]  # (params, mean of the params of earlier tasks) -> scalar


def no_penalty(params: PyTree, mean: PyTree) -> Array:
    """Leave every network to its own task."""
    return jnp.zeros(())


def squared_norm(params: PyTree, mean: PyTree) -> Array:
    """Keep the parameters small."""
    return optax.tree.norm(params, squared=True)


def squared_distance(params: PyTree, mean: PyTree) -> Array:
    """Keep the parameters near the mean."""
    return optax.tree.norm(optax.tree.sub(params, mean), squared=True)


def multi_task(
    model: Model,
    loss_fn: LossFn,
    *,
    task_tx: optax.GradientTransformation,
    task_steps: int,
    rule: Rule,
    eval_steps: int,
    penalty: Penalty = no_penalty,
    metric_fns: Mapping[str, LossFn] = {},
    chunk_size: int | None = None,
) -> MetaLearner:
    r"""Train a network on each task, take the mean of their parameters, and fine-tune that in evaluation.

    $\phi_i$ minimises $L_i(\phi_i) + \mathrm{penalty}(\phi_i, \theta)$ over all examples of task $i$, by `task_steps` steps of
    `task_tx` from first weights that all tasks share. Meta-update $t$ makes $\theta$ the mean over its tasks and those of all
    before: it is gradient descent on $\frac12 \|\theta - \phi_i\|^2$ with step size $1 / t$.

    Args:
        model: the network.
        loss_fn: (outputs, targets) -> scalar, the mean over examples.
        task_tx: optimiser of the network of a task.
        task_steps: its steps, each on all examples of the task.
        rule: step size or Optax transformation of the fine-tuning.
        eval_steps: steps of fine-tuning in evaluation.
        penalty: what is added to the loss of a task's network.
        metric_fns: further (outputs, targets) -> scalar to report in evaluation, by name.
        chunk_size: tasks trained at a time; see `outer.meta_learner`.

    Returns:
        A meta-learner of `Task(support, query)`, which learns from both sets. Its params are a dict of the "first" weights and
        the "mean". Its training `loss` is the mean of $\frac12 \|\theta - \phi_i\|^2$; `evaluate` returns the `loss` and the
        metrics on the query set, each [eval_steps + 1].

    Raises:
        ValueError: a count below 1, a step size that is not positive and finite; at the first update, a malformed task.
    """
    check_count("task_steps", task_steps)
    check_count("eval_steps", eval_steps)
    check_metric_fns(metric_fns)
    rule = rule_for(model, rule, differentiable=False)

    def trained(first: PyTree, mean: PyTree, task: Task) -> PyTree:
        x, y = (jnp.concatenate(parts) for parts in zip(*task, strict=True))

        def loss(params: PyTree, step: Array) -> Array:
            return loss_fn(model.apply(params, x), y) + penalty(params, mean)

        return adapt(loss, first, jnp.arange(task_steps), task_tx, differentiation="first_order")[0]

    def init(key: Array) -> PyTree:
        first = model.init(key)
        return {"first": first, "mean": first}

    def half_squared_distance(params: PyTree, task: Task) -> Array:
        check_task(task)
        # The first weights have no gradient, and so stay as they are.
        first, mean = lax.stop_gradient((params["first"], params["mean"]))
        return squared_distance(params["mean"], trained(first, mean, task)) / 2

    def evaluate(key: Array, state: State, task: Task) -> Metrics:
        return learning_curve(model, loss_fn, state.params["mean"], task, rule, eval_steps, metric_fns=metric_fns)

    tx = optax.sgd(lambda count: 1 / (count + 1))  # by which descent is the running mean
    return meta_learner(init, half_squared_distance, evaluate, tx=tx, chunk_size=chunk_size)
