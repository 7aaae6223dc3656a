"""Networks as `Model(init, apply)`. The one file that imports Flax: everything else sees pure functions.

A Haiku or Equinox network comes in the same way, in two lines of its own: see the README.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import Array

from mamljax.checks import check_count
from mamljax.types import Model, PyTree


class MLP(linen.Module):
    """Fully connected ReLU network, [n, d] -> [n, outputs]."""

    hidden_sizes: Sequence[int]
    outputs: int
    kernel_init: Callable = linen.initializers.truncated_normal(0.01)

    @linen.compact
    def __call__(self, x: Array) -> Array:
        """Apply the network to inputs [n, d]."""
        for size in self.hidden_sizes:
            x = linen.relu(linen.Dense(size, kernel_init=self.kernel_init)(x))
        return linen.Dense(self.outputs, kernel_init=self.kernel_init)(x)


def mlp(inputs: int, hidden_sizes: Sequence[int], outputs: int, *, kernel_init: Callable | None = None) -> Model:
    """Build a fully connected ReLU network, [n, inputs] -> [n, outputs].

    The defaults are those of the authors' code: weights truncated normal with standard deviation 0.01, biases 0.

    Args:
        inputs: input dimensions.
        hidden_sizes: units of each hidden layer; (40, 40) in the sinusoid experiment.
        outputs: output dimensions.
        kernel_init: another initialiser of the weights, from `jax.nn.initializers`.

    >>> model = mlp(1, (40, 40), 1)
    >>> model.apply(model.init(jax.random.key(0)), jnp.ones((5, 1))).shape
    (5, 1)
    """
    for name, size in (("inputs", inputs), ("outputs", outputs), *(("every hidden size", size) for size in hidden_sizes)):
        check_count(name, size)
    keywords = {} if kernel_init is None else {"kernel_init": kernel_init}
    return from_linen(MLP(tuple(hidden_sizes), outputs, **keywords), jnp.zeros((1, inputs)))


def from_linen(module: linen.Module, x: Array) -> Model:
    """Make a model of a Flax Linen module.

    Args:
        module: maps [n, ...] to [n, ...]; must keep no state besides its parameters.
        x: [n, ...] an example input, for its shape and dtype only.

    Returns:
        A model whose params are the module's "params" collection, a nested dict of arrays.

    Raises:
        ValueError: the module has other collections (running averages of `BatchNorm`, for example).
    """
    collections = set(jax.eval_shape(module.init, jax.random.key(0), x)) - {"params"}
    if collections:
        raise ValueError(
            f"{type(module).__name__} keeps state in {sorted(collections)}, which an inner loop under vmap cannot update. "
            "Use layers that keep none: LayerNorm, GroupNorm, or batch statistics computed anew from each batch."
        )
    return Model(
        init=lambda key: module.init(key, x).get("params", {}),
        apply=lambda params, x: module.apply({"params": params}, x),
    )


def from_nnx(build: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """Make a model of a Flax NNX module.

    Args:
        build: makes the module, `lambda rngs: nnx.Linear(1, 1, rngs=rngs)` for example; it must keep no state besides
            its parameters.

    Returns:
        A model whose params are the module's `nnx.Param` values, a nested dict of arrays.

    Raises:
        ValueError: the module has variables of other types.

    >>> model = from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
    >>> model.apply(model.init(jax.random.key(0)), jnp.ones((5, 3))).shape
    (5, 2)
    """
    graph, shapes, rest = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param, ...)
    others = {type(variable).__name__ for variable in jax.tree.leaves(rest, is_leaf=lambda v: isinstance(v, nnx.Variable))}
    if others:
        raise ValueError(
            f"the module keeps state in variables of type {sorted(others)}; only nnx.Param can be adapted. "
            "Use layers that keep none."
        )

    def init(key: Array) -> PyTree:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    def apply(params: PyTree, x: Array) -> Array:
        state = jax.tree.map(lambda shape: shape, shapes)  # a copy, since replacing works in place
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x)

    return Model(init, apply)
