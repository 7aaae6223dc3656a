"""The words of the library. Read this first, then `inner.py`, `maml.py` and `experiments/sinusoid.py`.

Shape legend, used in every docstring:
    B tasks in a meta-batch, N ways, K shots, Q queries per class, n examples, S inner steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

PyTree = Any
Metrics = dict[str, Array]
LossFn = Callable[[Array, Array], Array]  # (outputs [n, ...], targets [n, ...]) -> scalar
SampleFn = Callable[[Array], PyTree]  # key -> one task; mapped over a meta-batch


class Examples(NamedTuple):
    """Labelled examples."""

    x: Array  # [n, ...] inputs
    y: Array  # [n] class ids, or [n, d] targets


class Task(NamedTuple):
    """One task: adapt on the support set, be judged on the query set."""

    support: Examples
    query: Examples


class Model(NamedTuple):
    """A network as two pure functions; `models.py` makes one from any Flax module."""

    init: Callable[[Array], PyTree]  # key -> params
    apply: Callable[[PyTree, Array], PyTree]  # (params, x [n, ...]) -> outputs [n, ...]


class State(NamedTuple):
    """All that the next meta-update needs."""

    params: PyTree  # the meta-parameters
    opt: PyTree  # the outer optimiser's state
    extra: PyTree = ()  # whatever else a method carries along


class MetaLearner(NamedTuple):
    """A method as three pure functions; the builder of every method returns one."""

    init: Callable[[Array], State]  # key -> state
    update: Callable[[Array, State, PyTree], tuple[State, Metrics]]  # (key, state, tasks [B]) -> one meta-update
    evaluate: Callable[[Array, State, PyTree], Metrics]  # (key, state, task) -> metrics [S + 1], before and after each step
