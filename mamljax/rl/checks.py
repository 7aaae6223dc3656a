"""Checks of environments and policies, each with one error that says what was given and what was expected."""

import jax
import jax.numpy as jnp

from mamljax.checks import check_count
from mamljax.distributions import Categorical
from mamljax.rl.environment import Environment, Step
from mamljax.types import Model


def check_environment(env: Environment) -> None:
    """Raise `ValueError` unless the shapes of what an environment returns are those that it promises."""
    check_count("observation_size", env.observation_size)
    check_count("action_size", env.action_size)
    key = jax.eval_shape(jax.random.key, 0)
    task = jax.eval_shape(env.sample_task, key)
    state, observation = jax.eval_shape(env.reset, key, task)
    discrete = jax.ShapeDtypeStruct((), jnp.int32)
    action = discrete if env.discrete_actions else jax.ShapeDtypeStruct((env.action_size,), jnp.float32)
    outcome = jax.eval_shape(env.step, key, state, action, task)
    if not isinstance(outcome, Step):
        raise ValueError(f"step must return Step(state, observation, reward, done), got {type(outcome).__name__}.")
    size = (env.observation_size,)
    if not hasattr(observation, "shape"):
        raise ValueError(
            f"observations must be one array {list(size)}, got {type(observation).__name__}. Concatenate the parts."
        )
    for name, found, expected in (
        ("the observation of reset", observation, size),
        ("the observation of step", outcome.observation, size),
        ("the reward of step", outcome.reward, ()),
        ("done of step", outcome.done, ()),
    ):
        if found.shape != expected:
            raise ValueError(f"{name} must have shape {expected} as the environment has it, got {found.shape}.")
    if outcome.done.dtype != bool:
        raise ValueError(f"done of step must be a bool, got {outcome.done.dtype}. Compare, or use jnp.array(False).")
    if outcome.observation.dtype != observation.dtype:
        raise ValueError(
            f"reset and step must return observations of one dtype, got {observation.dtype} and {outcome.observation.dtype}."
        )
    before, after = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, outcome.state))
    if before != after:
        raise ValueError(f"step must keep the shapes and dtypes of the state: it got {before} and returned {after}.")


def check_policy(model: Model, env: Environment) -> None:
    """Raise `ValueError` unless a model is a policy for an environment: observations in, a distribution of actions out."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    observations = jax.ShapeDtypeStruct((1, env.observation_size), jnp.float32)
    expected = f"observations of size {env.observation_size} and actions of size {env.action_size}"
    try:
        outputs = jax.eval_shape(model.apply, params, observations)
    except Exception as error:  # each library of networks has its own
        raise ValueError(f"the policy does not fit the environment, with {expected}: {error}") from error
    if env.discrete_actions:
        if not isinstance(outputs, Categorical):
            raise ValueError("the policy of discrete actions must return Categorical(logits), as categorical_policy(...) does.")
        if outputs.logits.shape != (1, env.action_size):
            raise ValueError(
                f"the policy does not fit the environment, with {expected}: for one observation it gives logits of shape "
                f"{outputs.logits.shape}."
            )
        return
    if not (isinstance(outputs, tuple) and len(outputs) == 2):
        raise ValueError(
            "a policy must return the mean and the log-std of actions, such as gaussian_policy(...) does. Where actions are a "
            "choice, say so in the environment: discrete_actions=True."
        )
    mean, log_std = outputs
    if mean.shape != (1, env.action_size) or log_std.shape not in (mean.shape, mean.shape[1:]):
        raise ValueError(
            f"the policy does not fit the environment, with {expected}: for one observation it gives a mean of shape "
            f"{mean.shape} and a log-std of shape {log_std.shape}."
        )
