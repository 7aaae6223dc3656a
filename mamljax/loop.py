"""Many meta-updates in one compiled call, with the tasks that each of them draws."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from mamljax.checks import warn_of_constant_tasks
from mamljax.devices import BY_TASK, EVERYWHERE, divide, host, place
from mamljax.types import MetaLearner, Metrics, PyTree, SampleFn, State

LOGGED = ("update", "seconds", "validation_error")  # what a line of the log has beside the metrics
INIT = 2**32 - 1  # what is folded into the key of the first state: a number that no meta-update has
DRAWN_AHEAD = 2**18  # bytes of tasks at most; larger ones are drawn for one meta-update at a time


def meta_updates(learner: MetaLearner, num_tasks: int, length: int, *, sampler_spec: PartitionSpec = EVERYWHERE) -> Callable:
    """Build a loop of meta-updates: (state, key, start, stop, sample) -> (state, metrics [length]), to be compiled.

    It runs updates `start` to `stop`, at most `length` of them; as both are arguments, one compilation serves every call.
    `sample` must be a pytree, a `jax.tree_util.Partial`; `sampler_spec` says how its arrays lie on several devices. Small tasks
    are drawn for several updates at once, as a separate call for a few numbers costs more than the numbers.
    """

    update_state = jax.jit(learner.update)  # traced once, though the shapes of its results are asked for before it is called

    def draw(sample: SampleFn, keys: Array) -> PyTree:
        return jax.vmap(jax.vmap(sample))(keys)

    def run(state: State, key: Array, start: Array, stop: Array, sample: SampleFn) -> tuple[State, Metrics]:
        task_shapes = jax.eval_shape(jax.vmap(sample), jax.random.split(key, num_tasks))
        if not jax.tree.leaves(task_shapes):
            raise ValueError(
                "a task must have an array, as Task(support, query) has; the sampler returned a pytree without any."
            )
        warn_of_constant_tasks(sample, key)
        ahead = _num_drawn_ahead(task_shapes, length)
        log = _empty_log(jax.eval_shape(update_state, key, state, task_shapes)[1], length)

        def block(number: Array, carry: tuple) -> tuple:
            """Run the updates of block `number` that lie in this call."""
            # Blocks begin at multiples of `ahead`: tasks of updates before `start` or from `stop` on are drawn and not used.
            first = number * ahead
            task_keys, update_keys = jax.vmap(lambda t: _keys_of_update(key, t, num_tasks))(first + jnp.arange(ahead))
            # Tasks first, as that is the axis which devices divide.
            tasks = divide(draw, sample, task_keys.swapaxes(0, 1), common_spec=sampler_spec)  # [num_tasks, ahead, ...]

            def update(t: Array, carry: tuple) -> tuple:
                state, log = carry
                its_tasks = jax.tree.map(lambda leaf: leaf[:, t - first], tasks)
                state, metrics = update_state(update_keys[t - first], state, its_tasks)
                return state, jax.tree.map(lambda values, value: values.at[t - start].set(value), log, metrics)

            return lax.fori_loop(jnp.maximum(start, first), jnp.minimum(stop, first + ahead), update, carry)

        # All blocks that have updates in this call; the first and the last may reach beyond it.
        return lax.fori_loop(start // ahead, -(-stop // ahead), block, (state, log))

    return run


def _num_drawn_ahead(tasks: PyTree, length: int) -> int:
    """For how many meta-updates at once tasks like these are drawn, `length` at most."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tasks))
    return min(length, max(1, DRAWN_AHEAD // max(1, size)))


def _empty_log(shapes: Metrics, length: int) -> Metrics:
    """Room for the metrics of `length` updates."""
    for name, value in shapes.items():
        if value.shape != ():
            raise ValueError(f"the metrics of an update must be scalars, got {name} of shape {value.shape}. Take its mean.")
        if name in LOGGED:
            raise ValueError(f"the log has {', '.join(LOGGED)} already, got a metric called {name!r}. Choose another name.")
    return {name: jnp.zeros(length, value.dtype) for name, value in shapes.items()}


def _keys_of_update(key: Array, t: Array, num_tasks: int) -> tuple[Array, Array]:
    """The keys of meta-update t: of its tasks [num_tasks], and of the update itself."""
    # Of t alone, so that it makes no difference where compiled calls and blocks begin.
    sample_key, update_key = jax.random.split(jax.random.fold_in(key, t))
    return jax.random.split(sample_key, num_tasks), update_key


def sampler_by_update(
    sample: SampleFn | None, key: Array, num_tasks: int, length: int, mesh: Mesh | None
) -> tuple[Callable[[int, int], SampleFn], PartitionSpec]:
    """Build the function (start, stop) -> sampler, on its devices, that serves these meta-updates, `length` at most.

    A sampler may have a method `prepare`, from keys [n] to a sampler for these alone, whose arrays have that leading axis.

    Returns it and how the sampler's arrays lie on several devices: where tasks are prepared, each has those of its own.
    """
    prepare = getattr(sample, "prepare", None)
    if prepare is None:
        always = place(sample, mesh)
        return lambda start, stop: always, EVERYWHERE
    devices = np.array(jax.local_devices()[:1]) if mesh is None else mesh.devices
    # A host prepares the tasks of its own devices alone.
    mine = np.flatnonzero([device.process_index == jax.process_index() for device in devices])

    @jax.jit
    def task_keys(start: Array) -> Array:
        of_update = jax.vmap(lambda key, t: _keys_of_update(key, t, num_tasks)[0], in_axes=(None, 0))
        # [seeds, length, num_tasks]; a key alone is one seed.
        keys = jax.vmap(of_update, in_axes=(0, None))(key.reshape(-1), start + jnp.arange(length))
        # Devices first, as the sampler's arrays are divided by their leading axis: each then finds the keys of its own tasks.
        by_device = jnp.moveaxis(keys.reshape(-1, length, len(devices), num_tasks // len(devices)), 2, 0)
        return by_device[mine]

    def sampler_from(start: int, stop: int) -> SampleFn:
        with jax.default_device(host()):  # an accelerator would take this in its turn, after the meta-updates that it is at
            keys = task_keys(start)
            wanted = np.broadcast_to(np.arange(length)[:, None] < stop - start, keys.shape).reshape(-1)
            prepared = prepare(keys.reshape(-1)[np.flatnonzero(wanted)])
            if not wanted.all():  # as long as always, or the program would have to be compiled anew: rows of others, not used
                rows = np.maximum(np.cumsum(wanted) - 1, 0)
                prepared = jax.tree.map(lambda leaf: leaf[rows], prepared)
        return place(prepared, mesh, BY_TASK)

    return sampler_from, BY_TASK


def vmap_over_seeds(shape: tuple[int, ...], fn: Callable, in_axes: int | tuple = 0) -> Callable:
    """Map `fn` over a seed axis, if there is one. A lone seed runs without: a batch axis of one costs a fifth of the speed."""
    if shape == ():
        return fn
    if shape != (1,):
        return jax.vmap(fn, in_axes)

    def alone(*args: PyTree) -> PyTree:
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        args = [arg if axis is None else jax.tree.map(lambda leaf: leaf[0], arg) for arg, axis in zip(args, axes, strict=True)]
        return jax.tree.map(lambda leaf: leaf[None], fn(*args))

    return alone
