"""Actions that are a choice among a few: bandits whose best arm is the task."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamljax.distributions import Categorical
from mamljax.evaluate import evaluate
from mamljax.models import categorical_policy, gaussian_policy
from mamljax.rl.collect import collect_with
from mamljax.rl.environment import Environment, Step
from mamljax.rl.maml_rl import action_distribution, likelihood_ratio_loss, maml_rl, mean_kl, reinforce_loss
from mamljax.rl.navigation import navigation
from mamljax.rl.promp import promp
from mamljax.rl.trpo import trpo
from mamljax.rl.wrappers import with_task_observed
from mamljax.train import fit
from mamljax.types import Model

ARMS, HORIZON, TRAJECTORIES = 3, 4, 8
KEY = jax.random.key(0)


def reset(key, task):
    return jnp.zeros(()), jnp.ones(1)


def pull(key, state, action, task):
    assert (action.shape, action.dtype) == ((), jnp.int32)
    return Step(state, jnp.ones(1), action == task, jnp.array(False))


BANDIT = Environment(lambda key: jax.random.randint(key, (), 0, ARMS), reset, pull, 1, ARMS, discrete_actions=True)
SIZES = {"horizon": HORIZON, "trajectories": TRAJECTORIES}


def logits_policy(logits):
    """Its parameters are its logits, whatever it sees."""
    return Model(lambda key: jnp.array(logits), lambda params, x: Categorical(jnp.broadcast_to(params, (len(x), ARMS))))


def batch_of(logits, task=1):
    collector = collect_with(logits_policy(logits), BANDIT, **SIZES)
    return collector.policy, jnp.array(logits), collector.collect(KEY, jnp.array(logits), jnp.int32(task))


def test_actions_are_choices_of_the_policy():
    _, _, batch = batch_of([0.0, 0.0, -1e9])
    assert batch.trajectories.actions.shape == (HORIZON, TRAJECTORIES)
    assert set(np.unique(batch.trajectories.actions)) == {0, 1}
    np.testing.assert_array_equal(batch.trajectories.rewards, batch.trajectories.actions == 1)
    np.testing.assert_allclose(batch.mean_return, (batch.trajectories.actions == 1).sum() / TRAJECTORIES)


def test_the_gradient_of_reinforce_is_that_of_the_softmax():
    policy, logits, batch = batch_of([0.3, -0.2, 0.1])
    indicators = np.eye(ARMS)[np.asarray(batch.trajectories.actions)]
    probabilities = np.exp(logits) / np.exp(logits).sum()
    expected = -(np.asarray(batch.advantages)[..., None] * (indicators - probabilities)).mean((0, 1))
    for loss in (reinforce_loss, likelihood_ratio_loss):
        found = jax.grad(lambda params, loss=loss: loss(policy, params, batch))(logits)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_action_that_is_not_allowed_is_never_taken_and_harms_nothing():
    policy, _, batch = batch_of([0.0, 0.0, -jnp.inf])
    assert set(np.unique(batch.trajectories.actions)) == {0, 1}
    assert jnp.isfinite(batch.mean_return)
    other = jnp.array([1.0, 0.0, -jnp.inf])
    gradient = jax.grad(lambda params: mean_kl(batch, action_distribution(policy, params, batch)))(other)
    assert jnp.isfinite(gradient).all()
    assert gradient[0] != 0


def test_the_divergence_between_two_policies():
    policy, logits, batch = batch_of([0.3, -0.2, 0.1])
    other = jnp.array([0.0, 1.0, 0.0])
    p, q = (np.exp(values) / np.exp(values).sum() for values in (np.asarray(logits), np.asarray(other)))
    found = mean_kl(batch, action_distribution(policy, other, batch))
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(), rtol=1e-5)


def test_a_policy_that_is_not_finite_has_no_return():
    """Its choices, the first arm always, look like those of another."""
    _, _, batch = batch_of([jnp.nan, 0.0, 0.0])
    assert jnp.isnan(batch.mean_return)
    assert jnp.isnan(batch.first_returns).all()


@pytest.mark.parametrize(
    ("policy", "env", "message"),
    [
        (gaussian_policy(1, ARMS), BANDIT, r"discrete actions must return Categorical\(logits\), as categorical_policy"),
        (categorical_policy(1, ARMS + 1), BANDIT, "for one observation it gives logits of shape"),
        (categorical_policy(2, ARMS), BANDIT, "the policy does not fit the environment, with observations of size 1"),
        (categorical_policy(2, 2), navigation(), "say so in the environment: discrete_actions=True"),
    ],
    ids=["gaussian", "actions", "observations", "continuous"],
)
def test_a_policy_that_does_not_fit(policy, env, message):
    with pytest.raises(ValueError, match=message):
        collect_with(policy, env, **SIZES)


LEARNERS = {
    "trpo": lambda collector: maml_rl(
        collector, rule=1.0, inner_steps=1, eval_steps=1, tx=trpo(0.01), inner_objective="likelihood_ratio"
    ),
    "promp": lambda collector: promp(collector, rule=1.0, inner_steps=1, eval_steps=1, tx=optax.adam(0.03)),
}


@pytest.mark.slow
@pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS)
def test_one_step_finds_the_best_arm(learner):
    """Of a return of 4 each; before adaptation nothing is known of the task, and a third of the choices are right."""
    learner = learner(collect_with(categorical_policy(1, ARMS, hidden_sizes=(8,)), BANDIT, **SIZES))
    result = fit(learner, BANDIT.sample_task, key=KEY, num_updates=30, num_tasks=10, log_every=30, progress=False)
    returns = evaluate(learner, result.state, BANDIT.sample_task, key=jax.random.key(1), num_tasks=40)["return"].mean(0)
    assert returns[0] < 2
    assert returns[1] > 3.5


@pytest.mark.slow
def test_an_oracle_sees_the_best_arm():
    env = with_task_observed(BANDIT)
    collector = collect_with(categorical_policy(2, ARMS, hidden_sizes=(16,)), env, **SIZES)
    learner = maml_rl(collector, rule=1.0, inner_steps=0, eval_steps=0, tx=trpo(0.1))
    result = fit(learner, env.sample_task, key=KEY, num_updates=40, num_tasks=10, log_every=40, progress=False)
    assert evaluate(learner, result.state, env.sample_task, key=jax.random.key(1), num_tasks=40)["return"].mean() > 3.5
