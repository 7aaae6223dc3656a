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
from trivial_rl import COLLECTOR, MODEL, target_env, tasks_from

from mamljax.distributions import Gaussian
from mamljax.rl.collect import collect_with
from mamljax.rl.maml_rl import (
    action_distribution,
    collect_and_adapt,
    likelihood_ratio_loss,
    maml_rl,
    mean_kl,
    surrogate_loss,
)
from mamljax.rl.promp import clipped_loss, promp
from mamljax.rl.trpo import trpo

SETTINGS = {"rule": 0.3, "inner_steps": 1, "eval_steps": 2}
ENDING_EARLY = collect_with(MODEL, target_env(done=lambda action: action[0] > 0.5), horizon=5, trajectories=10)


@pytest.mark.parametrize("gather", [COLLECTOR, ENDING_EARLY], ids=["whole", "ending early"])
@pytest.mark.parametrize(("inner_steps", "multi_step_loss"), [(1, False), (2, False), (2, True)])
def test_the_first_step_is_that_of_maml_on_likelihood_ratios(inner_steps, multi_step_loss, gather):
    """Nothing is clipped yet, and the divergence is at its minimum; with two steps of adaptation in training, too."""
    settings = SETTINGS | {"inner_steps": inner_steps, "multi_step_loss": multi_step_loss, "tx": optax.sgd(0.1)}
    start = maml_rl(gather, inner_objective="likelihood_ratio", **settings)
    one = promp(gather, outer_steps=1, kl_weight=10.0, **settings)
    (expected, theirs), (found, ours) = (
        jax.jit(learner.update)(KEY, learner.init(KEY), tasks_from(0)) for learner in (start, one)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found.params, expected.params)
    for name in theirs:
        close(ours[name], theirs[name])
    assert not battery.equal(found.params, start.init(KEY).params)


def test_chunks_of_tasks_give_the_same_update():
    """Of six tasks four, and then the other two."""
    whole, chunked = (
        jax.jit(learner.update)(KEY, learner.init(KEY), tasks_from(0))
        for learner in (promp(COLLECTOR, tx=optax.sgd(0.1), chunk_size=chunk_size, **SETTINGS) for chunk_size in (None, 4))
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), chunked, whole)


def test_trpo_is_refused_in_a_chain_too():
    chain = optax.chain(optax.clip_by_global_norm(1.0), trpo(0.01))
    with pytest.raises(ValueError, match=r"tx must take small steps on the loss, such as optax.adam\(1e-3\)"):
        promp(COLLECTOR, tx=chain, **SETTINGS)


def test_two_steps_on_what_two_steps_of_adaptation_gathered():
    """Written out, on the batches that an update with the same key gathers; where some ratios are clipped, and the divergence
    counts as much as they."""
    lr, clip, kl_weight = 0.1, 0.02, 3.0
    settings = {"rule": 0.3, "inner_steps": 2, "eval_steps": 0, "tx": optax.sgd(lr)}
    learner = promp(COLLECTOR, outer_steps=2, clip=clip, kl_weight=kl_weight, **settings)
    state = learner.init(KEY)
    found, metrics = jax.jit(learner.update)(KEY, state, tasks_from(0))

    def along(params, batches):
        """The policies before and after each step, and what each does in the states of its batch."""
        policies = []
        for step in range(3):
            batch = jax.tree.map(lambda leaf, step=step: leaf[step], batches)
            policies.append((batch, action_distribution(MODEL, params, batch)))
            gradient = jax.grad(functools.partial(likelihood_ratio_loss, MODEL))(params, batch)
            params = jax.tree.map(lambda leaf, slope: leaf - 0.3 * slope, params, gradient)
        return policies

    def ratio_of(batch, policy):
        acted = batch.trajectories
        return jnp.exp(policy.log_prob(acted.actions) - acted.policy.log_prob(acted.actions))

    def loss(params, batches):
        *before, (judge, adapted) = along(params, batches)
        ratio, advantages = ratio_of(judge, adapted), judge.advantages
        clipped = jnp.where(advantages > 0, jnp.minimum(ratio, 1 + clip), jnp.maximum(ratio, 1 - clip))
        strayed = [mean_kl(*policy) for policy in before]
        return -(clipped * advantages).mean() + kl_weight * (strayed[0] + strayed[1]) / 2  # no step is masked here

    @jax.jit
    def written_out(params):
        gather = functools.partial(collect_and_adapt, COLLECTOR, optax.sgd(0.3), 2)
        batches = jax.vmap(gather, (0, None, 0))(jax.random.split(KEY, 6), params, tasks_from(0))
        norms = []
        for _ in range(2):
            ratios = jax.vmap(lambda batches, params=params: ratio_of(*along(params, batches)[2]))(batches)
            grads = jax.grad(lambda params: jax.vmap(loss, (None, 0))(params, batches).mean())(params)
            params = jax.tree.map(lambda leaf, slope: leaf - lr * slope, params, grads)
            norms.append(optax.tree.norm(grads))
        kl = jax.vmap(lambda batches: jnp.stack([mean_kl(*policy) for policy in along(params, batches)]))(batches)
        return params, ratios, kl.mean(0), norms

    expected, ratios, kl, (first, last) = written_out(state.params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found.params, expected)
    assert 0.05 < (jnp.abs(ratios - 1) > clip).mean() < 0.95  # when the second step is taken
    np.testing.assert_allclose(metrics["kl_before"], kl[:2].mean(), rtol=1e-3)
    np.testing.assert_allclose(metrics["kl"], kl[2], rtol=1e-3)
    assert abs(first / last - 1) > 0.01
    np.testing.assert_allclose(metrics["grad_norm"], last, rtol=1e-3)


