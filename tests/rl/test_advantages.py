"""Returns, baseline and advantages of trajectories worked out by hand, some of which end early."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamljax.rl import advantages

# Two rows, time first: one trajectory of three steps; and one of two, after which the next has no time to end.
REWARDS = jnp.array([[1.0, 10.0], [2.0, 20.0], [4.0, 0.0]])
ENDS = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
MASK = jnp.array([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
VALUES = jnp.array([[0.5, 1.0], [1.0, 2.0], [1.5, 0.0]])
TIME = jnp.array([[0.0, 0.0], [1.0, 1.0], [2.0, 0.0]])


def test_discounted_sums_by_hand():
    sums = advantages.discounted_sums(REWARDS, ENDS, 0.5)
    np.testing.assert_allclose(sums, [[1 + 0.5 * 2 + 0.25 * 4, 10 + 0.5 * 20], [2 + 0.5 * 4, 20], [4, 0]])


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int32, jnp.float16])
def test_observations_may_be_any_numbers(dtype):
    observations = jnp.array([[[3, 100]]], dtype)
    found = advantages.features(observations, jnp.zeros((1, 1)))
    np.testing.assert_array_equal(found, [[[3, 10, 9, 100, 0, 0, 0, 1]]])


def test_sums_of_one_trajectory_after_the_other():
    """Each is as if it were alone."""
    rewards, ends = jnp.array([[1.0], [2.0], [3.0], [4.0]]), jnp.array([[0.0], [1.0], [0.0], [1.0]])
    np.testing.assert_allclose(advantages.discounted_sums(rewards, ends, 0.5)[:, 0], [2, 2, 5, 4])


def test_generalised_advantages_by_hand():
    """With gamma = lambda = 1/2: deltas, and each plus a quarter of what follows."""
    found = advantages.generalised_advantages(REWARDS, VALUES, ENDS, discount=0.5, gae_lambda=0.5)
    first = [1 + 0.5 - 0.5, 2 + 0.75 - 1, 4 - 1.5]
    second = [10 + 1 - 1, 20 - 2]
    by_hand = [
        [first[0] + (first[1] + first[2] / 4) / 4, second[0] + second[1] / 4],
        [first[1] + first[2] / 4, second[1]],
        [first[2], 0],
    ]
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)


def test_the_value_of_the_next_trajectory_is_none_of_the_last_ones_business():
    rewards, values, ends = jnp.ones((2, 1)), jnp.array([[3.0], [50.0]]), jnp.ones((2, 1))
    found = advantages.generalised_advantages(rewards, values, ends, discount=0.9, gae_lambda=0.9)
    np.testing.assert_allclose(found[:, 0], [1 - 3, 1 - 50])


def test_with_lambda_one_the_advantage_is_the_return_less_the_value():
    found = advantages.generalised_advantages(REWARDS, VALUES, ENDS, discount=0.9, gae_lambda=1.0)
    expected = advantages.discounted_sums(REWARDS, ENDS, 0.9) - VALUES
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_features_of_the_baseline():
    found = advantages.features(jnp.array([[[-20.0, 3.0]], [[0.5, 0.0]]]), jnp.array([[0.0], [50.0]]))
    np.testing.assert_allclose(found[0, 0], [-10, 3, 100, 9, 0, 0, 0, 1])
    np.testing.assert_allclose(found[1, 0], [0.5, 0, 0.25, 0, 0.5, 0.25, 0.125, 1], rtol=1e-6)


@pytest.mark.parametrize(("settings", "ridge"), [({}, 1e-5), ({"ridge": 10.0}, 10.0)])
def test_baseline_is_ridge_regression_in_float64(settings, ridge):
    generator = np.random.default_rng(0)
    observations = generator.normal(size=(30, 4, 3)).astype(np.float32)
    returns = generator.normal(size=(30, 4)).astype(np.float32)
    lengths = np.array([30, 7, 1, 22])
    mask = (np.arange(30)[:, None] < lengths).astype(np.float32)
    rubbish = np.where(mask > 0, returns, 1e3).astype(np.float32)
    time = jnp.broadcast_to(jnp.arange(30.0)[:, None], (30, 4))
    found = advantages.linear_baseline(jnp.array(observations), time, jnp.array(rubbish), jnp.array(mask), **settings)

    taken = mask.reshape(-1) > 0
    x = np.asarray(advantages.features(jnp.array(observations), time), np.float64).reshape(120, -1)
    weights = np.linalg.solve(x[taken].T @ x[taken] + ridge * np.eye(10), x[taken].T @ returns.reshape(-1)[taken])
    np.testing.assert_allclose(np.reshape(found, -1)[taken], (x @ weights)[taken], atol=1e-3)
    assert (np.reshape(found, -1)[~taken] == 0).all()


def test_baseline_of_returns_that_are_linear_in_the_features_is_exact():
    """But for what the ridge takes of the large weight of time cubed."""
    time = jnp.broadcast_to(jnp.arange(50.0)[:, None], (50, 3))
    observations = jnp.sin(time + jnp.arange(3.0)[None])[..., None]
    returns = 2.0 * observations[..., 0] - 30.0 * (time / 100) ** 3 + 5.0
    np.testing.assert_allclose(advantages.linear_baseline(observations, time, returns, jnp.ones((50, 3))), returns, atol=1e-2)


@pytest.mark.parametrize("mask", [MASK, jnp.ones_like(MASK)])
def test_standardised_advantages(mask):
    found, spread = (np.asarray(values) for values in advantages.standardise(REWARDS, mask))
    taken = found[mask > 0]
    np.testing.assert_allclose(spread, np.asarray(REWARDS)[mask > 0].std(), rtol=1e-5)
    assert abs(taken.mean()) < 1e-6
    np.testing.assert_allclose(taken.std(), 1.0, rtol=1e-5)
    assert (found[mask == 0] == 0).all()


def test_no_step_taken_at_all_is_no_nan():
    nothing = jnp.zeros((3, 2))
    standardised, spread = advantages.standardise(REWARDS, nothing)
    assert (standardised == 0).all()
    assert spread == 0
    assert (advantages.linear_baseline(jnp.ones((3, 2, 1)), TIME, REWARDS, nothing) == 0).all()


def test_a_batch_of_tasks_is_fitted_one_after_the_other():
    """Several devices that give LAPACK a batch each at the same time may wait for each other's threads for ever."""
    keys = jax.random.split(jax.random.key(0), 3)
    observations, returns = jax.random.normal(keys[0], (3, 5, 2, 1)), jax.random.normal(keys[1], (3, 5, 2))
    data = observations, jnp.broadcast_to(jnp.arange(5.0)[None, :, None], (3, 5, 2)), returns, jnp.ones((3, 5, 2))
    fitted = jax.vmap(advantages.linear_baseline)(*data)
    for task in range(3):
        np.testing.assert_allclose(
            fitted[task], advantages.linear_baseline(*(leaf[task] for leaf in data)), rtol=1e-3, atol=1e-3
        )
    program = str(jax.make_jaxpr(jax.vmap(advantages.linear_baseline))(*data))
    shapes = re.findall(r":f32\[([\d,]+)\] \w+:f32\[[\d,]+\] = qr\[", program)
    assert shapes == ["16,6"]
