"""One network for all tasks, fine-tuned on each: the "pretrained" and "oracle" baselines of the paper."""

from collections.abc import Mapping

import optax
from jax import Array

from mamljax.checks import check_count, check_metric_fns, check_task
from mamljax.maml import learning_curve
from mamljax.outer import meta_learner
from mamljax.rules import Rule, rule_for
from mamljax.types import LossFn, MetaLearner, Metrics, Model, PyTree, State, Task


def pretrain(
    model: Model,
    loss_fn: LossFn,
    *,
    rule: Rule,
    eval_steps: int,
    tx: optax.GradientTransformation,
    metric_fns: Mapping[str, LossFn] = {},
    chunk_size: int | None = None,
) -> MetaLearner:
    r"""Train one network on the examples of all tasks mixed, and fine-tune it in evaluation.

    The loss of task $i$ is $L_i^{support}(\theta)$, without adaptation. Three baselines are made of it: *pretrained*, as it
    is; *random initialisation*, without a single update; the *oracle*, which is told the task's parameters as part of x
    and has `eval_steps=0`.

    Args:
        model: the network.
        loss_fn: (outputs, targets) -> scalar, the mean over examples.
        rule: step size or Optax transformation of the fine-tuning.
        eval_steps: steps of fine-tuning in evaluation, 0 for none.
        tx: the outer optimiser.
        metric_fns: further (outputs, targets) -> scalar to report in evaluation, by name.
        chunk_size: tasks differentiated at a time; see `outer.meta_learner`.

    Returns:
        A meta-learner over tasks `Task(support, query)`. Training uses the support set alone, as the authors' code does;
        `evaluate` returns the `loss` and the metrics on the query set, each [eval_steps + 1].

    Raises:
        ValueError: a negative count, or a step size that is not positive and finite; at the first update, a malformed task.
    """
    check_count("eval_steps", eval_steps, minimum=0)
    check_metric_fns(metric_fns)
    rule = rule_for(model, rule, differentiable=False)

    def task_loss(params: PyTree, task: Task) -> Array:
        check_task(task)
        return loss_fn(model.apply(params, task.support.x), task.support.y)

    def evaluate(key: Array, state: State, task: Task) -> Metrics:
        return learning_curve(model, loss_fn, state.params, task, rule, eval_steps, metric_fns=metric_fns)

    return meta_learner(model.init, task_loss, evaluate, tx=tx, chunk_size=chunk_size)
