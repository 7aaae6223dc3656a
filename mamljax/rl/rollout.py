"""Trajectories: a policy acts in an environment, many times side by side."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from mamljax.rl import gaussian
from mamljax.rl.environment import Environment
from mamljax.types import Model, PyTree


class Trajectories(NamedTuple):
    """What a policy saw, did and received in one task. What lies after the end of a trajectory is masked, and meaningless."""

    observations: Array  # [T, E, o] before each action
    actions: Array  # [T, E, a]
    rewards: Array  # [T, E]
    mask: Array  # [T, E] 1 for a step that was taken, 0 after the end
    mean: Array  # [T, E, a] of the policy's distribution
    log_std: Array  # [T, E, a]
    unstable: Array  # [E] bool: ended because the environment's next state was not finite


def rollout(
    key: Array, params: PyTree, task: PyTree, *, model: Model, env: Environment, horizon: int, trajectories: int
) -> Trajectories:
    """Let a policy act in E copies of one task.

    A trajectory ends after `horizon` steps, with the step that the environment calls `done`, or before a step whose state,
    observation or reward is not finite. Its environment then stands still, while the others go on.

    Args:
        key: a JAX random key.
        params: of the policy.
        task: of the environment.
        model: the policy: (params, observations [E, o]) -> mean [E, a] and log-std, [E, a] or [a].
        env: the environment; `env.step` is mapped over trajectories, and by the caller over tasks.
        horizon: T, steps of the longest trajectory.
        trajectories: E.
    """

    def step(carry: tuple, noise_and_keys: tuple) -> tuple[tuple, Trajectories]:
        state, observation, alive, unstable = carry
        noise, keys = noise_and_keys
        mean, log_std = model.apply(params, observation)
        action = gaussian.from_noise(noise, mean, log_std)
        outcome = jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, state, action, task)
        finite = _finite((outcome.state, outcome.observation, outcome.reward))
        taken, goes_on = alive & finite, alive & finite & ~outcome.done
        state, next_observation = _where(goes_on, (outcome.state, outcome.observation), (state, observation))
        unstable |= alive & ~finite
        reward, mask = jnp.where(taken, outcome.reward, 0), taken.astype(mean.dtype)
        seen = Trajectories(observation, action, reward, mask, mean, jnp.broadcast_to(log_std, mean.shape), unstable)
        return (state, next_observation, goes_on, unstable), seen

    reset_key, noise_key, step_key = jax.random.split(key, 3)
    noise = jax.random.normal(noise_key, (horizon, trajectories, env.action_size))
    keys = jax.random.split(step_key, (horizon, trajectories))
    state, observation = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(reset_key, trajectories), task)
    finite = _finite((state, observation))
    start = state, jnp.where(jnp.expand_dims(finite, 1), observation, 0), finite, ~finite
    seen = lax.scan(step, start, (noise, keys))[1]
    return seen._replace(unstable=seen.unstable[-1])


def _finite(tree: PyTree) -> Array:
    """Whether all numbers of each entry of the leading axis are finite: [E] bool."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in leaves]).all(axis=0)


def _where(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    """Choose between trees, for each entry of the leading axis."""

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(condition.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, new, old)
