"""The compiled programs of a training. They are kept, so that to train a learner again needs no compiling again."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jax.tree_util import Partial

from mamljax.checks import returning_scalar
from mamljax.closures import as_partial, closed_over_or_carried
from mamljax.devices import on, place
from mamljax.loop import INIT, meta_updates, sampler_by_update, vmap_over_seeds
from mamljax.types import MetaLearner, Metrics, PyTree, SampleFn, State

KEPT = 8  # of each kind
NONE_YET = float(np.finfo(np.float32).max)  # of errors; infinity would end a program under `jax.debug_infs`


class Snapshot(NamedTuple):
    """What a checkpoint holds. Trained from several keys, every leaf has a leading axis [seeds]."""

    state: State
    best: State  # that of the lowest validation error so far
    best_error: Array  # [] float32, NONE_YET before the first validation


def first_snapshot(learner: MetaLearner, key: Array) -> Snapshot:
    """The snapshot before the first meta-update."""
    first = learner.init(jax.random.fold_in(key, INIT))
    state = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), first)  # no weak types: they would retrace
    return Snapshot(state, state, jnp.float32(NONE_YET))


def _validate(snapshot: Snapshot, validate_fn: Callable[[State], Array]) -> tuple[Snapshot, Array]:
    error = jnp.asarray(returning_scalar(validate_fn, "validation error")(snapshot.state), snapshot.best_error.dtype)
    # An error that is NaN is never better; the first one that is finite always is.
    better = error < snapshot.best_error
    best = optax.tree.where(better, snapshot.state, snapshot.best)
    return Snapshot(snapshot.state, best, jnp.where(better, error, snapshot.best_error)), error


def best_state(snapshot: Snapshot) -> State:
    """The best state, or the last one if none was validated, or none with a finite error."""
    validated = snapshot.best_error < NONE_YET  # nor if it is infinite, as it began in earlier versions
    return optax.tree.where(validated, snapshot.best, snapshot.state)


@functools.lru_cache(KEPT)
def start_program(learner: MetaLearner, seeds: tuple[int, ...]) -> Callable[[Array], Snapshot]:
    """Key -> the snapshot before the first meta-update, on one device."""
    return jax.jit(vmap_over_seeds(seeds, functools.partial(first_snapshot, learner)))


def updates_and_sampler(
    learner: MetaLearner, sample: SampleFn, key: Array, num_tasks: int, length: int, mesh: Mesh | None
) -> tuple[Callable, Callable[[int, int], SampleFn | None]]:
    """The program of `length` meta-updates at most, and the function (start, stop) -> the sampler that it takes for these."""
    # A sampler that prepares tasks does so outside of the program, which gets the tasks as arguments.
    closed_over, carried = (None, sample) if hasattr(sample, "prepare") else closed_over_or_carried(sample)
    sampler_from, sampler_spec = sampler_by_update(carried, key, num_tasks, length, mesh)
    return update_program(learner, closed_over, key.shape, num_tasks, length, mesh, sampler_spec), sampler_from


@functools.lru_cache(KEPT)
def update_program(
    learner: MetaLearner,
    sample: SampleFn | None,
    seeds: tuple[int, ...],
    num_tasks: int,
    length: int,
    mesh: Mesh | None,
    sampler_spec: PartitionSpec,
) -> Callable:
    """(state, key, start, stop, sampler if there is no `sample`) -> (state, metrics, whether each parameter is finite)."""
    loop = meta_updates(learner, num_tasks, length, sampler_spec=sampler_spec)

    def run(state: State, key: Array, start: Array, stop: Array, sampler: Partial | None) -> tuple[State, Metrics, PyTree]:
        state, metrics = loop(state, key, start, stop, sampler if sample is None else as_partial(sample))
        # Found where the parameters lie, which need not be copied to the host for it.
        return state, metrics, jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), state.params)

    # The state's memory is used again, so `best` must never share it.
    return _on_mesh(mesh, jax.jit(vmap_over_seeds(seeds, run, (0, 0, None, None, None)), donate_argnums=0))


def validation_and_check(
    validate_fn: Callable[[State], Array] | None, seeds: tuple[int, ...], mesh: Mesh | None
) -> tuple[Callable[[Snapshot], tuple[Snapshot, Array]], Callable[[Snapshot], object]]:
    """The program of a validation, and the same without a result, to check `validate_fn`."""
    closed_over, carried = closed_over_or_carried(validate_fn)
    validate, check = validation_programs(closed_over, seeds, mesh)
    carried = place(carried, mesh)
    return lambda snapshot: validate(snapshot, carried), lambda snapshot: check(snapshot, carried)


@functools.lru_cache(KEPT)
def validation_programs(validate_fn: Callable | None, seeds: tuple[int, ...], mesh: Mesh | None) -> tuple[Callable, Callable]:
    """(Snapshot, `validate_fn` if it is not given here) -> (Snapshot, error); and the same without a result, to check it."""

    def validate(snapshot: Snapshot, carried: PyTree) -> tuple[Snapshot, Array]:
        return _validate(snapshot, carried if validate_fn is None else validate_fn)

    compiled = jax.jit(vmap_over_seeds(seeds, validate, (0, None)))
    return _on_mesh(mesh, compiled), _on_mesh(mesh, compiled.eval_shape)


@functools.lru_cache(KEPT)
def best_program(seeds: tuple[int, ...]) -> Callable[[Snapshot], State]:
    """Snapshot -> its best state, on one device."""
    return jax.jit(vmap_over_seeds(seeds, best_state))


def _on_mesh(mesh: Mesh | None, compiled: Callable) -> Callable:
    def call(*args: Any) -> Any:
        with on(mesh):
            return compiled(*args)

    return call
