"""How much better an action was than expected: returns, the linear baseline, generalised advantage estimation.

All arrays are time first, [T, E], of one trajectory after the other; `ends` is 1 for the last step of a trajectory, and `mask`
is 0 for steps that do not count, as in `rollout.Trajectories`.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import sequential_vmap
from jax.scipy.linalg import solve_triangular


def discounted_sums(values: Array, ends: Array, discount: float) -> Array:
    r"""Sum what is still to come at each step: $\sum_{l \ge 0} \gamma^l v_{t+l}$ up to the end of the trajectory, [T, E].

    >>> discounted_sums(jnp.array([[1.0], [2.0], [4.0]]), jnp.array([[0.0], [1.0], [1.0]]), 0.5)[:, 0].tolist()
    [2.0, 2.0, 4.0]
    """

    def add(later: Array, step: tuple) -> tuple[Array, Array]:
        value, ends = step
        total = value + discount * (1 - ends) * later
        return total, total

    return lax.scan(add, jnp.zeros(values.shape[1:], values.dtype), (values, ends), reverse=True)[1]


def features(observations: Array, time: Array) -> Array:
    """The features of the linear baseline (Duan et al. 2016, arXiv 1604.06778, appendix): [T, E, o] -> [T, E, 2 o + 4].

    They are the observation, clipped to [-10, 10]; its square; time in hundreds of steps, its square and its cube; and 1.
    """
    # As floats first: -10 would wrap around in bytes, and squares overflow.
    observations = observations.astype(jnp.promote_types(observations.dtype, jnp.float32))
    clipped, time = jnp.clip(observations, -10, 10), time / 100
    powers = jnp.stack([time, time**2, time**3, jnp.ones_like(time)], axis=-1)
    return jnp.concatenate([clipped, clipped**2, powers], axis=-1)


def linear_baseline(observations: Array, time: Array, returns: Array, mask: Array, *, ridge: float = 1e-5) -> Array:
    r"""Fit the returns of a batch by a linear function of its features, and return the fitted values, [T, E].

    $w = \arg\min \sum_{t, e} m_{te} (R_{te} - w^T \phi_{te})^2 + \lambda |w|^2$.

    Args:
        observations: [T, E, o].
        time: [T, E] steps since the beginning of the trajectory.
        returns: [T, E] what is to be predicted.
        mask: [T, E].
        ridge: lambda; 1e-5 in the authors' code.
    """
    phi = features(observations, time)
    # Rows of zeros, for steps that do not count, make no difference to the fit.
    design = (phi * mask[..., None]).reshape(-1, phi.shape[-1])
    weights = _ridge_regression(design, (returns * mask).reshape(-1), jnp.sqrt(ridge))
    # In float32 whatever the default is, which on accelerators is less.
    return jnp.matmul(phi, weights, precision="float32") * mask


# One task after the other: LAPACK divides a batch among the threads of a pool, and waits for them. On a CPU with as many
# simulated devices as threads, all of which get there at once, none would be left to do the work.
@sequential_vmap
def _ridge_regression(design: Array, targets: Array, root: Array) -> Array:
    """The weights [f] that fit targets [n] by the rows of design [n, f], with the square root of the ridge."""
    # By QR of the matrix with the ridge as further rows: the normal equations of powers of time are too much for float32.
    q, r = jnp.linalg.qr(jnp.concatenate([design, root * jnp.eye(design.shape[1], dtype=design.dtype)]))
    return solve_triangular(r, jnp.matmul(q[: len(design)].T, targets, precision="float32"))


def generalised_advantages(rewards: Array, values: Array, ends: Array, *, discount: float, gae_lambda: float) -> Array:
    r"""Estimate advantages (Schulman et al. 2015, arXiv 1506.02438, equation 16), [T, E].

    $A_t = \sum_{l \ge 0} (\gamma\lambda)^l \delta_{t+l}$ with $\delta_t = r_t + \gamma V_{t+1} - V_t$. The value after the last
    step is 0, whatever ended the trajectory, as in the authors' code.

    Args:
        rewards: [T, E], 0 where masked.
        values: [T, E] the baseline V, 0 where masked.
        ends: [T, E].
        discount: gamma, in [0, 1].
        gae_lambda: lambda in [0, 1]; with 1 the advantage is the return less the baseline.
    """
    next_values = jnp.concatenate([values[1:], jnp.zeros_like(values[:1])]) * (1 - ends)
    return discounted_sums(rewards + discount * next_values - values, ends, discount * gae_lambda)


def masked_mean(values: Array, mask: Array) -> Array:
    """The mean over the steps that count, []; 0 if there are none."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def standardise(advantages: Array, mask: Array) -> tuple[Array, Array]:
    """Shift and scale to mean 0 and standard deviation 1 over the steps that count, [T, E]; and the deviation before, []."""
    centred = (advantages - masked_mean(advantages, mask)) * mask
    spread = jnp.sqrt(masked_mean(centred**2, mask))
    return centred / (spread + 1e-8), spread
