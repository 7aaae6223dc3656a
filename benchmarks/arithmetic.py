"""How much arithmetic a program states, and how fast this machine does arithmetic of the same kind.

XLA's own count, `compiled.cost_analysis()`, takes the body of a loop once however often it runs, which makes 50 inner steps as
cheap as two. So the products are counted in the program as JAX states it, the bodies of loops as often as they run, and what
no output depends on not at all. The compiler may yet merge two that are equal, or drop a product with zeros.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr


class Product(NamedTuple):
    """A batch of matrix products, [batch, rows, inner] x [batch, inner, columns]."""

    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * math.prod(self)


def products(fn: Callable, *args: Any) -> Counter[Product]:
    """Count the products that a call of `fn` states; a convolution counts as the product of its patches.

    Raises:
        ValueError: there are products in a loop whose length is not known beforehand.
    """
    closed = jax.make_jaxpr(fn)(*args)
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _products_of(jaxpr)


def flops(counted: Mapping[Product, int]) -> int:
    """The arithmetic of counted products."""
    return sum(times * product.flops for product, times in counted.items())


def product_rate(counted: Mapping[Product, int], repeats: int, *, share: float = 0.95) -> float:
    """Measure the rate of `jnp.matmul`, in FLOP/s, on the very sizes of a program in their proportions.

    Args:
        counted: the products of the program.
        repeats: measurements of each size, of which the median counts.
        share: of the arithmetic at least this part is measured, the largest products first.
    """
    seconds, done, total = 0.0, 0, flops(counted)
    for product, times in sorted(counted.items(), key=lambda item: -item[1] * item[0].flops):
        seconds += times * _product_seconds(product, repeats)
        done += times * product.flops
        if done >= share * total:
            break
    return done / seconds


def _product_seconds(product: Product, repeats: int, *, enough: float = 1e10, at_most: int = 100_000) -> float:
    """Time of one product: of a compiled loop of as many as make `enough` FLOP, of `at_most` if those are more."""
    count = min(1 + int(enough / product.flops), at_most)
    left_key, right_key = jax.random.split(jax.random.key(0))
    left = jax.random.normal(left_key, (product.batch, product.rows, product.inner))
    right = jax.random.normal(right_key, (product.batch, product.inner, product.columns))

    @jax.jit
    def run(left: Array, right: Array) -> Array:
        def again(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            right, before = carry
            # A real dependence on the round before, of one number: else the compiler would multiply once, before the loop.
            right = right.at[0, 0, 0].add(1e-30 * before[0, 0, 0])
            return right, left @ right

        return lax.fori_loop(0, count, again, (right, jnp.zeros((product.batch, product.rows, product.columns))))[1]

    return harness.medians({"": lambda: run(left, right)}, repeats)[""] / 1e3 / count


def _products_of(jaxpr: Jaxpr) -> Counter[Product]:
    counted = Counter()
    for equation in jaxpr.eqns:
        name, inside = equation.primitive.name, [_products_of(part) for part in _parts(equation.params)]
        if name == "dot_general":
            inside = [Counter([_of_dot(equation)])]
        elif name == "conv_general_dilated":
            inside = [Counter([_of_convolution(equation)])]
        elif name == "cond":  # one branch runs; the dearest counts
            inside = [max(inside, key=flops)]
        elif name == "while" and any(inside):
            raise ValueError("a loop of unknown length holds products, which cannot be counted. Fix its number of rounds.")
        times = equation.params["length"] if name == "scan" else 1
        for part in inside:
            counted.update({product: times * count for product, count in part.items()})
    return counted


def _parts(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """The programs inside an equation: the body of a loop, the branches of a condition, a compiled function."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _of_dot(equation: Any) -> Product:
    (contracted, _), (batched, _) = equation.params["dimension_numbers"]
    left, right = (variable.aval for variable in equation.invars)
    batch = math.prod(left.shape[axis] for axis in batched)
    inner = math.prod(left.shape[axis] for axis in contracted)
    return Product(batch, left.size // (batch * inner), inner, right.size // (batch * inner))


def _of_convolution(equation: Any) -> Product:
    groups = equation.params["feature_group_count"] * equation.params["batch_group_count"]
    kernel_axes = equation.params["dimension_numbers"].rhs_spec
    kernel, out = equation.invars[1].aval, equation.outvars[0].aval
    features = kernel.shape[kernel_axes[0]]
    # Of each group as many rows as outputs of one channel, each the product of a patch with the filters.
    return Product(groups, out.size // features, kernel.size // features, features // groups)
