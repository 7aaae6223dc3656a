"""The outer loop: turn a loss of meta-parameters on one task into a meta-learner."""

from collections.abc import Callable

import jax
import optax
from jax import Array

from mamljax.types import MetaLearner, Metrics, PyTree, State


def meta_learner(
    init_params: Callable[[Array], PyTree],
    task_loss: Callable[[PyTree, PyTree], Array],
    evaluate: Callable[[Array, State, PyTree], Metrics],
    *,
    tx: optax.GradientTransformation,
    gather: Callable[[Array, PyTree, PyTree], PyTree] = lambda key, params, task: task,
) -> MetaLearner:
    r"""Assemble a meta-learner that descends the mean loss over a batch of tasks.

    $\theta \leftarrow \theta + \mathrm{tx}(\nabla_\theta \frac1B \sum_{i=1}^B L_i(\theta))$: line 10 of algorithm 1 in
    Finn et al. 2017, with the mean over tasks in place of the sum, as in the authors' code.

    Args:
        init_params: key -> meta-parameters.
        task_loss: (params, data of one task) -> scalar; what is differentiated.
        evaluate: (key, state, task) -> metrics, each [S + 1] over adaptation steps.
        tx: the outer optimiser. It may also take Optax's extra arguments `value`, `grad` and `value_fn` (the mean loss
            on the same data), as line searches do.
        gather: (key, params, task) -> data of one task; draws what the loss needs, such as trajectories, and is not
            differentiated. By default the data is the task.

    Returns:
        A meta-learner whose metrics are `loss` (mean over tasks, before the update) and `grad_norm` (of the meta-gradient).
    """
    tx = optax.with_extra_args_support(tx)

    def init(key: Array) -> State:
        params = init_params(key)
        return State(params, tx.init(params))

    def update(key: Array, state: State, tasks: PyTree) -> tuple[State, Metrics]:
        keys = jax.random.split(key, len(jax.tree.leaves(tasks)[0]))
        data = jax.vmap(gather, in_axes=(0, None, 0))(keys, state.params, tasks)

        def meta_loss(params: PyTree) -> Array:
            return jax.vmap(task_loss, in_axes=(None, 0))(params, data).mean()

        loss, grads = jax.value_and_grad(meta_loss)(state.params)
        updates, opt = tx.update(grads, state.opt, state.params, value=loss, grad=grads, value_fn=meta_loss)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return state._replace(params=optax.apply_updates(state.params, updates), opt=opt), metrics

    return MetaLearner(init, update, evaluate)
