"""The outer loop: turn a loss of meta-parameters on one task into a meta-learner."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from mamljax.checks import check_count, check_optimiser, check_params, returning_scalar
from mamljax.devices import mean_over_devices
from mamljax.types import MetaLearner, Metrics, PyTree, State


def meta_learner(
    init_params: Callable[[Array], PyTree],
    task_loss: Callable[[PyTree, PyTree], Array],
    evaluate: Callable[[Array, State, PyTree], Metrics],
    *,
    tx: optax.GradientTransformation,
    gather: Callable[[Array, PyTree, PyTree], PyTree] = lambda key, params, task: task,
    chunk_size: int | None = None,
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
        gather: (key, params, task) -> data of one task, for a loss that needs random numbers, such as the order of a sequence,
            noise or trajectories; it is not differentiated. By default the data is the task.
        chunk_size: tasks that a device differentiates at a time; by default all of them. Fewer take less memory, and on a CPU
            less time when the activations of all tasks exceed the cache. The result is the same. What its share of B leaves
            over is one smaller chunk, which takes as long to compile again.

    Returns:
        A meta-learner whose metrics are `loss` (mean over tasks, before the update) and `grad_norm` (of the meta-gradient).

    Raises:
        ValueError: a `chunk_size` below 1, a `tx` that is no optimiser; at the start, meta-parameters that are not
            floating-point arrays; at the first update, a `task_loss` that is no scalar.
    """
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    check_optimiser(tx)
    tx, task_loss = optax.with_extra_args_support(tx), returning_scalar(task_loss)

    def init(key: Array) -> State:
        params = init_params(key)
        check_params(params)
        return State(params, tx.init(params))

    def update(key: Array, state: State, tasks: PyTree) -> tuple[State, Metrics]:
        keys = jax.random.split(key, len(jax.tree.leaves(tasks)[0]))
        # Gathered once: a line search asks for the loss of other parameters on the very same data.
        data = jax.vmap(gather, in_axes=(0, None, 0))(keys, state.params, tasks)

        def meta_loss(params: PyTree, data: PyTree) -> Array:
            if len(jax.tree.leaves(data)[0]) == 1:  # alone, not as a batch of one, whose products take longer
                return task_loss(params, jax.tree.map(lambda leaf: leaf[0], data))
            return jax.vmap(task_loss, in_axes=(None, 0))(params, data).mean()

        def mean_over_tasks(fn: Callable[[PyTree, PyTree], PyTree], params: PyTree) -> PyTree:
            # `jit` keeps the trace: `_mean_over_chunks` first asks for the shapes of the results, and then calls it.
            return mean_over_devices(partial(_mean_over_chunks, jax.jit(fn), chunk_size), params, data)

        loss, grads = mean_over_tasks(jax.value_and_grad(meta_loss), state.params)
        value_fn = partial(mean_over_tasks, meta_loss)
        updates, opt = tx.update(grads, state.opt, state.params, value=loss, grad=grads, value_fn=value_fn)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return state._replace(params=optax.apply_updates(state.params, updates), opt=opt), metrics

    return MetaLearner(init, update, evaluate)


def _mean_over_chunks(fn: Callable[[PyTree, PyTree], PyTree], chunk_size: int | None, params: PyTree, data: PyTree) -> PyTree:
    """The mean over the leading axis of `data` of what `fn(params, chunk)` gives as the mean over a chunk of it."""
    num_tasks = len(jax.tree.leaves(data)[0])  # of one device
    if chunk_size is None or chunk_size >= num_tasks:
        return fn(params, data)

    def add(total: PyTree, chunk: PyTree) -> tuple[PyTree, None]:
        num_chunks = num_tasks / len(jax.tree.leaves(chunk)[0])  # of this size; a fraction where it does not divide the tasks
        return jax.tree.map(lambda sum_, term: sum_ + term / num_chunks, total, fn(params, chunk)), None

    whole = num_tasks - num_tasks % chunk_size
    chunks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, chunk_size, *leaf.shape[1:]), data)
    shapes = jax.eval_shape(fn, params, jax.tree.map(lambda leaf: leaf[0], chunks))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = lax.scan(add, zeros, chunks)
    return total if whole == num_tasks else add(total, jax.tree.map(lambda leaf: leaf[whole:], data))[0]
