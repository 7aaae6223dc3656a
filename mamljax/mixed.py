"""Mixed mode: a gradient whose own derivative is found in forward mode (MixFlow-MG, arXiv 2505.00793)."""

import warnings
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from mamljax.types import PyTree


def mixed_mode_gradient(loss_fn: Callable[[PyTree, PyTree], Array]) -> Callable[[PyTree, PyTree], PyTree]:
    r"""Build the gradient of `loss_fn` in its first argument, to be differentiated without its activations being kept.

    Reverse mode through $\nabla_\theta L(\theta, d)$ asks for products of a cotangent $v$ with its Jacobian, the Hessian. That
    is symmetric, so that $v^T H = H v$: the derivative of the gradient in the direction of $v$, one forward pass over the whole
    of it, from $\theta$ and $d$ alone. Likewise for $d$, by way of $\nabla_d L$.

    So the inner gradient must be that of a function. It is not where a `jax.custom_jvp` of several arguments, such as a
    quantiser with a learned step, has a made-up derivative: the result is then another one, and reverse mode right.

    Args:
        loss_fn: (params, entry) -> scalar; what it closes over is differentiated too.

    Returns:
        (params, entry) -> gradient, like `params`.

    Warns:
        UserWarning: the loss has such a `jax.custom_jvp`, of which nothing tells whether its derivative is the true one.
    """

    def gradient(params: PyTree, entry: PyTree) -> PyTree:
        # What has a derivative of its own must not close over tracers, such as a task's data under vmap. So the loss is
        # traced once, and what it closed over becomes an argument. (jax.closure_convert leaves tracers of vmap where they are.)
        closed = jax.make_jaxpr(loss_fn)(params, entry)
        _warn_of_made_up_derivatives(closed.jaxpr)

        def pure_loss(params: PyTree, entry_and_closed_over: PyTree) -> Array:
            entry, closed_over = entry_and_closed_over
            return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, closed_over))(*jax.tree.leaves((params, entry)))[0]

        return _gradient_of_pure(pure_loss)(params, (entry, closed.consts))

    return gradient


def _warn_of_made_up_derivatives(jaxpr: Jaxpr) -> None:
    """Warn of functions of several arguments with a derivative of their own, but for those of JAX, whose are true."""
    for name in _with_own_derivative(jaxpr):
        if "/jax/_src/" not in name:
            warnings.warn(
                f"the loss has a jax.custom_jvp of several arguments, {name}. If that is not its true derivative, as of "
                "quantisers, mixed mode makes another meta-gradient than reverse mode: choose differentiation='reverse'.",
                stacklevel=2,
            )


def _with_own_derivative(jaxpr: Jaxpr) -> Iterator[str]:
    """The name and place of each `jax.custom_jvp` in a program that has several arguments with derivatives."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "custom_jvp_call":
            arguments = [each.aval for each in equation.invars if not isinstance(each, Literal)]
            if sum(jnp.issubdtype(each.dtype, jnp.floating) for each in arguments) > 1:  # type: ignore[attr-defined]
                yield equation.params["call_jaxpr"].jaxpr.debug_info.func_src_info
        for inside in jax.tree.leaves([*equation.params.values()]):  # the body of a loop, the branches of a condition
            if isinstance(inside, ClosedJaxpr | Jaxpr):
                yield from _with_own_derivative(inside.jaxpr if isinstance(inside, ClosedJaxpr) else inside)


def _gradient_of_pure(loss_fn: Callable[[PyTree, PyTree], Array]) -> Callable[[PyTree, PyTree], PyTree]:
    """The same for a loss that closes over no tracers."""
    joint_gradient = jax.grad(loss_fn, argnums=(0, 1), allow_int=True)  # labels are integers, whose tangents are float0

    @jax.custom_vjp
    def gradient(params: PyTree, entry: PyTree) -> PyTree:
        return jax.grad(loss_fn)(params, entry)

    def forward(params: PyTree, entry: PyTree) -> tuple[PyTree, tuple]:
        # Not `gradient` itself: within a scan JAX would find a wrong derivative of its derivative.
        return jax.grad(loss_fn)(params, entry), (params, entry)

    def backward(residuals: tuple, cotangent: PyTree) -> tuple[PyTree, PyTree]:
        params, entry = residuals
        # The Hessian is symmetric, so its product with the cotangent from the left is the one with a tangent from the right.
        try:
            return jax.jvp(lambda params: joint_gradient(params, entry), (params,), (cotangent,))[1]
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            raise ValueError(
                "the network or the loss has a jax.custom_vjp that has no derivative in forward mode, which mixed mode needs. "
                "Choose differentiation='reverse'; or, if it is the true derivative, give it as a jax.custom_jvp."
            ) from error

    gradient.defvjp(forward, backward)
    return gradient