def test_ratios_are_clipped_where_they_would_gain():
    """Against NumPy, on made-up steps of which a third lies behind an end."""
    rng = np.random.default_rng(0)
    array = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    mask = rng.permutation(np.repeat([1.0, 1.0, 0.0], 4)).reshape(6, 2).astype(np.float32)
    data = jax.eval_shape(COLLECTOR.collect, KEY, MODEL.init(KEY), jnp.float32(1.0))
    old, new = (Gaussian(array(6, 2, 1), 0.3 * array(6, 2, 1)) for _ in range(2))
    steps = data.trajectories._replace(actions=array(6, 2, 1), mask=mask, policy=old)
    batch = data._replace(trajectories=steps, advantages=array(6, 2))

    def log_prob(mean, log_std):
        return (-((steps.actions - mean) ** 2) / (2 * np.exp(2 * log_std)) - log_std)[..., 0]

    ratio = np.exp(log_prob(*new) - log_prob(*old))
    gain = np.where(batch.advantages > 0, np.minimum(ratio, 1.2), np.maximum(ratio, 0.8)) * batch.advantages
    found = clipped_loss(batch, new, 0.2)
    np.testing.assert_allclose(found, -(gain * mask).sum() / mask.sum(), rtol=1e-4)
    assert found > surrogate_loss(batch, new) + 0.1


def test_a_ratio_without_end_has_no_gradient_and_is_no_nan():
    """An action that is e^100 times as likely as it was, and was better than expected, or worse."""
    batch = jax.jit(COLLECTOR.collect)(KEY, MODEL.init(KEY), jnp.float32(1.0))
    steps = batch.trajectories
    mean, log_std = steps.policy
    steps = steps._replace(actions=mean, policy=Gaussian(mean, jnp.full_like(log_std, 100.0)))
    for advantage in (1.0, -1.0):
        judged = batch._replace(trajectories=steps, advantages=jnp.full_like(batch.advantages, advantage))
        policy = Gaussian(mean, jnp.zeros_like(mean))
        gradient = jax.grad(lambda policy, judged=judged: clipped_loss(judged, policy, 0.2))(policy).mean
        assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_steps": 0}, "inner_steps must be a whole number of at least 1, got 0"),
        ({"outer_steps": 0}, "outer_steps must be a whole number of at least 1, got 0"),
        ({"clip": 1.0}, "clip must lie strictly between 0 and 1, got 1.0"),
        ({"clip": float("nan")}, "clip must lie strictly between 0 and 1, got nan"),
        ({"kl_weight": -1.0}, "kl_weight must be at least 0 and finite, got -1.0"),
        ({"rule": 0.0}, "the inner step size must be positive and finite, got 0.0"),
        ({"rule": optax.adam(0.1)}, "the inner rule has no finite derivative"),
        ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1, got 0"),
        ({"tx": 0.1}, "tx must be an Optax transformation"),
        ({"tx": trpo(0.01)}, "tx must take small steps on the loss, such as optax.adam(1e-3); with trpo(...) use maml_rl"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        promp(COLLECTOR, **SETTINGS | {"tx": optax.adam(0.01)} | settings)
