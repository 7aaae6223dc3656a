"""Rollouts of policies that are known in an environment that is known, and what is made of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamljax.models import gaussian_policy, mlp
from mamljax.rl import advantages
from mamljax.rl.collect import collector
from mamljax.rl.environment import Environment, Step
from mamljax.rl.navigation import navigation
from mamljax.types import Model

KEY = jax.random.key(0)
HORIZON, TRAJECTORIES = 6, 4


def counter_env(**changes):
    """Counts steps from a start of its own, 0 to 3; the reward is the count; ends at the task, breaks down at 100."""

    def reset(key, task):
        start = jax.random.randint(key, (), 0, 4).astype(jnp.float32)
        return start, start[None]

    def step(key, state, action, task):
        state = state + 1
        observation = jnp.where(state == task["breaks"], jnp.nan, state)[None]
        return Step(state, observation, state, state == task["ends"])

    def sample_task(key):
        return {"ends": jnp.float32(100.0), "breaks": jnp.float32(100.0)}

    return Environment(sample_task, reset, step, observation_size=1, action_size=2)._replace(**changes)


def constant_policy(value):
    """Acts by its parameter, whatever it sees, with hardly any noise; its log-std has the shape of the mean."""

    def apply(params, x):
        mean = jnp.broadcast_to(params, (*x.shape[:-1], 2))
        return mean, jnp.full_like(mean, -20.0)

    return Model(lambda key: jnp.full((1,), value), apply)


@functools.cache
def compiled(discount=0.9):
    model = constant_policy(1.0)
    collect = collector(model, counter_env(), horizon=HORIZON, trajectories=TRAJECTORIES, discount=discount)
    return jax.jit(collect)


def batch_of(ends=100.0, breaks=100.0, params=1.0):
    return compiled()(KEY, jnp.full((1,), params), {"ends": jnp.float32(ends), "breaks": jnp.float32(breaks)})


def test_a_trajectory_of_known_states():
    batch = batch_of()
    data = batch.trajectories
    starts = np.asarray(data.observations[0, :, 0])
    assert len(set(starts)) > 1  # every trajectory has a key of its own
    states = starts + np.arange(HORIZON)[:, None]
    np.testing.assert_array_equal(data.observations[..., 0], states)
    np.testing.assert_array_equal(data.rewards, states + 1)
    np.testing.assert_array_equal(data.mask, 1)
    np.testing.assert_allclose(data.actions, 1.0, atol=1e-6)
    np.testing.assert_array_equal(batch.returns, (states + 1).sum(0))
    assert not data.unstable.any()


def test_the_step_that_is_done_is_the_last_one():
    batch = batch_of(ends=4.0)
    data = batch.trajectories
    lengths = 4 - np.asarray(data.observations[0, :, 0])
    np.testing.assert_array_equal(data.mask.sum(0), lengths)
    np.testing.assert_array_equal(data.mask, np.arange(HORIZON)[:, None] < lengths)
    by_hand = [sum(range(5 - int(length), 5)) for length in lengths]
    np.testing.assert_array_equal(batch.returns, by_hand)
    assert (batch.advantages * (1 - data.mask) == 0).all()
    assert not data.unstable.any()


def test_what_is_not_finite_ends_the_trajectory_before_it_and_is_counted():
    batch = batch_of(breaks=4.0)
    data = batch.trajectories
    np.testing.assert_array_equal(data.mask.sum(0), 3 - data.observations[0, :, 0])
    assert data.unstable.all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((data.observations, data.rewards, batch.advantages)))
    assert jnp.isfinite(batch.returns).all()


def test_some_may_break_down_while_the_others_go_on():
    unstable = batch_of(ends=4.0, breaks=3.0).trajectories.unstable
    starts = batch_of().trajectories.observations[0, :, 0]
    np.testing.assert_array_equal(unstable, starts < 3)


def test_a_policy_that_is_not_finite_has_no_return():
    assert jnp.isnan(batch_of(params=jnp.nan).returns).all()


def test_advantages_are_those_of_their_parts():
    batch = batch_of(ends=5.0)
    data = batch.trajectories
    returns = advantages.discounted_sums(data.rewards, data.mask, 0.9)
    values = advantages.linear_baseline(data.observations, returns, data.mask)
    expected = advantages.standardise(returns - values, data.mask)
    np.testing.assert_allclose(batch.advantages, expected, atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 0}, "horizon must be a whole number of at least 1, got 0"),
        ({"trajectories": -1}, "trajectories must be a whole number of at least 1, got -1"),
        ({"discount": 1.1}, r"discount must lie in \[0, 1\], got 1.1"),
        ({"gae_lambda": float("nan")}, r"gae_lambda must lie in \[0, 1\], got nan"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        collector(constant_policy(1.0), counter_env(), **{"horizon": 5, "trajectories": 2} | settings)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (gaussian_policy(3, 2), "the policy does not fit the environment, with observations of size 2 and actions of size 2"),
        (gaussian_policy(2, 1), "for one observation it gives a mean of shape"),
        (mlp(2, (4,), 2), "a policy must return the mean and the log-std of actions"),
    ],
    ids=["observations", "actions", "no policy"],
)
def test_a_policy_that_does_not_fit(model, message):
    with pytest.raises(ValueError, match=message):
        collector(model, navigation(), horizon=5, trajectories=2)


def broken_step(**changes):
    step = counter_env().step
    return lambda *arguments: step(*arguments)._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observation_size": 2}, r"the observation of reset must have shape \(2,\)"),
        ({"step": broken_step(observation=jnp.zeros(3))}, r"the observation of step must have shape \(1,\)"),
        ({"step": broken_step(reward=jnp.zeros(1))}, r"the reward of step must have shape \(\)"),
        ({"step": broken_step(done=jnp.float32(0))}, "done of step must be a bool, got float32"),
        ({"step": broken_step(state=jnp.zeros(2))}, "step must keep the shapes and dtypes of the state"),
        ({"action_size": 0}, "action_size must be a whole number of at least 1"),
    ],
    ids=["observation of reset", "observation", "reward", "done", "state", "action size"],
)
def test_an_environment_that_does_not_keep_its_word(changes, message):
    with pytest.raises(ValueError, match=message):
        collector(constant_policy(1.0), counter_env(**changes), horizon=5, trajectories=2)
