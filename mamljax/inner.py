"""The inner loop: adapt parameters to one task, differentiably."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from mamljax.checks import check_choice, check_params, num_entries, returning_scalar
from mamljax.mixed import mixed_mode_gradient
from mamljax.rules import Rule, as_rule
from mamljax.types import PyTree

Differentiation = Literal["mixed", "reverse", "first_order"]


def adapt(
    loss_fn: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    data: PyTree,
    rule: Rule,
    *,
    differentiation: Differentiation = "mixed",
    unroll_first: bool = True,
) -> tuple[PyTree, PyTree]:
    r"""Take one step of `rule` down `loss_fn` for each leading entry of `data`.

    $\theta_{i+1} = \theta_i + \mathrm{rule}(\nabla_\theta L(\theta_i, d_i))$, which for gradient descent is
    line 6 of algorithm 1 in Finn et al. 2017. The result is differentiable in
    `params`, `data` and whatever `loss_fn` closes over:

    - `"mixed"`: exact, by forward-over-reverse differentiation of each step (MixFlow-MG, arXiv 2505.00793), of which it
      keeps nothing but the parameters and the rule's state; see `mixed.py`. Cannot itself be differentiated in forward mode.
      Not for a `jax.custom_jvp` of several arguments that is not the true derivative, as those of quantisers; it warns.
    - `"reverse"`: exact, by plain reverse mode through every step. Can itself be differentiated in any mode.
    - `"first_order"`: the inner gradient counts as a constant (first-order MAML).

    Args:
        loss_fn: (params, entry of data) -> scalar loss.
        params: floating-point arrays; shared by all tasks when `adapt` runs under `vmap`.
        data: any pytree with leading axis S, one entry a step.
        rule: a step size, which stands for gradient descent, or any Optax transformation.
        differentiation: how to differentiate through the steps.
        unroll_first: take the first step outside the loop over steps, where tasks under `vmap` still share their parameters
            and so one large product. Without `vmap` this gains nothing and takes longer to compile.

    Returns:
        The parameters after the last step, and those before and after each step, every leaf with leading axis [S + 1].

    Raises:
        ValueError: `params` holds other than floating-point leaves, `loss_fn` returns no scalar, entries of `data` are not
            equally many, `rule` is neither of these, or `differentiation` is unknown.

    >>> final, path = adapt(lambda p, d: (p - d) ** 2, jnp.float32(0.0), jnp.ones(2), optax.sgd(0.25))
    >>> path.tolist()
    [0.0, 0.5, 0.75]
    """
    check_params(params)
    rule = as_rule(rule)
    gradient = _inner_gradient(returning_scalar(loss_fn), differentiation)

    def step(carry: tuple, entry: PyTree) -> tuple[tuple, PyTree]:
        params, opt = carry
        updates, opt = rule.update(gradient(params, entry), opt, params)
        params = optax.apply_updates(params, updates)
        return (params, opt), params

    path = [_with_axis(params)]
    carry = (params, rule.init(params))
    num_steps = num_entries(data)
    # The carry of a scan has a task axis from the start under `vmap`. (And a lone step needs no scan.)
    first_apart = num_steps == 1 or (num_steps > 1 and unroll_first)
    if first_apart:
        carry, stepped = step(carry, jax.tree.map(lambda leaf: leaf[0], data))
        path.append(_with_axis(stepped))
        data = jax.tree.map(lambda leaf: leaf[1:], data)
    if num_steps > int(first_apart):
        carry, stepped = lax.scan(step, carry, data)
        path.append(stepped)
    return carry[0], jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *path)


def _inner_gradient(loss_fn: Callable, differentiation: Differentiation) -> Callable:
    """The gradient of `loss_fn` in its first argument, with the derivative that `differentiation` asks for."""
    check_choice("differentiation", differentiation, Differentiation)
    gradient = jax.grad(loss_fn)
    if differentiation == "mixed":
        return mixed_mode_gradient(loss_fn)
    if differentiation == "reverse":
        return gradient
    return lambda params, entry: lax.stop_gradient(gradient(params, entry))


def _with_axis(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], params)
