"""Environments for the oracle, which is told the task."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from mamljax.rl.environment import Environment, Step
from mamljax.types import PyTree


def with_task_observed(env: Environment) -> Environment:
    """Append the numbers of the task to every observation, [o] -> [o + numbers of the task], of the dtype that holds both.

    >>> from mamljax.rl.navigation import navigation
    >>> with_task_observed(navigation()).observation_size
    4
    """

    def observe(observation: Array, task: PyTree) -> Array:
        return jnp.concatenate([observation, ravel_pytree(task)[0]])

    def reset(key: Array, task: PyTree) -> tuple[PyTree, Array]:
        state, observation = env.reset(key, task)
        return state, observe(observation, task)

    def step(key: Array, state: PyTree, action: Array, task: PyTree) -> Step:
        outcome = env.step(key, state, action, task)
        return outcome._replace(observation=observe(outcome.observation, task))

    numbers = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(env.sample_task, jax.random.key(0))))
    return env._replace(reset=reset, step=step, observation_size=env.observation_size + numbers)
