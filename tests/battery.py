"""What every learner must do, whatever its tasks are; the batteries of tests share it."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mamljax.types import MetaLearner, Metrics, PyTree

KEY = jax.random.key(0)


class Compiled(NamedTuple):
    """A learner, with its update compiled."""

    learner: MetaLearner
    update: Callable
    traces: list  # an entry for each time that `update` was traced


def compiled(learner: MetaLearner) -> Compiled:
    """Compile the update of a learner, and count how often it is traced."""
    traces = []

    def update(key, state, tasks):
        traces.append("update")
        return learner.update(key, state, tasks)

    return Compiled(learner, jax.jit(update), traces)


def check_arguments(learner: MetaLearner) -> None:
    """It is three functions, whose arguments have the names that all have."""
    assert isinstance(learner, MetaLearner)
    names = [list(inspect.signature(function).parameters) for function in learner]
    assert names == [["key"], ["key", "state", "tasks"], ["key", "state", "task"]]


def check_updates(case: Compiled, batches: Iterable[PyTree]) -> Iterator[Metrics]:
    """Updates keep the structure, shapes and dtypes of the state, change the parameters, give finite scalars, and are traced
    once; yields the metrics of each."""
    state = start = case.learner.init(KEY)
    for number, tasks in enumerate(batches):
        state, metrics = case.update(jax.random.key(number), state, tasks)
        assert signature(state) == signature(start)
        assert all(value.shape == () and jnp.isfinite(value) for value in metrics.values())
        yield metrics
    assert case.traces == ["update"]
    assert not equal(state.params, start.params)


def signature(tree: PyTree) -> PyTree:
    """The structure of a tree, with the shape, dtype and weakness of each leaf."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def equal(a: PyTree, b: PyTree) -> bool:
    """Whether all leaves are the same to the bit."""
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
