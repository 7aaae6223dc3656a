"""Implicit MAML (Rajeswaran, Finn, Kakade, Levine 2019, arXiv 1909.04630): meta-gradients that need no path to go back on."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.core import Tracer
from jax.scipy.sparse.linalg import cg

from mamljax.checks import check_count, check_metric_fns, check_positive, check_task
from mamljax.maml import fine_tune, learning_curve
from mamljax.outer import meta_learner
from mamljax.rules import PROBED_STEPS, Rule, RuleLearningModel, rule_for
from mamljax.types import Examples, LossFn, MetaLearner, Metrics, Model, PyTree, State, Task


def imaml(
    model: Model,
    loss_fn: LossFn,
    *,
    rule: Rule,
    inner_steps: int,
    strength: float,
    cg_steps: int,
    damping: float = 0.0,
    eval_steps: int,
    tx: optax.GradientTransformation,
    metric_fns: Mapping[str, LossFn] = {},
    chunk_size: int | None = None,
) -> MetaLearner:
    r"""Learn an initialisation near which every task has good parameters.

    The meta-loss of task $i$ is $L_i^{query}(\phi_i)$ with the minimum $\phi_i = \arg\min_\phi L_i^{support}(\phi) +
    \frac\lambda2 \|\phi - \theta\|^2$, to which `inner_steps` steps of `rule` lead. The meta-gradient is that of a minimum,
    $(I + \frac1\lambda \nabla^2 L_i^{support}(\phi_i))^{-1} \nabla L_i^{query}(\phi_i)$, by `cg_steps` iterations of conjugate
    gradient. So neither its time nor its memory depends on the number of steps, or on the rule; and it is only as exact as
    $\phi_i$ is a minimum.

    Args:
        model: the network; all of its parameters are adapted.
        loss_fn: (outputs, targets) -> scalar, the mean over examples.
        rule: the inner step size, or any Optax transformation that leads to a minimum; it need not be differentiable. A step
            size above 2 / `strength` leads to none, nor does one that is too large for the loss, which may grow steeper in
            training: through the steps of `maml` it would learn not to.
        inner_steps: adaptation steps in training; 16 for 5-way Omniglot in the paper, 25 for 20-way.
        strength: lambda, which holds the parameters near those that the task began with; 2 for Omniglot in the paper.
        cg_steps: iterations of conjugate gradient; 5 in the paper.
        damping: added to lambda in the system that is solved, for networks whose loss curves down more strongly than lambda
            curves up, so that there is no minimum; ReLU networks need it. 22 in the authors' code (see below).
        eval_steps: adaptation steps in evaluation, held in the same way.
        tx: the outer optimiser; Adam in the paper.
        metric_fns: further (outputs, targets) -> scalar to report in evaluation, by name.
        chunk_size: tasks differentiated at a time; see `outer.meta_learner`.

    Returns:
        A meta-learner of `Task(support, query)`; `evaluate` returns `loss` and metrics of the query set, [eval_steps + 1].

    Raises:
        ValueError: a count below 1, a strength or a step size that is not positive and finite, a negative damping, a model that
            learns its rule, a rule that leaves some parameters as they are; at the first update, a malformed task.

    Differs from the authors' code, which takes all steps without the penalty, and then one step down the penalty alone, and
    none in evaluation. It adds 10 to lambda and 1 to the identity, which for lambda 2 is a damping of 22, and halves the
    meta-gradient.
    """
    check_count("inner_steps", inner_steps, "For no adaptation use pretrain().")
    check_count("cg_steps", cg_steps, "Without any it is maml() in first order.")
    check_count("eval_steps", eval_steps)
    check_positive("strength", strength)
    check_positive("damping", damping, or_zero=True)
    check_metric_fns(metric_fns)
    if isinstance(model, RuleLearningModel):
        raise ValueError(
            "imaml goes through no step, and so learns nothing of a rule. Pass the network itself and a fixed rule."
        )
    rule = rule_for(model, rule, differentiable=False)
    _check_adapts_all(rule, jax.eval_shape(model.init, jax.random.key(0)))
    held = optax.chain(held_near_start(strength), rule)

    def task_loss(params: PyTree, task: Task) -> Array:
        check_task(task)

        def loss_on(examples: Examples, params: PyTree) -> Array:
            return loss_fn(model.apply(params, examples.x), examples.y)

        # Nothing from here to the last line depends on `params`: the meta-gradient is put in there as a whole.
        start = lax.stop_gradient(params)
        adapted, _ = fine_tune(model, loss_fn, start, task.support, held, inner_steps, unroll_first=chunk_size != 1)
        loss, slope = jax.value_and_grad(partial(loss_on, task.query))(adapted)
        # Linearised once, for all the products that conjugate gradient asks for.
        hessian = jax.linearize(jax.grad(partial(loss_on, task.support)), adapted)[1]

        def damped(v: PyTree) -> PyTree:
            return optax.tree.add_scale(v, 1 / (strength + damping), hessian(v))

        # Without a tolerance, so that all tasks take the same number of iterations.
        meta_gradient, _ = cg(damped, slope, tol=0.0, maxiter=cg_steps)
        meta_gradient = optax.tree.add_scale(meta_gradient, 0.0, slope)  # cg makes zero of a slope that is not finite
        # The last term is zero, but for its derivative.
        return loss + optax.tree.vdot(lax.stop_gradient(meta_gradient), optax.tree.sub(params, start))

    def evaluate(key: Array, state: State, task: Task) -> Metrics:
        return learning_curve(model, loss_fn, state.params, task, held, eval_steps, metric_fns=metric_fns)

    return meta_learner(model.init, task_loss, evaluate, tx=tx, chunk_size=chunk_size)


def _check_adapts_all(rule: optax.GradientTransformation, params: PyTree) -> None:
    """Raise `ValueError` if the rule leaves some parameters as they are: in these there is no minimum to differentiate."""
    # No two slopes of an array are alike, so that a rule which takes away their mean leaves something of them.
    slopes = jax.tree.map(lambda leaf: jnp.arange(1, leaf.size + 1, dtype=leaf.dtype).reshape(leaf.shape), params)

    def step(opt: PyTree, _: None) -> tuple[PyTree, PyTree]:
        changes, opt = rule.update(slopes, opt, slopes)
        return opt, jax.tree.map(jnp.any, changes)

    _, moves = lax.scan(step, rule.init(slopes), length=PROBED_STEPS)  # the first may do nothing, to warm up
    if not all(isinstance(leaf, Tracer) or leaf.any() for leaf in jax.tree.leaves(moves)):
        raise ValueError("imaml adapts all parameters, and the rule leaves some as they are. Pass one for all, or use maml().")


def held_near_start(strength: float) -> optax.GradientTransformation:
    r"""Add to gradients that of $\frac\lambda2 \|\phi - \theta\|^2$, with the parameters $\theta$ that adaptation began with.

    >>> rule = optax.chain(held_near_start(0.5), optax.sgd(0.1))
    >>> float(rule.update(0.0, rule.init(1.0), 3.0)[0])
    -0.1
    """

    def update(gradient: PyTree, start: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        return jax.tree.map(lambda slope, leaf, first: slope + strength * (leaf - first), gradient, params, start), start

    return optax.GradientTransformation(lambda params: params, update)
