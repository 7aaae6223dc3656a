"""Trajectories: a policy acts in an environment, many times side by side."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from mamljax.distributions import Categorical, Distribution, Gaussian
from mamljax.rl.environment import Environment
from mamljax.types import Model, PyTree


class Trajectories(NamedTuple):
    """What a policy saw, did and received in one task: E rows of T steps, each of one trajectory after the other.

    A step whose mask is 0 does not count: the state was not finite any more, or its trajectory had no time left to end.
    """

    observations: Array  # [T, E, o] before each action
    actions: Array  # [T, E, a], or of a choice [T, E] int32
    rewards: Array  # [T, E], 0 where masked
    mask: Array  # [T, E] 1 for a step of a trajectory that ended
    ends: Array  # [T, E] 1 for the last step of a trajectory
    time: Array  # [T, E] steps since the trajectory's first
    policy: Distribution  # from which the actions were drawn, every leaf [T, E, ...]
    unstable: Array  # [T, E] 1 where a trajectory ended because the next state was not finite

    @property
    def first(self) -> Array:
        """Which steps are of the first trajectory of their row, [T, E] bool."""
        return jnp.cumsum(self.ends, axis=0) - self.ends == 0


def rollout(
    key: Array, params: PyTree, task: PyTree, *, model: Model, env: Environment, horizon: int, trajectories: int
) -> Trajectories:
    """Let a policy act in E copies of one task, for T steps each.

    A trajectory ends after T steps, with the step that the environment calls `done`, or, as `unstable`, before a step whose
    state, observation or reward is not finite. Where it ends early the next one begins, in one of the E first states, so that
    there are about as many steps to learn from as in the authors' code, whatever the policy. Steps of a trajectory still under
    way at the end are masked; the authors leave such trajectories out, too. This favours short trajectories; `first` marks
    each row's first one, which is free of that bias.

    Args:
        key: a JAX random key.
        params: of the policy.
        task: of the environment.
        model: the policy, as of `collect.collect_with`.
        env: the environment; `env.step` is mapped over trajectories, and by the caller over tasks.
        horizon: T, steps of the longest trajectory.
        trajectories: E.
    """

    def step(carry: tuple, noise_and_keys: tuple) -> tuple[tuple, Trajectories]:
        state, observation, seen_well, time, count = carry
        noise, keys = noise_and_keys
        policy = distribution_of(model, params, observation)
        action = policy.from_noise(noise)
        outcome = jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, state, action, task)
        # A step counts if what the policy saw was finite, and what came of its action is.
        taken = seen_well & _finite((outcome.state, outcome.observation, outcome.reward))
        ends = outcome.done | ~taken | (time + 1 == horizon)
        count += ends
        # The k-th further trajectory of row e begins like the first of row e + k: so that the loop needs no `reset`.
        another = jax.tree.map(lambda leaf: leaf[(jnp.arange(trajectories) + count) % trajectories], first)
        following = _where(ends, another, (outcome.state, outcome.observation, taken))
        reward = jnp.where(taken, outcome.reward, 0).astype(policy[0].dtype)
        seen = Trajectories(observation, action, reward, taken, ends, time, policy, ~taken)  # the mask is completed below
        return (*following, jnp.where(ends, 0, time + 1), count), seen

    reset_key, noise_key, step_key = jax.random.split(key, 3)
    kind = Categorical if env.discrete_actions else Gaussian
    noise = kind.noise(noise_key, (horizon, trajectories, env.action_size))
    keys = jax.random.split(step_key, (horizon, trajectories))
    state, observation = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(reset_key, trajectories), task)
    finite = jnp.isfinite(observation)
    first = state, jnp.where(finite, observation, 0), finite.all(axis=1)  # where it is not, the first step is masked
    nothing = jnp.zeros(trajectories, int)
    seen = lax.scan(step, (*first, nothing, nothing), (noise, keys))[1]
    # A running maximum from behind: 1 up to the last end of each row. What comes later is of a trajectory that was cut off.
    mask = seen.mask & lax.cummax(seen.ends.astype(int), axis=0, reverse=True).astype(bool)
    flags = (mask, seen.ends, seen.time, seen.unstable)
    mask, ends, time, unstable = (flag.astype(seen.rewards.dtype) for flag in flags)
    return seen._replace(rewards=mask * seen.rewards, mask=mask, ends=ends, time=time, unstable=unstable)


def distribution_of(model: Model, params: PyTree, observations: Array) -> Distribution:
    """What a policy does in the states of observations [n, o], every leaf [n, ...]."""
    # Times and returns of long trajectories need more than half precision has, and get the dtype of the policy.
    full = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), model.apply(params, observations))
    if isinstance(full, Categorical):
        return Categorical(jnp.maximum(full.logits, -1e9))  # -inf has no finite divergences
    mean, log_std = full
    return Gaussian(mean, jnp.broadcast_to(log_std, mean.shape))


def _finite(tree: PyTree) -> Array:
    """Whether all numbers of each entry of the leading axis are finite, as whole numbers always are: [E] bool."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return jnp.stack([jnp.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in leaves]).all(axis=0)


def _where(condition: Array, new: PyTree, old: PyTree) -> PyTree:
    """Choose between trees, for each entry of the leading axis."""

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(condition.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, new, old)
