"""Networks as `Model(init, apply)`. This file and `image_models.py` alone import Flax: everything else sees pure functions.

A Haiku or Equinox network comes in the same way, in two lines of its own: see the README.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import linen
from flax.errors import InvalidRngError
from jax import Array
from jax.typing import DTypeLike

from mamljax.checks import check_count
from mamljax.distributions import Categorical
from mamljax.types import Model, PyTree

if TYPE_CHECKING:
    from flax import nnx


class MLP(linen.Module):
    """Fully connected ReLU network, [n, d] -> [n, outputs]."""

    hidden_sizes: Sequence[int]
    outputs: int
    kernel_init: Callable = linen.initializers.lecun_normal()

    @linen.compact
    def __call__(self, x: Array) -> Array:
        """Apply the network to inputs [n, d]."""
        for size in self.hidden_sizes:
            x = linen.relu(linen.Dense(size, kernel_init=self.kernel_init)(x))
        return linen.Dense(self.outputs, kernel_init=self.kernel_init)(x)


def mlp(inputs: int, hidden_sizes: Sequence[int], outputs: int, *, kernel_init: Callable = MLP.kernel_init) -> Model:
    """Build a fully connected ReLU network, [n, inputs] -> [n, outputs]; biases begin with 0.

    Args:
        inputs: input dimensions.
        hidden_sizes: units of each hidden layer; (40, 40) in the sinusoid experiment.
        outputs: output dimensions.
        kernel_init: how weights begin, from `jax.nn.initializers`; `truncated_normal(0.01)` in the authors' code.

    >>> model = mlp(1, (40, 40), 1)
    >>> model.apply(model.init(jax.random.key(0)), jnp.ones((5, 1))).shape
    (5, 1)
    """
    _check_sizes(hidden_sizes, inputs=inputs, outputs=outputs)
    return from_linen(MLP(tuple(hidden_sizes), outputs, kernel_init), jnp.zeros((1, inputs)))


def _check_sizes(hidden_sizes: Sequence[int], **sizes: int) -> None:
    if not isinstance(hidden_sizes, Sequence):
        raise ValueError(f"hidden_sizes must be a sequence, such as (40, 40), got {hidden_sizes!r}.")
    for name, size in (*sizes.items(), *(("every hidden size", size) for size in hidden_sizes)):
        check_count(name, size)


class GaussianPolicy(linen.Module):
    """A policy with normally distributed actions, independent in each dimension; their spread is the same in every state."""

    hidden_sizes: Sequence[int]
    action_size: int

    @linen.compact
    def __call__(self, observations: Array) -> tuple[Array, Array]:
        """Map observations [..., o] to the mean [..., a] of the action and the logarithm [a] of its standard deviation."""
        mean = MLP(self.hidden_sizes, self.action_size, kernel_init=linen.initializers.glorot_uniform())(observations)
        return mean, self.param("log_std", linen.initializers.zeros, (self.action_size,))


def gaussian_policy(observation_size: int, action_size: int, *, hidden_sizes: Sequence[int] = (100, 100)) -> Model:
    """Build the policy of the reinforcement learning experiments: a fully connected ReLU network and a standard deviation.

    As in the authors' code weights begin with Glorot's uniform distribution, biases and log-std with 0; the latter is adapted
    like every other parameter.

    Args:
        observation_size: o, dimensions of an observation.
        action_size: a, dimensions of an action.
        hidden_sizes: units of each hidden layer; (100, 100) in the paper.

    Returns:
        A model whose `apply` gives the mean [..., a] and the logarithm [a] of the standard deviation of the actions.

    Raises:
        ValueError: a size below 1.

    >>> policy = gaussian_policy(2, 1)
    >>> mean, log_std = policy.apply(policy.init(jax.random.key(0)), jnp.ones((20, 2)))
    >>> mean.shape, log_std.tolist()
    ((20, 1), [0.0])
    """
    _check_sizes(hidden_sizes, observation_size=observation_size, action_size=action_size)
    return from_linen(GaussianPolicy(tuple(hidden_sizes), action_size), jnp.zeros((1, observation_size)))


def categorical_policy(observation_size: int, num_actions: int, *, hidden_sizes: Sequence[int] = (100, 100)) -> Model:
    """Build a policy of discrete actions: as `gaussian_policy`, but its `apply` gives `Categorical(logits [..., n])`.

    Args:
        observation_size: o, dimensions of an observation.
        num_actions: n, the `action_size` of the environment.
        hidden_sizes: units of each hidden layer.

    Raises:
        ValueError: a size below 1.
    """
    _check_sizes(hidden_sizes, observation_size=observation_size, num_actions=num_actions)
    network = mlp(observation_size, hidden_sizes, num_actions, kernel_init=linen.initializers.glorot_uniform())
    return Model(network.init, lambda params, observations: Categorical(network.apply(params, observations)))


def from_linen(module: linen.Module, x: Array) -> Model:
    """Make a model of a Flax Linen module.

    Args:
        module: maps [n, ...] to [n, ...]; must keep no state besides its parameters.
        x: [n, ...] an example input, for its shape and dtype only.

    Returns:
        A model whose params are the module's "params" collection, a nested dict of arrays.

    Raises:
        ValueError: it is no Linen module; it has other collections (running averages of `BatchNorm`, for example); where it is
            applied, it draws random numbers (dropout).
    """
    if not isinstance(module, linen.Module):
        raise ValueError(f"module must be a Flax Linen module, got {type(module).__name__}. For Flax NNX there is from_nnx.")
    collections = set(jax.eval_shape(module.init, jax.random.key(0), x)) - {"params"}
    if collections:
        raise ValueError(
            f"{type(module).__name__} keeps state in {sorted(collections)}, which an inner loop under vmap cannot update. "
            "Use layers that keep none: LayerNorm, GroupNorm, or batch statistics computed anew from each batch."
        )

    def apply(params: PyTree, x: Array) -> PyTree:
        try:
            return module.apply({"params": params}, x)
        except InvalidRngError as error:
            raise ValueError(
                f"{type(module).__name__} draws random numbers, and an inner loop has none to give: {error} "
                "Switch dropout off, by deterministic=True; or draw keys as part of each task's inputs."
            ) from error

    return Model(lambda key: module.init(key, x).get("params", {}), apply)


def from_nnx(build: "Callable[[nnx.Rngs], nnx.Module]") -> Model:
    """Make a model of a Flax NNX module.

    Args:
        build: makes the module, `lambda rngs: nnx.Linear(1, 1, rngs=rngs)` for example; it must keep no state besides
            its parameters.

    Returns:
        A model whose params are the module's `nnx.Param` values, a nested dict of arrays.

    Raises:
        ValueError: it is a module itself; or the module has variables of other types.

    >>> from flax import nnx
    >>> model = from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
    >>> model.apply(model.init(jax.random.key(0)), jnp.ones((5, 3))).shape
    (5, 2)
    """
    from flax import nnx  # takes a third of a second: only those who need it wait for it

    if isinstance(build, nnx.Module) or not callable(build):
        wanted = "a function that makes the module, lambda rngs: nnx.Linear(1, 1, rngs=rngs) for example"
        raise ValueError(f"build must be {wanted}, got {type(build).__name__}.")
    graph, shapes, *rest = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param, ...)
    variables = jax.tree.leaves(rest, is_leaf=lambda node: isinstance(node, nnx.Variable))
    if others := sorted({type(variable).__name__ for variable in variables}):
        without_rngs = "Dropout(rate, deterministic=True) keeps none, nor RNN(cell, rngs=False), called with rngs=nnx.Rngs(0)."
        remedy = without_rngs if {*others} <= {"RngCount", "RngKey"} else "Use layers that keep none."
        raise ValueError(f"the module keeps state in variables of type {others}; only nnx.Param can be adapted. {remedy}")

    def init(key: Array) -> PyTree:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    def apply(params: PyTree, x: Array) -> Array:
        state = jax.tree.map(lambda shape: shape, shapes)  # a copy, since replacing works in place
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x)

    return Model(init, apply)


def feature_size(features: Model, x: Array) -> int:
    """How many features d a network makes of each example: [n, ...] -> [n, d].

    Raises:
        ValueError: they are not [n, d].
    """
    shape = jax.eval_shape(lambda key: features.apply(features.init(key), x), jax.random.key(0)).shape
    if len(shape) != 2:
        raise ValueError(f"features must be [n, d], got {list(shape)}. Flatten them.")
    return shape[1]


def with_linear_head(features: Model, x: Array, outputs: int) -> Model:
    """Put a linear layer on features; the params are {"features": ..., "head": {"kernel": [d, outputs], "bias": [1, outputs]}}.

    Args:
        features: [n, ...] -> [n, d].
        x: [n, ...] an example input, for its shape and dtype only.
        outputs: of the linear layer.
    """
    check_count("outputs", outputs)
    size = feature_size(features, x)

    def init(key: Array) -> PyTree:
        body_key, head_key = jax.random.split(key)
        kernel = linen.initializers.lecun_normal()(head_key, (size, outputs))
        return {"features": features.init(body_key), "head": {"kernel": kernel, "bias": jnp.zeros((1, outputs))}}

    def apply(params: PyTree, x: Array) -> Array:
        return features.apply(params["features"], x) @ params["head"]["kernel"] + params["head"]["bias"]

    return Model(init, apply)


def with_context(model: Model, shape: int | tuple[int, ...]) -> Model:
    """Give a network a context: parameters of its own that it sees beside every input.

    Adapted alone, by `rules.all_but("network", ...)`, they tell the network what a task is, and leave how it works as it is.
    The paper compares MAML with that in its appendix. Normalisation over the examples takes away what is the same for all of
    them: in a network that has it the context must differ from place to place, as that of images does for convolutions.

    Args:
        model: a network of inputs [n, ..., d + c].
        shape: of the context, c or [..., c]; that of images is [H, W, c], c further channels.

    Returns:
        A network of inputs [n, ..., d], whose params are a dict of the "context", zeros at first, and the "network".

    Raises:
        ValueError: a size below 1; where it is applied, inputs that are not one array.

    >>> model = with_context(mlp(1 + 3, (8,), 2), 3)
    >>> params = model.init(jax.random.key(0))
    >>> params["context"].tolist(), model.apply(params, jnp.ones((5, 1))).shape
    ([0.0, 0.0, 0.0], (5, 2))
    """
    shape = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    for size in shape or (0,):
        check_count("the size of a context", size)

    def init(key: Array) -> PyTree:
        return {"context": jnp.zeros(shape), "network": model.init(key)}

    def apply(params: PyTree, x: Array) -> Array:
        if not hasattr(x, "dtype"):
            raise ValueError(f"a context is put beside inputs of one array, got {type(x).__name__}. Build a model of your own.")
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else params["context"].dtype
        context = jnp.broadcast_to(params["context"].astype(dtype), (*x.shape[:-1], shape[-1]))
        return model.apply(params["network"], jnp.concatenate([x, context], axis=-1))

    return type(model)(init, apply)  # it stays a model that learns its rule, if it is one


def mixed_precision(model: Model, dtype: DTypeLike = jnp.bfloat16) -> Model:
    """Let a network calculate in half precision; its parameters and outputs, and so all gradients, stay as they are.

    Activations take half of the memory, and less time where that goes to reading and writing them, as on a GPU. On a CPU it
    takes longer.

    Args:
        model: a network whose normalisation takes its statistics in float32, as `image_models.BatchStatNorm` does.
        dtype: of its activations. The range of `float16` would need a scaled loss.

    Returns:
        A network with the same parameters, whose outputs have their dtype.

    Raises:
        ValueError: a dtype that is not of floating-point numbers.

    >>> model = mixed_precision(mlp(1, (40, 40), 1))
    >>> params = model.init(jax.random.key(0))
    >>> params["Dense_0"]["kernel"].dtype, model.apply(params, jnp.ones((5, 1))).dtype
    (dtype('float32'), dtype('float32'))
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be one of floating-point numbers, got {jnp.dtype(dtype)}. Take jnp.bfloat16.")

    def cast(leaf: Array) -> Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def apply(params: PyTree, x: Array) -> Array:
        outputs = model.apply(*jax.tree.map(cast, (params, x)))
        full = jnp.result_type(*jax.tree.leaves(params))
        return jax.tree.map(lambda output: output.astype(full), outputs)

    return model._replace(apply=apply)  # it stays a model that learns its rule, if it is one
