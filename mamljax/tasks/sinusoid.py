"""Sinusoid regression (Finn et al. 2017, section 5.1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from mamljax.checks import check_count
from mamljax.types import Examples, Task

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, float(jnp.pi))  # radians
INPUT = (-5.0, 5.0)


def sinusoid(
    *, shots: int, queries: int, support_range: tuple[float, float] = INPUT, reveal: bool = False
) -> Callable[[Array], Task]:
    """Build the sampler of $y = A \\sin(x - \\varphi)$ with A ~ U[0.1, 5], phase ~ U[0, pi] and x ~ U[-5, 5].

    Args:
        shots: K support points.
        queries: query points.
        support_range: the interval from which the inputs of the support set come; part of it for figure 2 of the paper.
        reveal: make x the triple (x, A, phase), as the oracle sees it.

    Returns:
        key -> Task with x [n, 1] (or [n, 3]) and y [n, 1], float32. The same key gives the same curve whatever the arguments.

    Raises:
        ValueError: a count below 1.

    >>> sinusoid(shots=5, queries=10)(jax.random.key(0)).query.y.shape
    (10, 1)
    """
    check_count("shots", shots)
    check_count("queries", queries)

    def sample(key: Array) -> Task:
        curve_key, points_key = jax.random.split(key)
        low, high = (jnp.array(bounds) for bounds in zip(AMPLITUDE, PHASE, strict=True))
        amplitude, phase = jax.random.uniform(curve_key, (2,), minval=low, maxval=high)
        points = jax.random.uniform(points_key, (shots + queries, 1))

        def examples(points: Array, interval: tuple[float, float]) -> Examples:
            x = interval[0] + (interval[1] - interval[0]) * points
            y = amplitude * jnp.sin(x - phase)
            revealed = [jnp.full_like(x, amplitude), jnp.full_like(x, phase)] if reveal else []
            return Examples(jnp.concatenate([x, *revealed], axis=1), y)

        return Task(examples(points[:shots], support_range), examples(points[shots:], INPUT))

    return sample
