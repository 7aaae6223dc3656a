"""The data of policy gradients: trajectories, with the advantages of their actions."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from mamljax.checks import check_counts
from mamljax.rl.advantages import discounted_sums, generalised_advantages, linear_baseline, standardise
from mamljax.rl.checks import check_environment, check_policy
from mamljax.rl.environment import Environment
from mamljax.rl.rollout import Trajectories, rollout
from mamljax.types import Model, PyTree


class Batch(NamedTuple):
    """Trajectories of one policy in one task, and what is made of them."""

    trajectories: Trajectories
    advantages: Array  # [T, E] of mean 0 and standard deviation 1
    spread: Array  # [] their standard deviation before, in units of the return
    returns: Array  # [E] undiscounted, of the first trajectory of each row; NaN where the policy's actions were not finite
    mean_return: Array  # [] undiscounted, of all trajectories that ended


class Collector(NamedTuple):
    """A policy, and how it gathers trajectories."""

    policy: Model
    collect: Callable[[Array, PyTree, PyTree], Batch]  # (key, params, task) -> fresh trajectories of one task


def collector(
    policy: Model,
    env: Environment,
    *,
    horizon: int,
    trajectories: int,
    discount: float = 0.99,
    gae_lambda: float = 1.0,
) -> Collector:
    """Build what lets a policy act in a task and judges its actions.

    Advantages are estimated by GAE with the linear baseline, fitted to the very same trajectories, and standardised.

    Args:
        policy: (params, observations [..., o]) -> mean [..., a] and log-std, [..., a] or [a], of its actions.
        env: the environment.
        horizon: T, steps after which a trajectory ends in any case.
        trajectories: E, rows of T steps in each batch, of one trajectory after the other where they end early; 20 in the paper,
            40 for ant direction.
        discount: gamma, by step; 0.99 in the paper.
        gae_lambda: lambda of the advantages; 1 in the paper.

    Returns:
        The policy with a function (key, params, task) -> `Batch`.

    Raises:
        ValueError: a count below 1, a factor outside of [0, 1], an environment or a policy that does not keep its shapes.
    """
    check_counts(horizon=horizon, trajectories=trajectories)
    for name, factor in (("discount", discount), ("gae_lambda", gae_lambda)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {factor}.")
    check_environment(env)
    check_policy(policy, env)

    def collect(key: Array, params: PyTree, task: PyTree) -> Batch:
        data = rollout(key, params, task, model=policy, env=env, horizon=horizon, trajectories=trajectories)
        discounted = discounted_sums(data.rewards, data.ends, discount)
        values = linear_baseline(data.observations, data.time, discounted, data.mask)
        advantages = generalised_advantages(data.rewards, values, data.ends, discount=discount, gae_lambda=gae_lambda)
        # A policy that is no longer finite ends all its trajectories at once, as an environment may that has nothing finite to
        # give. That must not count as a return of 0.
        acted = jnp.isfinite(data.actions).all(axis=(0, 2)) & (data.mask > 0).any()
        returns = jnp.where(acted, jnp.sum(data.rewards * data.first, axis=0), jnp.nan)
        mean_return = jnp.where(acted.all(), jnp.sum(data.rewards) / jnp.sum(data.ends), jnp.nan)
        return Batch(data, *standardise(advantages, data.mask), returns, mean_return)

    return Collector(policy, collect)
