"""An environment that asks for a number, and a policy for it; the tests of reinforcement learning share them."""

import jax
import jax.numpy as jnp

from mamljax.rl.collect import collect_with
from mamljax.rl.environment import Environment, Step
from mamljax.types import Model


def target_env(done=lambda action: jnp.array(False)):
    """Say the number that the task is, 1 or -1: the reward is minus the squared error, so that saying 0 gets -1 a step."""

    def reset(key, task):
        return jnp.zeros(()), jnp.ones(1)

    def step(key, state, action, task):
        return Step(state, jnp.ones(1), -((action[0] - task) ** 2), done(action))

    return Environment(lambda key: jax.random.rademacher(key, (), jnp.float32), reset, step, observation_size=1, action_size=1)


def smooth_policy(inputs):
    """A policy of a user's own: one tanh layer, with log-std as a parameter."""

    def init(key):
        first, second = jax.random.split(key)
        kernels = {"first": jax.random.normal(first, (inputs, 4)), "second": 0.1 * jax.random.normal(second, (4, 1))}
        return {**kernels, "log_std": jnp.full((1,), -0.5, jnp.float32)}

    return Model(init, lambda params, x: (jnp.tanh(x @ params["first"]) @ params["second"], params["log_std"]))


MODEL = smooth_policy(1)
COLLECTOR = collect_with(MODEL, target_env(), horizon=3, trajectories=10)


def tasks_from(seed, num_tasks=6):
    return jax.vmap(target_env().sample_task)(jax.random.split(jax.random.key(seed), num_tasks))
