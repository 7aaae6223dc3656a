"""The navigation environment step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamljax.rl.environment import Environment, Step
from mamljax.rl.navigation import navigation
from mamljax.rl.wrappers import with_task_observed

KEY = jax.random.key(0)
GOAL = jnp.array([0.15, -0.1])


def walk(env, actions, goal=GOAL):
    state, observation = env.reset(KEY, goal)
    steps = []
    for action in actions:
        steps.append(env.step(KEY, state, jnp.array(action), goal))
        state = steps[-1].state
    return observation, steps


def test_moves_by_a_tenth_of_the_action_clipped():
    observation, steps = walk(navigation(), [[0.5, -0.25], [3.0, -7.0]])
    np.testing.assert_array_equal(observation, [0.0, 0.0])
    np.testing.assert_allclose(steps[0].observation, [0.05, -0.025], rtol=1e-6)
    np.testing.assert_allclose(steps[1].observation, [0.15, -0.125], rtol=1e-6)


@pytest.mark.parametrize(("reward", "power"), [("distance", 1), ("squared", 2)])
def test_reward_is_minus_the_distance_from_the_new_position(reward, power):
    _, (step,) = walk(navigation(reward=reward), [[-1.0, 1.0]])
    np.testing.assert_allclose(step.reward, -(np.hypot(-0.25, 0.2) ** power), rtol=1e-6)


def test_ends_near_the_goal_in_both_coordinates():
    _, steps = walk(navigation(), [[1.0, -0.95], [0.45, 0.0], [0.2, -0.2]])
    assert [bool(step.done) for step in steps] == [False, True, False]  # off by (0.05, 0.005), (0.005, 0.005), (0.025, 0.015)


def test_goals_fill_the_square():
    goals = jax.vmap(navigation().sample_task)(jax.random.split(KEY, 4_000))
    assert goals.shape == (4_000, 2)
    assert (jnp.abs(goals) <= 0.5).all()
    assert (jnp.abs(goals.mean(0)) < 5 / jnp.sqrt(12 * 4_000)).all()
    assert (jnp.abs(goals).max(0) > 0.49).all()


def test_the_oracle_sees_the_goal():
    env = with_task_observed(navigation())
    assert (env.observation_size, env.action_size) == (4, 2)
    observation, (step,) = walk(env, [[1.0, 0.5]])
    np.testing.assert_allclose(observation, [0.0, 0.0, *GOAL], rtol=1e-6)
    np.testing.assert_allclose(step.observation, [0.1, 0.05, *GOAL], rtol=1e-6)
    np.testing.assert_allclose(step.state, [0.1, 0.05], rtol=1e-6)


def test_the_oracle_of_whole_numbers_sees_fractions_of_the_task():
    """An environment of cells has integers for observations; its task may still be a fraction."""

    def reset(key, task):
        return jnp.int32(0), jnp.zeros(1, jnp.int32)

    def step(key, state, action, task):
        return Step(state, jnp.ones(1, jnp.int32), jnp.float32(0), jnp.array(False))

    env = with_task_observed(Environment(jax.random.uniform, reset, step, observation_size=1, action_size=1))
    np.testing.assert_allclose(env.reset(GOAL, jnp.float32(-0.9))[1], [0, -0.9])
    np.testing.assert_allclose(env.step(GOAL, jnp.int32(0), jnp.zeros(1), jnp.float32(0.3)).observation, [1, 0.3])


def test_an_unknown_reward():
    with pytest.raises(ValueError, match="reward must be one of .*'distance', 'squared'.*, got 'sparse'"):
        navigation(reward="sparse")
