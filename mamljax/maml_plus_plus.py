"""MAML++ (Antoniou, Edwards, Storkey 2019, arXiv 1810.09502): MAML whose meta-loss at first counts every step."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from mamljax.checks import check_count, check_task
from mamljax.inner import Differentiation
from mamljax.maml import fine_tune, maml
from mamljax.outer import meta_learner
from mamljax.rules import Rule
from mamljax.types import LossFn, MetaLearner, Metrics, Model, PyTree, State, Task


def maml_plus_plus(
    model: Model,
    loss_fn: LossFn,
    *,
    rule: Rule,
    inner_steps: int,
    multi_step_updates: int,
    eval_steps: int,
    tx: optax.GradientTransformation,
    differentiation: Differentiation = "mixed",
    metric_fns: Mapping[str, LossFn] = {},
    chunk_size: int | None = None,
) -> MetaLearner:
    r"""Learn an initialisation as `maml` does, from the query loss after every step, which makes training steadier.

    The meta-loss of task $i$ in meta-update $t$ is $\sum_{s=1}^S w_s(t) L_i^{query}(\theta_i^{(s)})$ with
    $w_s(t) = (1 - p) / S$ for all steps but the last, which has the rest, and $p = \min(t / T, 1)$: at first all steps count
    alike, from meta-update T on the last alone, as in `maml`, which takes over then.

    The other parts of MAML++ are `rules.learned_by_step`, a schedule for the step size of `tx`, and, where it is to save time,
    `differentiation="first_order"` for the first part of a training.

    Args:
        model: the network.
        loss_fn: (outputs, targets) -> scalar, the mean over examples.
        rule: the inner step size, or any Optax transformation; that of `rules.learned_by_step` in the paper.
        inner_steps: S, adaptation steps in training; 5 in the paper.
        multi_step_updates: T; 5,000 for Omniglot in the authors' settings, 7,500 for miniImageNet. With several seeds in
            one program both losses are computed throughout, as `vmap` takes both branches of a condition.
        eval_steps: adaptation steps in evaluation.
        tx: the outer optimiser; Adam in the paper, its step size falling along a cosine from 1e-3 to 1e-5.
        differentiation: "mixed" or "reverse" (both exact), or "first_order"; see `inner.adapt`.
        metric_fns: further (outputs, targets) -> scalar to report in evaluation, by name.
        chunk_size: tasks differentiated at a time; see `outer.meta_learner`.

    Returns:
        A meta-learner of `Task(support, query)`, whose state has the number of meta-updates done as `extra`; `evaluate` returns
        `loss` and metrics of the query set, [eval_steps + 1].

    Raises:
        ValueError: a count below 1, a step size that is not positive and finite, a rule without finite meta-gradients; at the
            first update, a malformed task.

    Differs from the paper: normalisation uses the statistics of the examples at hand. (The authors' code keeps running averages
    for each step as well, but never uses them.)
    """
    check_count("multi_step_updates", multi_step_updates)
    plain = maml(
        model,
        loss_fn,
        rule=rule,
        inner_steps=inner_steps,
        eval_steps=eval_steps,
        tx=tx,
        differentiation=differentiation,
        metric_fns=metric_fns,
        chunk_size=chunk_size,
    )
    adapt_task = partial(fine_tune, model, loss_fn, differentiation=differentiation, unroll_first=chunk_size != 1)

    def weighted_loss(params: PyTree, task_and_weights: tuple[Task, Array]) -> Array:
        task, weights = task_and_weights
        check_task(task)
        _, path = adapt_task(params, task.support, rule, inner_steps)
        # The path begins with the parameters before any step, which do not count.
        adapted = jax.tree.map(lambda leaf: leaf[1:], path)
        losses = jax.vmap(lambda params: loss_fn(model.apply(params, task.query.x), task.query.y))(adapted)
        return weights.astype(losses.dtype) @ losses

    weighted = meta_learner(model.init, weighted_loss, plain.evaluate, tx=tx, chunk_size=chunk_size)

    def init(key: Array) -> State:
        return plain.init(key)._replace(extra=jnp.int32(0))

    def update_weighted(key: Array, state: State, tasks: Task) -> tuple[State, Metrics]:
        earlier = jnp.full(inner_steps - 1, (1 - state.extra / multi_step_updates) / inner_steps)
        weights = jnp.append(earlier, 1 - earlier.sum())
        # A copy for each task, as `meta_learner` maps over the tasks all that it is given.
        weights_by_task = jnp.broadcast_to(weights, (len(jax.tree.leaves(tasks)[0]), inner_steps))
        return weighted.update(key, state, (tasks, weights_by_task))

    def update(key: Array, state: State, tasks: Task) -> tuple[State, Metrics]:
        under_way = state.extra < multi_step_updates
        state, metrics = lax.cond(under_way, update_weighted, plain.update, key, state, tasks)
        return state._replace(extra=state.extra + 1), metrics

    return MetaLearner(init, update, plain.evaluate)
