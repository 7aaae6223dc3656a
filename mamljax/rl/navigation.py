"""2D navigation: move a point to a goal that is not seen (Finn et al. 2017, section 5.3)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from mamljax.checks import check_choice
from mamljax.rl.environment import Environment, Step

GOALS = (-0.5, 0.5)  # of each coordinate
SPEED = 0.1  # of each coordinate, by step
NEAR = 0.01  # in each coordinate

Reward = Literal["distance", "squared"]


def navigation(*, reward: Reward = "distance") -> Environment:
    """Build the environment of the navigation experiment.

    A task is a goal [2] in the square from -0.5 to 0.5. A trajectory begins at the origin, and ends within 0.01 of the goal in
    both coordinates. The observation [2] is the position, the action [2] the velocity: 1 stands for 0.1 a step, and more is
    clipped.

    Args:
        reward: minus the "distance" to the goal, as in the authors' code, or minus the "squared" distance, as in the paper.

    Raises:
        ValueError: an unknown reward.

    >>> env = navigation()
    >>> state, observation = env.reset(jax.random.key(0), jnp.array([0.3, 0.4]))
    >>> step = env.step(jax.random.key(1), state, jnp.array([1.0, -7.0]), jnp.array([0.1, 0.1]))
    >>> [round(float(value), 3) for value in (*step.observation, step.reward)], bool(step.done)
    ([0.1, -0.1, -0.2], False)
    """
    check_choice("reward", reward, Reward)

    def sample_task(key: Array) -> Array:
        return jax.random.uniform(key, (2,), minval=GOALS[0], maxval=GOALS[1])

    def reset(key: Array, goal: Array) -> tuple[Array, Array]:
        origin = jnp.zeros_like(goal)
        return origin, origin

    def step(key: Array, position: Array, action: Array, goal: Array) -> Step:
        position = position + SPEED * jnp.clip(action, -1, 1)
        offset = position - goal
        squared = jnp.sum(offset**2)
        cost = squared if reward == "squared" else jnp.sqrt(squared)
        return Step(position, position, -cost, jnp.all(jnp.abs(offset) < NEAR))

    return Environment(sample_task, reset, step, observation_size=2, action_size=2)
