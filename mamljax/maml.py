"""Model-agnostic meta-learning (Finn, Abbeel, Levine 2017, arXiv 1703.03400), algorithm 2."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mamljax.checks import check_choice, check_count, check_metric_fns, check_task, returning_scalar
from mamljax.inner import Differentiation, adapt
from mamljax.outer import meta_learner
from mamljax.rules import Rule, rule_for
from mamljax.types import Examples, LossFn, MetaLearner, Metrics, Model, PyTree, State, Task


def maml(
    model: Model,
    loss_fn: LossFn,
    *,
    rule: Rule,
    inner_steps: int,
    eval_steps: int,
    tx: optax.GradientTransformation,
    differentiation: Differentiation = "mixed",
    metric_fns: Mapping[str, LossFn] = {},
    chunk_size: int | None = None,
) -> MetaLearner:
    r"""Learn an initialisation from which a few steps on a task's support set do well on its query set.

    The meta-loss of task $i$ is $L_i^{query}(\theta_i')$, where $\theta_i'$ comes from $\theta$ by `inner_steps` steps of
    $\theta' \leftarrow \theta' - \alpha \nabla L_i^{support}(\theta')$. With `tx=optax.sgd(beta)` a meta-update is
    $\theta \leftarrow \theta - \beta \nabla_\theta \frac1B \sum_{i=1}^B L_i^{query}(\theta_i')$, the gradient taken through
    those steps.

    Args:
        model: the network.
        loss_fn: (outputs, targets) -> scalar, of the inner and the outer loop: the *mean* over examples, so that `rule`
            is the step size on the mean loss.
        rule: the inner step size alpha, or any Optax transformation; `optax.partition` gives each parameter its own.
        inner_steps: S, adaptation steps in training.
        eval_steps: adaptation steps in evaluation.
        tx: the outer optimiser, `optax.adam(1e-3)` in the paper.
        differentiation: "mixed" or "reverse" (both exact), or "first_order" (first-order MAML); see `inner.adapt`.
        metric_fns: further (outputs, targets) -> scalar to report in evaluation, by name.
        chunk_size: tasks differentiated at a time; see `outer.meta_learner`.

    Returns:
        A meta-learner of `Task(support, query)`; `evaluate` returns `loss` and metrics of the query set, [eval_steps + 1].

    Raises:
        ValueError: a count below 1, a step size that is not positive and finite, a rule without finite meta-gradients, an
            unknown `differentiation`; at the first update, a malformed task.

    >>> from mamljax.losses import mse
    >>> from mamljax.models import mlp
    >>> learner = maml(mlp(1, (40, 40), 1), mse, rule=0.01, inner_steps=1, eval_steps=10, tx=optax.adam(1e-3))
    >>> sorted(learner.init(jax.random.key(0)).params)
    ['Dense_0', 'Dense_1', 'Dense_2']
    """
    check_count("inner_steps", inner_steps, "For no adaptation use pretrain().")
    check_count("eval_steps", eval_steps)
    check_choice("differentiation", differentiation, Differentiation)
    check_metric_fns(metric_fns)
    rule = rule_for(model, rule, differentiable=differentiation != "first_order")
    adapt_task = partial(fine_tune, model, loss_fn, differentiation=differentiation, unroll_first=chunk_size != 1)

    def task_loss(params: PyTree, task: Task) -> Array:
        check_task(task)
        adapted, _ = adapt_task(params, task.support, rule, inner_steps)
        return loss_fn(model.apply(adapted, task.query.x), task.query.y)

    def evaluate(key: Array, state: State, task: Task) -> Metrics:
        return learning_curve(model, loss_fn, state.params, task, rule, eval_steps, metric_fns=metric_fns)

    return meta_learner(model.init, task_loss, evaluate, tx=tx, chunk_size=chunk_size)


def fine_tune(
    model: Model,
    loss_fn: LossFn,
    params: PyTree,
    support: Examples,
    rule: Rule,
    num_steps: int,
    *,
    differentiation: Differentiation = "mixed",
    unroll_first: bool = True,
) -> tuple[PyTree, PyTree]:
    """Take `num_steps` steps of `rule`, each on the whole support set; options and result are those of `inner.adapt`."""
    check_count("num_steps", num_steps, minimum=0)

    def support_loss(params: PyTree, step: Array) -> Array:  # the same at each step, whose numbers alone are the data
        return loss_fn(model.apply(params, support.x), support.y)

    return adapt(support_loss, params, jnp.arange(num_steps), rule, differentiation=differentiation, unroll_first=unroll_first)


def learning_curve(
    model: Model,
    loss_fn: LossFn,
    params: PyTree,
    task: Task,
    rule: optax.GradientTransformation,
    num_steps: int,
    *,
    metric_fns: Mapping[str, LossFn] = {},
) -> Metrics:
    """Fine-tune on the support set; the loss and metrics on the query set before and after each step, each [num_steps + 1]."""
    check_task(task)
    # The plain gradient, as nothing is differentiated here.
    _, path = fine_tune(model, loss_fn, params, task.support, rule, num_steps, differentiation="reverse")
    outputs = jax.vmap(model.apply, in_axes=(0, None))(path, task.query.x)
    named = {name: returning_scalar(fn, name) for name, fn in {"loss": loss_fn, **metric_fns}.items()}
    return {name: jax.vmap(fn, in_axes=(0, None))(outputs, task.query.y) for name, fn in named.items()}
