"""Evaluation: metrics of a trained meta-learner over many tasks, with their confidence intervals."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from mamljax.checks import check_callable, check_count, check_key, check_learner, warn_of_constant_tasks
from mamljax.closures import as_partial, closed_over_or_carried
from mamljax.devices import divide, num_shares
from mamljax.types import MetaLearner, Metrics, PyTree, SampleFn, State


def evaluate(
    learner: MetaLearner,
    state: State,
    sample: SampleFn,
    *,
    key: Array,
    num_tasks: int,
    chunk_size: int | None = None,
) -> Metrics:
    """Evaluate one state on tasks drawn from `key`; the same key gives the same tasks.

    Under `jax.vmap` over states it evaluates several seeds at once. Where `jax.set_mesh` names devices (see
    `devices.task_mesh`) each takes a share of the tasks.

    Args:
        learner: what to evaluate; compiled as it is at the first call.
        state: a state of it.
        sample: key -> task; a `jax.tree_util.Partial` if it carries arrays. Compiled anew in each call if it is an object whose
            attributes may change.
        key: a JAX random key. Where it is of the kind "rbg", what is drawn depends on `chunk_size` too.
        num_tasks: how many tasks; 600 in the paper.
        chunk_size: tasks computed at a time, by each device, where memory is short; by default all of them.

    Returns:
        Each metric as [num_tasks, S + 1], before and after each adaptation step. See `mean_and_ci95`.

    Raises:
        ValueError: a count below 1, no `State`, or one of several seeds; no learner, no function as sampler, no typed key.
    """
    if not isinstance(state, State):
        raise ValueError(f"state must be a State, such as the result of fit has, got {type(state).__name__}.")
    check_count("num_tasks", num_tasks)
    chunk_size = num_tasks if chunk_size is None else chunk_size
    check_count("chunk_size", chunk_size)
    check_key(key)
    check_learner(learner)
    check_callable("sample", sample)
    sample, carried = closed_over_or_carried(sample)
    return _compile(learner, sample, num_tasks, min(chunk_size, num_tasks))(state, key, carried)


@functools.lru_cache(maxsize=32)  # not static arguments of `jit`, which would keep every learner and sampler there ever was
def _compile(learner: MetaLearner, sample: SampleFn | None, num_tasks: int, chunk_size: int) -> Callable[..., Metrics]:
    def run(state: State, key: Array, carried: PyTree) -> Metrics:
        _check_is_one(state, learner)
        sampler = carried if sample is None else as_partial(sample)
        return _evaluate(learner, sampler, num_tasks, chunk_size, state, key)

    return jax.jit(run)


def _check_is_one(state: State, learner: MetaLearner) -> None:
    """Raise `ValueError` if a state is one of several seeds: its arrays have a leading axis that the learner's have not."""
    one = jax.eval_shape(learner.init, jax.random.key(0))
    found, expected = ([np.shape(leaf) for leaf in jax.tree.leaves(of.params)] for of in (state, one))
    if expected and expected == [shape[1:] for shape in found if shape]:
        raise ValueError(
            "state is one of several seeds, whose arrays have a leading axis. Map over it: "
            "jax.vmap(lambda state: evaluate(learner, state, ...))(state)."
        )


def _evaluate(learner: MetaLearner, sample: Partial, num_tasks: int, chunk_size: int, state: State, key: Array) -> Metrics:
    def one_task(state: State, sample: SampleFn, key: Array) -> Metrics:
        sample_key, evaluate_key = jax.random.split(key)
        return learner.evaluate(evaluate_key, state, sample(sample_key))

    def share(common: tuple[State, SampleFn], keys: Array) -> Metrics:
        # One alone, not a batch of one, whose products take longer.
        return lax.map(functools.partial(one_task, *common), keys, batch_size=None if chunk_size == 1 else chunk_size)

    warn_of_constant_tasks(sample, key)
    keys = jax.random.split(key, num_tasks)
    # Devices take equal shares: the first tasks once more fill the last share, and are left out of the result.
    filled = keys[jnp.arange(num_tasks + -num_tasks % num_shares()) % num_tasks]
    return jax.tree.map(lambda leaf: leaf[:num_tasks], divide(share, (state, sample), filled))


def mean_and_ci95(values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Condense values over seeds and tasks to their mean and the half-width of its 95 % confidence interval.

    With one seed the interval is over tasks, 1.96 sd / sqrt(tasks), as in the paper. With more it is over the seeds' means,
    by Student's t: it then says how far the mean of other trainings may lie.

    Args:
        values: [seeds, tasks, ...].

    Returns:
        Two arrays [...], float64; the half-width is NaN for one seed and one task.

    Raises:
        ValueError: fewer than two axes.

    >>> mean, ci95 = mean_and_ci95([[[0.0], [2.0]]])
    >>> float(mean[0]), round(float(ci95[0]), 2)
    (1.0, 1.96)
    """
    from scipy.special import stdtrit  # takes a quarter of a second, for which no training should wait

    values = np.asarray(values, np.float64)
    if values.ndim < 2:
        raise ValueError(f"values must be [seeds, tasks, ...], got shape {values.shape}. For one seed pass values[None].")
    seeds = len(values)
    mean = values.mean(axis=(0, 1))
    samples, quantile = (values[0], 1.96) if seeds == 1 else (values.mean(axis=1), stdtrit(seeds - 1, 0.975))
    if len(samples) == 1:
        return mean, np.full_like(mean, np.nan)
    return mean, quantile * samples.std(axis=0, ddof=1) / np.sqrt(len(samples))


def normalised(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(values - low) / (high - low) of means over tasks, to compare returns with those of two other methods.

    Args:
        values: [seeds, tasks, S + 1].
        low, high: [seeds, tasks, S + 1], or 1 in the place of S + 1, such as those of a baseline and of an oracle.

    Returns:
        [seeds, 1, S + 1], NaN where `high` is not the higher of the two.

    >>> normalised(np.full((1, 2, 1), 3.0), np.zeros((1, 2, 1)), np.full((1, 2, 1), 4.0)).tolist()
    [[[0.75]]]
    """
    means, lowest, highest = (each.mean(1, keepdims=True) for each in (values, low, high))
    return np.where(highest > lowest, means - lowest, np.nan) / (highest - lowest)
