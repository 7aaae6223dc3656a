"""Trust region policy optimisation (Schulman et al. 2015, arXiv 1502.05477) as an Optax transformation."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from mamljax.checks import check_choice, check_count, check_positive
from mamljax.types import PyTree

HessianVectorProduct = Literal["exact", "finite_differences"]
AIM = 0.9  # share of the bound that a shortened step aims at


class TrustRegionState(NamedTuple):
    """What became of the last step; the next one needs none of it."""

    fraction: Array  # [] of the full step that was taken; 0 if none was acceptable
    change: Array  # [] of the loss
    kl: Array  # [] divergence, in nats


def trpo(
    max_kl: float,
    *,
    damping: float = 1e-5,
    cg_steps: int = 10,
    backtrack_ratio: float = 0.8,
    max_backtracks: int = 15,
    hvp: HessianVectorProduct = "exact",
) -> optax.GradientTransformationExtraArgs:
    r"""Take the largest natural-gradient step within a trust region that makes the loss smaller.

    $\theta \leftarrow \theta - \phi \sqrt{2 \delta / x^T A x}\; x$ with $x \approx A^{-1} \nabla L(\theta)$ by conjugate
    gradients, $A = H + \lambda I$, $H$ the Hessian of the divergence at $\theta$, and $\phi$ the first in a sequence of
    fractions for which the loss falls and the divergence is at most $\delta$. The sequence begins with 1. If the divergence
    exceeds $\delta$, the next fraction is the one that would bring it to $0.9 \delta$ if it were quadratic, but no less than
    half of the last; if only the loss does not fall, it is $\beta$ times the last. The parameters stay as they are if no
    fraction will do. The defaults are those of the authors, whose fractions are powers of $\beta$ in every case.

    `update` needs, beside gradients and parameters, the extra arguments `value` (the loss at `params`) and `value_and_kl_fn`, a
    function of the parameters on the same data: the loss, and the divergence from the policy that acted, which is 0 at
    `params`. Exact products of a vector with the Hessian of the divergence at `params` are found by forward-over-reverse
    differentiation, or by the further argument `kl_product`, vector -> product, if there is one that is faster.

    Args:
        max_kl: delta, bound of the mean divergence in nats; 0.01 in the paper.
        damping: lambda, added to the Hessian's diagonal.
        cg_steps: conjugate gradient iterations at most.
        backtrack_ratio: beta, the factor between lengths where it is the loss that does not fall.
        max_backtracks: how many lengths to try.
        hvp: Hessian-vector products "exact", or by central "finite_differences" of its gradients, as in the paper.

    Raises:
        ValueError: a bound, damping or ratio out of range, a count below 1, or an unknown `hvp`.

    >>> tx, params = trpo(0.01), jnp.array([1.0, 0.0])
    >>> value_and_kl_fn = lambda p: (p[0], ((p - params) ** 2).sum() / 2)
    >>> grads = jnp.array([1.0, 0.0])
    >>> updates, state = tx.update(grads, tx.init(params), params, value=params[0], value_and_kl_fn=value_and_kl_fn)
    >>> round(float(updates[0]), 3)  # to the bound: sqrt(2 * 0.01) = 0.141
    -0.141
    """
    for name, number in (("max_kl", max_kl), ("damping", damping)):
        check_positive(name, number, "The paper uses max_kl 0.01, damping 1e-5.")
    if not 0 < backtrack_ratio < 1:
        raise ValueError(f"backtrack_ratio must lie between 0 and 1, got {backtrack_ratio}. The paper uses 0.8.")
    check_count("cg_steps", cg_steps)
    check_count("max_backtracks", max_backtracks)
    check_choice("hvp", hvp, HessianVectorProduct)

    def init(params: PyTree) -> TrustRegionState:
        zero = jnp.zeros(())
        return TrustRegionState(fraction=zero, change=zero, kl=zero)

    def update(
        grads: PyTree,
        state: TrustRegionState,
        params: PyTree,
        *,
        value: Array,
        value_and_kl_fn: Callable[[PyTree], tuple[Array, Array]],
        kl_product: Callable[[PyTree], PyTree] | None = None,
        **extra: PyTree,
    ) -> tuple[PyTree, TrustRegionState]:
        flat, unravel = ravel_pytree(params)
        gradient = ravel_pytree(grads)[0]
        # The direction: the natural gradient.
        if hvp == "exact" and kl_product is not None:
            product = lambda vector: ravel_pytree(kl_product(unravel(vector)))[0]  # noqa: E731
        else:
            product = hessian_vector_product(lambda flat: value_and_kl_fn(unravel(flat))[1], flat, hvp)
        direction, residual = conjugate_gradient(lambda v: product(v) + damping * v, gradient, cg_steps)
        curvature = direction @ (gradient - residual)  # x^T A x without another product, as the residual is b - A x
        # The length: as far as the trust region would reach if the divergence were quadratic.
        full_step = -jnp.sqrt(2 * max_kl / (curvature + 1e-8)) * direction  # 0, not NaN, where the gradient is 0

        def attempt(fraction: Array) -> tuple[Array, Array, Array]:
            """Whether a step of this length may be taken, false for what is not a number; else by what factor to shorten it;
            and what it changes."""
            moved_value, kl = value_and_kl_fn(unravel(flat + fraction * full_step))
            factor = jnp.where(kl > max_kl, jnp.maximum(jnp.sqrt(AIM * max_kl / kl), 0.5), backtrack_ratio)
            return (moved_value < value) & (kl <= max_kl), factor, jnp.stack([moved_value - value, kl])

        # As it is not, the step is shortened until it is acceptable.
        fraction, changes = backtrack(attempt, max_backtracks)
        step = jnp.where(fraction > 0, fraction * full_step, 0)  # 0 times a step that is not finite would be NaN
        return unravel(step), TrustRegionState(fraction, *changes)

    return optax.GradientTransformationExtraArgs(init, update)


def hessian_vector_product(fn: Callable[[Array], Array], x: Array, method: HessianVectorProduct) -> Callable[[Array], Array]:
    """Build the function from v [n] to the product [n] of v with the Hessian of `fn` at x [n]."""
    if method == "exact":
        return lambda v: jax.jvp(jax.grad(fn), (x,), (v,))[1]

    def product(v: Array) -> Array:
        # The step that balances rounding (relative 1e-7) against curvature in float32.
        size = 1e-2 / (jnp.linalg.norm(v) + 1e-8)
        ahead, behind = jax.grad(fn)(x + size * v), jax.grad(fn)(x - size * v)
        return (ahead - behind) / (2 * size)

    return product


def conjugate_gradient(
    product: Callable[[Array], Array], target: Array, num_steps: int, *, tolerance: float = 1e-10
) -> tuple[Array, Array]:
    """Solve A x = b for a positive definite A that is known by its products.

    Args:
        product: v [n] -> A v [n].
        target: b [n].
        num_steps: iterations at most.
        tolerance: of the squared norm of the residual, at which to stop.

    Returns:
        x [n] and the residual b - A x [n].
    """

    def unsolved(carry: tuple) -> Array:
        step, _, residual, _ = carry
        return (step < num_steps) & (residual @ residual > tolerance)

    def iterate(carry: tuple) -> tuple:
        step, x, residual, direction = carry
        image = product(direction)
        length = (residual @ residual) / (direction @ image)
        residual_next = residual - length * image
        direction_next = residual_next + (residual_next @ residual_next) / (residual @ residual) * direction
        return step + 1, x + length * direction, residual_next, direction_next

    return lax.while_loop(unsolved, iterate, (0, jnp.zeros_like(target), target, target))[1:3]


def backtrack(attempt: Callable[[Array], tuple[Array, Array, Array]], max_attempts: int) -> tuple[Array, Array]:
    """Find a fraction that is acceptable, from 1 downwards.

    Args:
        attempt: fraction [] -> whether it is acceptable [] bool; by what factor [] to shorten it if not; and two numbers [2] to
            be returned with it.
        max_attempts: how many to make.

    Returns:
        The fraction and its numbers, all 0 if none was acceptable.
    """

    def undecided(carry: tuple) -> Array:
        count, accepted, _, _ = carry
        return (count < max_attempts) & ~accepted

    def another(carry: tuple) -> tuple:
        count, _, fraction, _ = carry
        accepted, factor, numbers = attempt(fraction)
        return count + 1, accepted, jnp.where(accepted, fraction, factor * fraction), numbers

    _, accepted, fraction, numbers = lax.while_loop(undecided, another, (0, jnp.array(False), jnp.ones(()), jnp.zeros(2)))
    return jax.tree.map(lambda found: jnp.where(accepted, found, 0), (fraction, numbers))
