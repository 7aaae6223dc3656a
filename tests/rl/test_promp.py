"""ProMP: its first step is MAML's; further ones are clipped, and held near the policy that acted."""

import functools
import re

import battery
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import KEY
from trivial_rl import COLLECT, MODEL, tasks_from

from mamljax.rl.maml_rl import maml_rl, surrogate_loss
from mamljax.rl.promp import clipped_loss, promp

SETTINGS = {"rule": 0.3, "inner_steps": 1, "eval_steps": 2}


@pytest.mark.parametrize(("inner_steps", "multi_step_loss"), [(1, False), (2, False), (2, True)])
def test_the_first_step_is_that_of_maml_on_likelihood_ratios(inner_steps, multi_step_loss):
    """Nothing is clipped yet, and the divergence is at its minimum; with two steps of adaptation in training, too."""
    settings = SETTINGS | {"inner_steps": inner_steps, "multi_step_loss": multi_step_loss, "tx": optax.sgd(0.1)}
    start = maml_rl(MODEL, COLLECT, inner_objective="likelihood_ratio", **settings)
    one = promp(MODEL, COLLECT, outer_steps=1, kl_weight=10.0, **settings)
    (expected, theirs), (found, ours) = (
        jax.jit(learner.update)(KEY, learner.init(KEY), tasks_from(0)) for learner in (start, one)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found.params, expected.params)
    for name in ("return_before", "return_after", "unstable", "grad_norm"):
        close(ours[name], theirs[name])
    assert not battery.equal(found.params, start.init(KEY).params)


def test_steps_go_on_from_one_another_on_the_same_trajectories():
    """Two steps are not one of twice the size, and what is reported of the trajectories is the same."""
    settings = SETTINGS | {"tx": optax.sgd(0.3), "kl_weight": 0.0}
    results = {}
    for outer_steps in (1, 2):
        learner = promp(MODEL, COLLECT, outer_steps=outer_steps, **settings)
        results[outer_steps] = jax.jit(learner.update)(KEY, learner.init(KEY), tasks_from(0))
    start = learner.init(KEY).params
    once, twice = (jax.tree.leaves(jax.tree.map(jnp.subtract, results[n][0].params, start)) for n in (1, 2))
    assert max(jnp.abs(two - 2 * one).max() for one, two in zip(once, twice, strict=True)) > 1e-3
    assert results[1][1]["return_after"] == results[2][1]["return_after"]
    assert results[2][1]["loss"] < results[1][1]["loss"]


def test_the_weight_of_the_divergence_holds_the_policy_before_adaptation():
    """In the one state that there is: how far the mean of its action moves in twenty steps."""
    moved = {}
    for kl_weight in (0.0, 5.0):
        learner = promp(MODEL, COLLECT, tx=optax.sgd(0.01), outer_steps=20, kl_weight=kl_weight, **SETTINGS)
        state = learner.init(KEY)
        after, _ = jax.jit(learner.update)(KEY, state, tasks_from(0))
        old, new = (MODEL.apply(params, jnp.ones(1))[0] for params in (state.params, after.params))
        moved[kl_weight] = jnp.abs(new - old).max()
    assert moved[0.0] > 0.01
    assert moved[5.0] < 0.5 * moved[0.0]


def test_ratios_are_clipped_where_they_would_gain():
    """Against NumPy, on made-up steps of which a third lies behind an end."""
    rng = np.random.default_rng(0)
    array = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    mask = rng.permutation(np.repeat([1.0, 1.0, 0.0], 4)).reshape(6, 2).astype(np.float32)
    data = jax.eval_shape(COLLECT, KEY, MODEL.init(KEY), jnp.float32(1.0))
    old, new = ({"mean": array(6, 2, 1), "log_std": 0.3 * array(6, 2, 1)} for _ in range(2))
    steps = data.trajectories._replace(actions=array(6, 2, 1), mask=mask, **old)
    batch = data._replace(trajectories=steps, advantages=array(6, 2))

    def log_prob(mean, log_std):
        return (-((steps.actions - mean) ** 2) / (2 * np.exp(2 * log_std)) - log_std)[..., 0]

    ratio = np.exp(log_prob(**new) - log_prob(**old))
    gain = np.where(batch.advantages > 0, np.minimum(ratio, 1.2), np.maximum(ratio, 0.8)) * batch.advantages
    found = clipped_loss(batch, (new["mean"], new["log_std"]), 0.2)
    np.testing.assert_allclose(found, -(gain * mask).sum() / mask.sum(), rtol=1e-4)
    assert found > surrogate_loss(batch, (new["mean"], new["log_std"])) + 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_steps": 0}, "inner_steps must be a whole number of at least 1, got 0"),
        ({"outer_steps": 0}, "outer_steps must be a whole number of at least 1, got 0"),
        ({"clip": 0.0}, "clip must lie between 0 and 1, got 0.0"),
        ({"clip": float("nan")}, "clip must lie between 0 and 1, got nan"),
        ({"kl_weight": -1.0}, "kl_weight must be finite and not negative, got -1.0"),
        ({"rule": 0.0}, "the inner step size must be positive and finite, got 0.0"),
        ({"rule": optax.adam(0.1)}, "the inner rule has no finite derivative"),
        ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1, got 0"),
        ({"tx": 0.1}, "tx must be an Optax transformation"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        promp(MODEL, COLLECT, **SETTINGS | {"tx": optax.adam(0.01)} | settings)
