"""Checks of what users pass in: each raises one error that says what was given, what was expected and what to do."""

import math
import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from mamljax.types import Examples, LossFn, MetaLearner, PyTree, SampleFn, Task


def check_count(name: str, value: int, hint: str = "", *, minimum: int = 1) -> None:
    """Raise `ValueError` unless `value` is a whole number of at least `minimum`; `hint` says what to do instead."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}. {hint}".rstrip())


def check_counts(**counts: int) -> None:
    """Raise `ValueError` unless all are whole numbers of at least 1."""
    for name, count in counts.items():
        check_count(name, count)


def check_positive(name: str, value: float | Array, hint: str = "", *, or_zero: bool = False) -> None:
    """Raise `ValueError` unless `value` is a positive and finite number, or a traced one; `hint` says what to do instead."""
    # Of a traced number nothing can be known: a program may map over several.
    if is_number(value) and (isinstance(value, Tracer) or (math.isfinite(value) and (value > 0 or (or_zero and value == 0)))):
        return
    raise ValueError(f"{name} must be {'at least 0' if or_zero else 'positive'} and finite, got {value!r}. {hint}".rstrip())


def is_number(value: object) -> bool:
    """Whether it is a real number, or an array that is one; a truth value is not."""
    if isinstance(value, Array | np.ndarray):
        return value.ndim == 0 and not jnp.issubdtype(value.dtype, jnp.bool_)
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_seconds(**times: float) -> None:
    """Raise `ValueError` unless all are numbers; they may be infinite, or zero and less for no time at all."""
    for name, value in times.items():
        if not is_number(value) or math.isnan(value):
            raise ValueError(f"{name} must be a number of seconds, got {value!r}.")


def check_callable(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` can be called."""
    if not callable(value):
        raise ValueError(f"{name} must be a function, got {type(value).__name__}.")


def check_learner(learner: MetaLearner) -> None:
    """Raise `ValueError` unless `learner` is a meta-learner."""
    if not isinstance(learner, MetaLearner):
        raise ValueError(f"learner must be a MetaLearner, as maml(...) returns it, got {type(learner).__name__}.")


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise `ValueError` unless `value` is one of the alternatives of a `Literal`."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}.")


def check_metric_fns(metric_fns: Mapping[str, LossFn]) -> None:
    """Raise `ValueError` unless metrics are given by name, and none has that under which the loss is reported."""
    if not isinstance(metric_fns, Mapping) or not all(callable(fn) for fn in metric_fns.values()):
        raise ValueError(
            f'metric_fns must be a dict of functions by name, such as {{"accuracy": accuracy}}, got {metric_fns!r}.'
        )
    if "loss" in metric_fns:
        raise ValueError('metric_fns must not have "loss", which is the name of the loss itself. Choose another name.')


def check_optimiser(tx: optax.GradientTransformation) -> None:
    """Raise `ValueError` unless `tx` is an Optax transformation."""
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(
            f"tx must be an Optax transformation, such as optax.adam(1e-3), got {tx!r}. Of optax.MultiSteps pass "
            "gradient_transformation()."
        )


def check_params(params: PyTree) -> None:
    """Raise `ValueError` unless every leaf is floating-point, and so can be learned."""
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}, but only floating-point parameters "
                "have gradients. Convert it, or close over it in Model.apply."
            )


def returning_scalar(fn: Callable[..., Array], name: str = "loss") -> Callable[..., Array]:
    """The same loss or metric, which raises `ValueError` if it is no scalar."""

    def checked(*args: PyTree) -> Array:
        value = fn(*args)
        if not isinstance(value, Array | np.ndarray | np.generic | float | int):
            raise ValueError(f"the {name} must be a scalar, got {type(value).__name__}. Return nothing beside it.")
        if jnp.shape(value) != ():
            raise ValueError(f"the {name} must be a scalar, got shape {jnp.shape(value)}. Take its mean over the examples.")
        return value

    return checked


def num_entries(data: PyTree) -> int:
    """The length of the leading axis, which all leaves of `data` must have alike; else `ValueError`."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(data)]
    lengths = {shape[:1] for shape in shapes}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(f"data needs arrays with one leading axis in common, an entry for each step; got shapes {shapes}.")
    return shapes[0][0]


def warn_of_constant_tasks(sample: SampleFn, key: Array) -> None:
    """Warn of a sampler that makes nothing of its key: what it draws by other means is drawn once, while JAX traces it."""
    jaxpr = jax.make_jaxpr(sample)(key).jaxpr
    # A sampler may also return its key as it is, and so use it in no equation.
    used = [*jaxpr.outvars, *(variable for equation in jaxpr.eqns for variable in equation.invars)]
    if not any(variable is jaxpr.invars[0] for variable in used):
        warnings.warn(
            "the sampler does not use its key, so that all tasks are the same. Draw them from the key with jax.random: what "
            "NumPy or Python draws is drawn once, while JAX traces the sampler. tasks.host.HostTasks draws by NumPy.",
            stacklevel=2,
        )


def check_key(key: Array, *, several: bool = False) -> None:
    """Raise `ValueError` unless `key` is a typed random key, or, where there may be several, a vector of such keys."""
    if not isinstance(key, Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim > several or key.size == 0:
        got = f"{key.dtype}{list(key.shape)}" if isinstance(key, Array) else repr(key)
        vector = " or a vector of such keys" if several else ""
        raise ValueError(f"key must be jax.random.key(seed){vector}, got {got}.")


def check_task(task: Task) -> None:
    """Raise `ValueError` unless support and query are non-empty, well-formed and alike in structure."""
    if not isinstance(task, Task):
        raise ValueError(f"expected a Task(support, query) from the sampler, got {type(task).__name__}.")
    shapes = {name: jax.tree.map(lambda a: a.shape, examples) for name, examples in task._asdict().items()}
    support, query = (jax.tree.structure(examples) for examples in task)
    if len({support, query}) > 1:
        raise ValueError(
            f"support and query must have the same structure, got support {support} and query {query}. Build both as "
            "Examples(x, y)."
        )
    if not isinstance(task.support, Examples):
        raise ValueError(f"support and query must be Examples(x, y), got {type(task.support).__name__}.")
    for name, examples in task._asdict().items():
        lengths = {leaf.shape[0] if leaf.shape else None for leaf in jax.tree.leaves(examples)}
        if len(lengths) != 1 or None in lengths:
            raise ValueError(f"x and y of the {name} set must have one length, got shapes {shapes[name]}.")
        if lengths == {0}:
            raise ValueError(f"the {name} set is empty (shapes {shapes[name]}). Draw at least one example.")
    of_one = {name: [leaf.shape[1:] for leaf in jax.tree.leaves(examples)] for name, examples in task._asdict().items()}
    if of_one["support"] != of_one["query"]:
        raise ValueError(f"support and query must differ in length only, got shapes {shapes}.")
