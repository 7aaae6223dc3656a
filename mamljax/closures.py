"""How compiled programs get the functions that users pass in: closed over, or carried as arguments."""

import functools
import inspect
from collections.abc import Callable

from jax.tree_util import Partial


def as_partial(fn: Callable) -> Partial:
    """Make a function a pytree, which `jit` takes as an argument.

    Arrays that a `Partial` carries are arguments with it; those that a plain function closes over remain constants.
    """
    return fn if isinstance(fn, Partial) else Partial(fn)


def closed_over_or_carried(fn: Callable | None) -> tuple[Callable | None, Callable | None]:
    """Divide functions by how compiled programs get them: those that close over data, and those that carry it as arguments.

    As an argument, JAX would never let go of a function that closes over data, nor of the data. Programs are kept by the hash
    of what they close over; what may be another function in a later call, though its hash is the same, is made a new one here,
    for which nothing is kept.
    """
    if fn is None or isinstance(fn, Partial):
        return None, fn
    return (fn if _stays_as_it_is(fn) else lambda *args: fn(*args)), None


def _stays_as_it_is(fn: Callable) -> bool:
    """Whether as long as its hash is the same a function does the same, but for what it finds in variables outside of it.

    Not so an object, or a method of one, whose attributes change, unless its class defines a hash of them.
    """
    if hasattr(fn, "prepare"):  # a program asks it on the host, whenever it runs
        return True
    fn = fn.func if isinstance(fn, functools.partial) else fn
    is_function = not inspect.isfunction(type(fn).__call__)  # nor an object of a class written in Python
    owner = fn.__self__ if inspect.ismethod(fn) else None if is_function else fn
    if owner is None or inspect.isclass(owner):
        return True
    try:
        hash(owner)
    except TypeError:  # of a dataclass, for example, or one of its fields
        return False
    return type(owner).__hash__ is not object.__hash__
