"""Tasks that come from the host: any Python code draws them, by NumPy, from files or from a simulator."""

import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jax.typing import ArrayLike

from mamljax.types import PyTree


class HostTasks:
    """The sampler of tasks that a Python function draws.

    `fit` has it draw the tasks of the next compiled call while the device computes this one, for which each seed takes twice
    `log_every * num_tasks` tasks of device memory. Elsewhere, as in `evaluate`, the program calls back to the host.

    >>> from mamljax.types import Examples, Task
    >>> def line(rng):
    ...     x = rng.normal(size=(10, 1))
    ...     y = rng.uniform(-2, 2) * x
    ...     return Task(support=Examples(x[:5], y[:5]), query=Examples(x[5:], y[5:]))
    >>> HostTasks(line)(jax.random.key(0)).query.y.shape
    (5, 1)
    """

    def __init__(self, draw: Callable[[np.random.Generator], PyTree]) -> None:
        """Draw one task, to learn their shapes.

        Args:
            draw: NumPy's random generator -> one task of NumPy arrays, always of the same shapes and kinds of number. What is
                random in it must come from the generator, so that the same key gives the same task. Called once at a time.

        Raises:
            ValueError: when tasks are drawn, one is of other shapes than the first, or has fractions where that has none.
        """
        self._draw, self._lock = draw, threading.Lock()
        first = draw(np.random.default_rng(0))
        self._shapes = _shapes_of(first)
        self._types = jax.tree.map(_type_on_device, first)

    def __call__(self, key: Array) -> PyTree:
        """Draw one task."""
        # Under `vmap`, however deep, one call draws the tasks of all keys.
        return jax.pure_callback(self._draw_all, self._types, jax.random.key_data(key), vmap_method="broadcast_all")

    def prepare(self, keys: Array) -> Partial:
        """Draw the tasks of some keys [n]; returns a sampler for these keys alone."""
        return prepared(keys, self._draw_all(jax.random.key_data(keys)))

    def _draw_all(self, seeds: Array) -> PyTree:
        """The tasks of seeds [..., words], every leaf [..., its own shape]."""
        seeds = np.asarray(seeds)
        with self._lock:  # several devices may call at once
            tasks = [self._draw(np.random.default_rng(seed)) for seed in seeds.reshape(-1, seeds.shape[-1])]
        for task in tasks:
            if _shapes_of(task) != self._shapes:
                raise ValueError(f"all tasks must have the same shapes, got {_shapes_of(task)} after {self._shapes}.")

        def stack(of: jax.ShapeDtypeStruct, *leaves: ArrayLike) -> np.ndarray:
            stacked = np.stack(leaves)
            # Whole numbers may become fractions, as in a task that happens to have none, but not the other way.
            if not np.can_cast(stacked.dtype, of.dtype, "same_kind"):
                raise ValueError(f"all tasks must have the same kinds of number, got {stacked.dtype} after {of.dtype}.")
            return stacked.astype(of.dtype).reshape((*seeds.shape[:-1], *of.shape))

        return jax.tree.map(stack, self._types, *tasks)


def prepared(keys: Array, tasks: PyTree) -> Partial:
    """Build a sampler of tasks [n] that were made beforehand, for the keys [n] that they were made from."""
    return Partial(_look_up, jax.random.key_data(keys), jax.device_put(tasks))


def _look_up(keys: Array, tasks: PyTree, key: Array) -> PyTree:
    # A key that was not prepared finds row 0. The loop over meta-updates asks for some, whose tasks it does not use.
    row = (keys == jax.random.key_data(key)[None]).all(-1).argmax()
    return jax.tree.map(lambda leaf: leaf[row], tasks)


def _shapes_of(task: PyTree) -> PyTree:
    return jax.tree.map(np.shape, task)


def _type_on_device(leaf: ArrayLike) -> jax.ShapeDtypeStruct:
    """Shape and dtype as JAX has them: without float64, unless it is enabled."""
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(np.asarray(leaf)))
