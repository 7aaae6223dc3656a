"""Checks of what users pass in: each raises one error that says what was given, what was expected and what to do."""

import numbers

import jax

from mamljax.types import Task


def check_count(name: str, value: int, hint: str = "", *, minimum: int = 1) -> None:
    """Raise `ValueError` unless `value` is a whole number of at least `minimum`; `hint` says what to do instead."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}. {hint}".rstrip())


def check_task(task: Task) -> None:
    """Raise `ValueError` unless support and query are non-empty, well-formed and alike in structure."""
    if not isinstance(task, Task):
        raise ValueError(f"expected a Task(support, query) from the sampler, got {type(task).__name__}.")
    shapes = {name: jax.tree.map(lambda a: a.shape, examples) for name, examples in task._asdict().items()}
    if jax.tree.structure(task.support) != jax.tree.structure(task.query):
        raise ValueError(
            f"support and query must have the same structure, got support {jax.tree.structure(task.support)} "
            f"and query {jax.tree.structure(task.query)}. Build both as Examples(x, y)."
        )
    for name, examples in task._asdict().items():
        lengths = {leaf.shape[0] if leaf.shape else None for leaf in jax.tree.leaves(examples)}
        if len(lengths) != 1 or None in lengths:
            raise ValueError(f"x and y of the {name} set must have one length, got shapes {shapes[name]}.")
        if lengths == {0}:
            raise ValueError(f"the {name} set is empty (shapes {shapes[name]}). Draw at least one example.")
    inner = {name: [leaf.shape[1:] for leaf in jax.tree.leaves(examples)] for name, examples in task._asdict().items()}
    if inner["support"] != inner["query"]:
        raise ValueError(f"support and query must differ in length only, got shapes {shapes}.")
