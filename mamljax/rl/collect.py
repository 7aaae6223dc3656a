"""The data of policy gradients: trajectories, with the advantages of their actions."""

import warnings
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
    advantage_std: Array  # [] their standard deviation before, in units of the return
    first_returns: Array  # [E] undiscounted, of the first trajectory of each row; NaN where unstable, or actions not finite
    mean_return: Array  # [] undiscounted, of all trajectories that ended but the unstable ones; NaN if there is none


class Collector(NamedTuple):
    """A policy, and how it gathers trajectories."""

    policy: Model
    collect: Callable[[Array, PyTree, PyTree], Batch]  # (key, params, task) -> fresh trajectories of one task


def collect_with(
    policy: Model,
    env: Environment,
    *,
    horizon: int,
    trajectories: int,
    discount: float = 0.99,
    gae_lambda: float = 1.0,
) -> Collector:
    """Build the function that lets a policy act in a task and estimates the advantages of its actions.

    Advantages are estimated by GAE with the linear baseline, fitted to the very same trajectories, and standardised. A batch
    must have many more steps than the baseline has features, 2 o + 4, or little but noise is left of them.

    Args:
        policy: (params, observations [..., o]) -> mean [..., a] and log-std, [..., a] or [a], of its actions; for discrete ones
            `distributions.Categorical` logits [..., a], -inf for what is not allowed.
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

    Warns:
        UserWarning: the baseline has as many features as a batch has steps.
    """
    check_counts(horizon=horizon, trajectories=trajectories)
    for name, factor in (("discount", discount), ("gae_lambda", gae_lambda)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {factor}.")
    check_environment(env)
    check_policy(policy, env)
    num_features, num_steps = 2 * env.observation_size + 4, horizon * trajectories
    if num_features >= num_steps:
        warnings.warn(
            f"the linear baseline fits {num_features} features to {num_steps} steps, so that advantages are nothing but noise. "
            "Gather more trajectories, or longer ones.",
            stacklevel=2,
        )

    def collect(key: Array, params: PyTree, task: PyTree) -> Batch:
        data = rollout(key, params, task, model=policy, env=env, horizon=horizon, trajectories=trajectories)
        discounted = discounted_sums(data.rewards, data.ends, discount)
        values = linear_baseline(data.observations, data.time, discounted, data.mask)
        advantages = generalised_advantages(data.rewards, values, data.ends, discount=discount, gae_lambda=gae_lambda)
        # A trajectory that broke the simulation, or whose policy is no longer finite, must not count as a short one: where
        # rewards are costs, it would have the best return of all.
        acts = data.policy[0] if env.discrete_actions else data.actions  # choices are whole numbers whatever the logits
        acted = jnp.isfinite(acts).all(axis=(0, 2))
        stable = acted & ~jnp.any(data.unstable * data.first, axis=0)
        first_returns = jnp.where(stable, jnp.sum(data.rewards * data.first, axis=0), jnp.nan)
        broken = discounted_sums(data.unstable, data.ends, 1.0)  # 1 in all steps of an unstable trajectory
        total, count = jnp.sum(data.rewards * (1 - broken)), jnp.sum(data.ends - data.unstable)
        mean_return = jnp.where(acted.all() & (count > 0), total / jnp.maximum(count, 1), jnp.nan)
        return Batch(data, *standardise(advantages, data.mask), first_returns, mean_return)

    return Collector(policy, collect)
