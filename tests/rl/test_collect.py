"""Rollouts of policies that are known in an environment that is known, and what is made of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamljax.models import gaussian_policy, mlp
from mamljax.rl.collect import collect_with
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
def compiled(gae_lambda=1.0):
    model, sizes = constant_policy(1.0), {"horizon": HORIZON, "trajectories": TRAJECTORIES}
    collect = collect_with(model, counter_env(), discount=0.9, gae_lambda=gae_lambda, **sizes).collect
    return jax.jit(collect)


def batch_of(ends=100.0, breaks=100.0, params=1.0, gae_lambda=1.0):
    return compiled(gae_lambda)(KEY, jnp.full((1,), params), {"ends": jnp.float32(ends), "breaks": jnp.float32(breaks)})


def test_a_trajectory_of_known_states():
    batch = batch_of()
    data = batch.trajectories
    starts = np.asarray(data.observations[0, :, 0])
    assert len(set(starts)) > 1  # every trajectory has a key of its own
    states = starts + np.arange(HORIZON)[:, None]
    np.testing.assert_array_equal(data.observations[..., 0], states)
    np.testing.assert_array_equal(data.rewards, states + 1)
    np.testing.assert_array_equal(data.mask, 1)
    np.testing.assert_array_equal(data.ends, np.arange(HORIZON)[:, None] == np.full(TRAJECTORIES, HORIZON - 1))
    np.testing.assert_array_equal(data.time, np.arange(HORIZON)[:, None] + np.zeros(TRAJECTORIES))
    np.testing.assert_allclose(data.actions, 1.0, atol=1e-6)
    np.testing.assert_array_equal(batch.first_returns, (states + 1).sum(0))
    assert not data.unstable.any()


def test_every_step_of_every_row_has_a_key_and_noise_of_its_own():
    def step(key, *rest):
        return counter_env().step(key, *rest)._replace(reward=jax.random.normal(key))

    policy = Model(lambda key: jnp.ones(1), lambda params, x: (jnp.zeros((*x.shape[:-1], 2)), jnp.zeros(2)))
    collect = collect_with(policy, counter_env(step=step), horizon=HORIZON, trajectories=TRAJECTORIES).collect
    data = collect(KEY, jnp.ones(1), counter_env().sample_task(KEY)).trajectories
    assert len(np.unique(data.rewards)) == HORIZON * TRAJECTORIES
    assert len(np.unique(data.actions)) == HORIZON * TRAJECTORIES * 2


def test_a_state_may_hold_a_random_key():
    def reset(key, task):
        state, observation = counter_env().reset(key, task)
        return (key, state), observation

    def step(key, state, action, task):
        outcome = counter_env().step(key, state[1], action, task)
        return outcome._replace(state=(state[0], outcome.state))

    env = counter_env(reset=reset, step=step)
    collect = collect_with(constant_policy(1.0), env, horizon=HORIZON, trajectories=TRAJECTORIES).collect
    batch = collect(KEY, jnp.ones(1), env.sample_task(KEY))
    np.testing.assert_array_equal(batch.first_returns, batch_of().first_returns)
    assert not batch.trajectories.unstable.any()


def test_rewards_may_be_integers_or_flags():
    def step(key, state, action, task):
        outcome = counter_env().step(key, state, action, task)
        return outcome._replace(reward=outcome.reward > 4)

    sizes = {"horizon": HORIZON, "trajectories": TRAJECTORIES}
    collect = collect_with(constant_policy(1.0), counter_env(step=step), discount=0.9, gae_lambda=1.0, **sizes).collect
    task = counter_env().sample_task(KEY)
    np.testing.assert_array_equal(collect(KEY, jnp.ones(1), task).trajectories.rewards, batch_of().trajectories.rewards > 4)


def test_everything_may_be_integers():
    """As in environments of cells and moves."""

    def reset(key, task):
        return jnp.int32(0), jnp.zeros(1, int)

    def step(key, state, action, task):
        state += jnp.where(action[0] > 0, 1, -1)
        return Step(state, state[None], state, jnp.abs(state) == 3)

    env = Environment(lambda key: jnp.int32(0), reset, step, observation_size=1, action_size=2)
    collect = collect_with(constant_policy(1.0), env, horizon=HORIZON, trajectories=TRAJECTORIES).collect
    batch = collect(KEY, jnp.ones(1), jnp.int32(0))
    np.testing.assert_array_equal(batch.first_returns, 1 + 2 + 3)
    assert not batch.trajectories.unstable.any()


def test_rewards_that_are_never_finite_are_no_return_of_zero():
    env = counter_env(step=broken_step(reward=jnp.float32(jnp.nan)))
    collect = collect_with(constant_policy(1.0), env, horizon=HORIZON, trajectories=TRAJECTORIES).collect
    batch = collect(KEY, jnp.ones(1), env.sample_task(KEY))
    assert jnp.isnan(batch.first_returns).all()
    assert jnp.isnan(batch.mean_return)
    assert batch.trajectories.unstable.any()


def by_hand(starts, ends=100, breaks=100):
    """Rows of `counter_env`: observation, time, mask, ends and unstable of each step, [5, T, E]."""
    rows = []
    for row in range(TRAJECTORIES):
        state, time, count, steps = starts[row], 0, 0, []
        for _ in range(HORIZON):
            unstable = state + 1 == breaks
            last = unstable or state + 1 == ends or time + 1 == HORIZON
            steps.append([state, time, not unstable, last, unstable])
            count += last
            state, time = (starts[(row + count) % TRAJECTORIES], 0) if last else (state + 1, time + 1)
        for step in reversed(steps):  # the last trajectory has no time to end
            if step[3]:
                break
            step[2] = False
        rows.append(steps)
    return np.array(rows, np.float32).transpose(2, 1, 0)


@pytest.mark.parametrize("case", [{"ends": 4.0}, {"breaks": 4.0}, {"ends": 4.0, "breaks": 3.0}, {"ends": 7.0}])
def test_where_a_trajectory_ends_the_next_one_begins(case):
    batch = batch_of(**case)
    data = batch.trajectories
    starts = np.asarray(batch_of().trajectories.observations[0, :, 0])
    observations, time, mask, ends, unstable = by_hand(starts, **case)
    np.testing.assert_array_equal(data.observations[..., 0], observations)
    np.testing.assert_array_equal(data.time, time)
    np.testing.assert_array_equal(data.mask, mask)
    np.testing.assert_array_equal(data.ends, ends)
    np.testing.assert_array_equal(data.unstable, unstable)
    np.testing.assert_array_equal(data.rewards, mask * (observations + 1))
    first = np.cumsum(ends, axis=0) - ends == 0
    of_first = np.where((first * unstable).any(0), np.nan, (first * mask * (observations + 1)).sum(0))
    np.testing.assert_array_equal(batch.first_returns, of_first)
    np.testing.assert_allclose(batch.mean_return, mean_of_stable(mask * (observations + 1), ends, unstable), rtol=1e-6)
    assert (batch.advantages * (1 - data.mask) == 0).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((data, batch.advantages, batch.advantage_std)))


def mean_of_stable(rewards, ends, unstable):
    """The mean return of the trajectories that ended but not as unstable ones, one after the other."""
    returns = []
    for row in range(TRAJECTORIES):
        total = 0.0
        for reward, last, broken in zip(rewards[:, row], ends[:, row], unstable[:, row], strict=True):
            total += reward
            if last:
                returns += [] if broken else [total]
                total = 0.0
    return np.mean(returns) if returns else np.nan


def test_to_break_the_simulation_is_not_a_short_trajectory():
    """Rewards are costs; half of the rows break at once. The others have the return of a whole trajectory."""

    def reset(key, task):
        broken = jax.random.bernoulli(key)
        return broken, jnp.zeros(1)

    def step(key, broken, action, task):
        return Step(broken, jnp.zeros(1), jnp.where(broken, jnp.nan, -1.0), jnp.array(False))

    env = Environment(lambda key: jnp.int32(0), reset, step, observation_size=1, action_size=2)
    batch = collect_with(constant_policy(1.0), env, horizon=HORIZON, trajectories=20).collect(KEY, jnp.ones(1), jnp.int32(0))
    assert 0 < batch.trajectories.unstable[0].sum() < 20
    assert batch.mean_return == -HORIZON
    np.testing.assert_array_equal(batch.first_returns, jnp.where(batch.trajectories.unstable[0] > 0, jnp.nan, -HORIZON))


def test_a_policy_in_half_precision_counts_time_and_returns_in_full():
    """bfloat16 has no 257."""

    def apply(params, x):
        return jnp.zeros((*x.shape[:-1], 2), jnp.bfloat16), jnp.zeros(2, jnp.bfloat16)

    collector = collect_with(Model(lambda key: {}, apply), counter_env(), horizon=300, trajectories=2)
    data = collector.collect(KEY, {}, {"ends": jnp.float32(1e4), "breaks": jnp.float32(1e4)}).trajectories
    np.testing.assert_array_equal(data.time[:, 0], np.arange(300))
    np.testing.assert_array_equal(data.rewards[:, 0], data.observations[0, 0, 0] + 1 + np.arange(300))


def test_an_observation_of_reset_that_is_not_finite_is_unstable():
    def reset(key, task):
        return jnp.zeros(2), jnp.array([jnp.nan, 1.0])

    def step(key, state, action, task):
        return Step(state, state, jnp.float32(1), jnp.array(False))

    env = Environment(lambda key: jnp.int32(0), reset, step, observation_size=2, action_size=2)
    batch = collect_with(constant_policy(1.0), env, horizon=3, trajectories=4).collect(KEY, jnp.ones(1), jnp.int32(0))
    assert (batch.trajectories.unstable == 1).all()
    assert (batch.trajectories.mask == 0).all()
    assert jnp.isnan(batch.mean_return)
    # Nothing that a policy learns from has it, not even where it is masked: 0 times NaN would be NaN.
    learned_from = batch.trajectories, batch.advantages, batch.advantage_std
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(learned_from))


def test_a_baseline_of_as_many_features_as_steps_is_warned_of():
    with pytest.warns(UserWarning, match="the linear baseline fits 8 features to 8 steps"):
        collect_with(gaussian_policy(2, 2), navigation(), horizon=4, trajectories=2)


def test_a_policy_that_is_not_finite_has_no_return():
    batch = batch_of(params=jnp.nan)
    assert jnp.isnan(batch.first_returns).all()
    assert jnp.isnan(batch.mean_return)


def test_rows_in_which_a_policy_is_finite_keep_their_returns():
    """It is not where it sees a 1, as it always does in about half of the rows."""

    def reset(key, task):
        state = jax.random.bernoulli(key).astype(jnp.float32)
        return state, state[None]

    def step(key, state, action, task):
        return Step(state, state[None], jnp.float32(1), jnp.array(False))

    env = Environment(lambda key: jnp.int32(0), reset, step, observation_size=1, action_size=1)
    policy = Model(lambda key: jnp.ones(1), lambda params, x: (jnp.where(x > 0.5, jnp.nan, x), jnp.zeros(1)))
    batch = collect_with(policy, env, horizon=HORIZON, trajectories=20).collect(KEY, jnp.ones(1), jnp.int32(0))
    seen = batch.trajectories.observations[0, :, 0]
    assert 0 < seen.sum() < 20
    np.testing.assert_array_equal(batch.first_returns, np.where(seen > 0.5, np.nan, HORIZON))
    assert jnp.isnan(batch.mean_return)


@pytest.mark.parametrize("gae_lambda", [0.5, 1.0])
def test_advantages_by_numpy(gae_lambda):
    """A trajectory at a time: the returns, the baseline that fits them, what followed beyond it, on a scale of its own."""
    batch, discount = batch_of(ends=5.0, gae_lambda=gae_lambda), 0.9
    observations, time, mask, ends, _ = by_hand(np.asarray(batch_of().trajectories.observations[0, :, 0]), ends=5.0)
    trajectories = []  # the places of their steps
    for row in range(TRAJECTORIES):
        *complete, _ = np.split(np.arange(HORIZON), np.flatnonzero(ends[:, row]) + 1)
        trajectories += [(steps, row) for steps in complete]
    assert len(trajectories) > TRAJECTORIES

    returns, estimated = np.zeros((2, HORIZON, TRAJECTORIES))
    for steps, row in trajectories:
        rewards = observations[steps, row] + 1
        returns[steps, row] = [discount ** np.arange(len(steps) - t) @ rewards[t:] for t in range(len(steps))]
    time = time / 100
    x = np.stack([observations, observations**2, time, time**2, time**3, np.ones_like(time)], axis=-1)[mask > 0]
    x = np.asarray(x, np.float64)
    weights = np.linalg.solve(x.T @ x + 1e-5 * np.eye(6), x.T @ returns[mask > 0])
    values = np.zeros((HORIZON, TRAJECTORIES))
    values[mask > 0] = x @ weights
    for steps, row in trajectories:
        value = np.append(values[steps, row], 0)
        beyond = observations[steps, row] + 1 + discount * value[1:] - value[:-1]
        decay = (discount * gae_lambda) ** np.arange(len(steps))
        estimated[steps, row] = [decay[: len(steps) - t] @ beyond[t:] for t in range(len(steps))]
    counted = estimated[mask > 0]
    np.testing.assert_allclose(batch.advantage_std, counted.std(), rtol=1e-3)
    expected = np.where(mask > 0, (estimated - counted.mean()) / counted.std(), 0)
    np.testing.assert_allclose(batch.advantages, expected, atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 0}, "horizon must be a whole number of at least 1, got 0"),
        ({"trajectories": -1}, "trajectories must be a whole number of at least 1, got -1"),
        ({"discount": 1.1}, r"discount must lie in \[0, 1\], got 1.1"),
        ({"discount": -0.1}, r"discount must lie in \[0, 1\], got -0.1"),
        ({"gae_lambda": float("nan")}, r"gae_lambda must lie in \[0, 1\], got nan"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        collect_with(constant_policy(1.0), counter_env(), **{"horizon": 5, "trajectories": 2} | settings)


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
        collect_with(model, navigation(), horizon=5, trajectories=2)


def broken_step(**changes):
    step = counter_env().step
    return lambda *arguments: step(*arguments)._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observation_size": 2}, r"the observation of reset must have shape \(2,\)"),
        ({"reset": lambda key, task: (jnp.zeros(()), {"x": jnp.zeros(1)})}, r"observations must be one array \[1\], got dict"),
        ({"step": broken_step(observation=jnp.zeros(3))}, r"the observation of step must have shape \(1,\)"),
        ({"step": broken_step(reward=jnp.zeros(1))}, r"the reward of step must have shape \(\)"),
        ({"step": broken_step(done=jnp.float32(0))}, "done of step must be a bool, got float32"),
        ({"step": broken_step(observation=jnp.zeros(1, int))}, "reset and step must return observations of one dtype, got"),
        ({"step": lambda key, state, *_: (state, state, 0.0, False)}, r"step must return Step\(.*\), got tuple"),
        ({"step": broken_step(state=jnp.zeros(2))}, "step must keep the shapes and dtypes of the state"),
        ({"action_size": 0}, "action_size must be a whole number of at least 1"),
    ],
    ids=["observation of reset", "dict", "observation", "reward", "done", "dtype", "tuple", "state", "action size"],
)
def test_an_environment_that_does_not_keep_its_word(changes, message):
    with pytest.raises(ValueError, match=message):
        collect_with(constant_policy(1.0), counter_env(**changes), horizon=5, trajectories=2)
