"""The reinforcement learning methods: one battery for all, exact derivatives, and an environment that they must solve."""

import functools
import re

import battery
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import KEY, equal
from trivial_rl import COLLECTOR, MODEL, smooth_policy, target_env, tasks_from

from mamljax.checkpoint import Checkpoints
from mamljax.devices import on, place, task_mesh
from mamljax.distributions import Gaussian
from mamljax.inner import adapt
from mamljax.rl.collect import collect_with
from mamljax.rl.maml_rl import (
    action_distribution,
    collect_and_adapt,
    likelihood_ratio_loss,
    maml_rl,
    mean_kl,
    reinforce_loss,
    surrogate_loss,
)
from mamljax.rl.promp import promp
from mamljax.rl.trpo import TrustRegionState, hessian_vector_product, trpo
from mamljax.rl.wrappers import with_task_observed
from mamljax.types import MetaLearner

MAX_KL = 0.02
SETTINGS = {"rule": 0.1, "inner_steps": 1, "eval_steps": 1, "tx": optax.sgd(0.1)}
MAML = functools.partial(maml_rl, COLLECTOR, rule=0.3, eval_steps=2)
ORACLE_COLLECTOR = collect_with(smooth_policy(2), with_task_observed(target_env()), horizon=3, trajectories=10)
ORACLE = functools.partial(maml_rl, ORACLE_COLLECTOR, rule=0.3, inner_steps=0, eval_steps=0)
LEARNERS = {  # name: (learner, adaptation steps in evaluation)
    "maml by trpo": (MAML(inner_steps=1, tx=trpo(MAX_KL, damping=1e-3)), 2),
    "two steps by adam": (MAML(inner_steps=2, tx=optax.adam(0.01), chunk_size=3), 2),
    "promp": (promp(COLLECTOR, rule=0.3, inner_steps=1, eval_steps=2, tx=optax.adam(0.01), chunk_size=3), 2),
    # To judge every step of none is to judge the policy as it is.
    "oracle": (ORACLE(tx=trpo(MAX_KL, damping=1e-3), multi_step_loss=True), 0),
}


@functools.cache
def compiled(name):
    """A learner with its update compiled, its number of steps, and its evaluation of several tasks compiled."""
    learner, num_steps = LEARNERS[name]
    return battery.compiled(learner), num_steps, jax.jit(jax.vmap(learner.evaluate, in_axes=(0, None, 0)))


@pytest.fixture(params=LEARNERS)
def case(request):
    return compiled(request.param)


def test_is_three_functions_with_the_same_arguments(case):
    battery.check_arguments(case[0].learner)


def test_updates_keep_the_state_as_it_is_and_are_traced_once(case):
    for metrics in battery.check_updates(case[0], map(tasks_from, range(3))):
        names = {"return_before", "return_after", "surrogate", "kl", "grad_norm", "unstable"}
        assert metrics.keys() == names | ({"kl_before"} if case[0].learner is LEARNERS["promp"][0] else set())
        assert metrics["unstable"] == 0


def test_same_key_same_result_and_survives_a_checkpoint(case, tmp_path):
    learner, update, _ = case[0]
    state, metrics = update(KEY, learner.init(KEY), tasks_from(0))
    assert equal((state, metrics), update(KEY, learner.init(KEY), tasks_from(0)))
    assert not equal(state.params, update(jax.random.key(1), learner.init(KEY), tasks_from(0))[0].params)
    Checkpoints(tmp_path, {}).save(1, state)
    _, restored = Checkpoints(tmp_path, {}).restore(jax.eval_shape(learner.init, KEY))
    assert equal(restored, state)


def test_evaluation_has_a_number_for_each_step(case):
    (learner, *_), num_steps, evaluate = case
    metrics = evaluate(jax.random.split(KEY, 6), learner.init(KEY), tasks_from(0))
    assert metrics.keys() == {"return", "return_of_first", "unstable"}
    assert all(values.shape == (6, num_steps + 1) and jnp.isfinite(values).all() for values in metrics.values())
    assert (metrics["return"] < 0).all()
    np.testing.assert_allclose(metrics["return"], metrics["return_of_first"], rtol=1e-5)  # none ends early


@pytest.mark.parametrize("name", ["maml by trpo", "oracle"])
def test_trpo_keeps_to_the_bound_and_improves_the_surrogate(name):
    learner, update, _ = compiled(name)[0]
    state, taken = learner.init(KEY), 0
    for seed in range(10):
        state, metrics = update(jax.random.key(seed), state, tasks_from(seed))
        assert metrics["kl"] <= MAX_KL * (1 + 1e-4)
        assert metrics["surrogate"] < 1e-6
        taken += bool(state.opt.fraction > 0)
    assert taken >= 8


def test_what_the_line_search_found_is_not_computed_again():
    """An outer optimiser that reports what nobody could compute."""
    found = TrustRegionState(*jnp.array([1.0, 5.0, 7.0]))
    tx = optax.GradientTransformationExtraArgs(lambda params: found, lambda grads, state, params, **extra: (grads, found))
    learner = MAML(inner_steps=1, tx=tx)
    _, metrics = jax.jit(learner.update)(KEY, learner.init(KEY), tasks_from(0))
    assert metrics["kl"] == 7


def test_of_a_trpo_in_a_chain_it_is_computed():
    learner, update, _ = compiled("maml by trpo")[0]
    chained = MAML(inner_steps=1, tx=optax.chain(trpo(MAX_KL, damping=1e-3)))
    state, metrics = update(KEY, learner.init(KEY), tasks_from(0))
    other, found = jax.jit(chained.update)(KEY, chained.init(KEY), tasks_from(0))
    assert state.opt.kl > 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), other.params, state.params)
    for name in ("surrogate", "kl"):
        np.testing.assert_allclose(metrics[name], found[name], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_updates"), [("maml by trpo", 150), ("promp", 60)])
def test_a_trivial_environment_is_solved_by_one_step(name, num_updates):
    """A policy that knows nothing gets -1 a step and minus its variance; 9 in 10 of that is gone after one step."""
    (learner, update, _), _, evaluate = compiled(name)
    state = learner.init(KEY)
    for seed in range(num_updates):
        state, _ = update(jax.random.key(seed), state, tasks_from(seed))
    returns = evaluate(jax.random.split(KEY, 6), state, jnp.array([1.0, -1.0] * 3))["return"].mean(0)
    assert returns[0] < -2.5
    assert returns[1] > -1.0


@pytest.fixture(scope="module")
def batches():
    """Two steps of adaptation to one task, and what came after."""
    params = MODEL.init(KEY)
    return params, jax.jit(lambda: collect_and_adapt(COLLECTOR, optax.sgd(0.3), 2, KEY, params, jnp.float32(1.0)))()


class Spy:
    """An outer optimiser that takes no step, and keeps what it was given."""

    def __init__(self):
        self.seen = {}

    def update(self, grads, state, params, **extra):
        self.seen = {"grads": grads, "params": params, **extra}
        return jax.tree.map(jnp.zeros_like, grads), state

    def tx(self):
        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), self.update)


@pytest.mark.parametrize("name", ["maml by trpo", "promp"])
def test_devices_share_the_tasks(name):
    """As on one device, up to rounding, which a line search may only make smaller than its steps."""
    learner, update, _ = compiled(name)[0]
    alone, metrics = update(KEY, learner.init(KEY), tasks_from(0))
    mesh = task_mesh(2)
    with on(mesh):
        shared, shared_metrics = jax.jit(learner.update)(*place((KEY, learner.init(KEY), tasks_from(0)), mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), shared.params, alone.params)
    np.testing.assert_allclose(shared_metrics["return_after"], metrics["return_after"], rtol=1e-4)


def derivatives(differentiation, *, in_other_ways=(), inner_steps=1, **settings):
    """The meta-gradient, and the Hessian of the divergence times a vector as the learner has it, and in other ways."""

    def run(key):
        spy = Spy()
        learner = maml_rl(
            COLLECTOR,
            rule=0.3,
            inner_steps=inner_steps,
            eval_steps=0,
            tx=spy.tx(),
            differentiation=differentiation,
            **settings,
        )
        learner.update(key, learner.init(KEY), tasks_from(0))
        flat, unravel = jax.flatten_util.ravel_pytree(spy.seen["params"])
        vector = jnp.cos(jnp.arange(flat.size, dtype=jnp.float32))

        def kl_fn(flat):
            return spy.seen["value_and_kl_fn"](unravel(flat))[1]

        return {
            "gradient": jax.flatten_util.ravel_pytree(spy.seen["grads"])[0],
            "product": jax.flatten_util.ravel_pytree(spy.seen["kl_product"](unravel(vector)))[0],
            "change": spy.seen["value"] - spy.seen["value_fn"](spy.seen["params"]),
            **{method: hessian_vector_product(kl_fn, flat, method)(vector) for method in in_other_ways},
        }

    return jax.jit(run)(KEY)


@pytest.fixture(scope="module")
def second_order():
    return derivatives("reverse", in_other_ways=("exact", "finite_differences"))


def test_hessian_vector_products_agree(second_order):
    scale = jnp.abs(second_order["exact"]).max()
    np.testing.assert_allclose(second_order["product"], second_order["exact"], atol=1e-4 * scale)
    np.testing.assert_allclose(second_order["finite_differences"], second_order["exact"], atol=1e-2 * scale)
    assert abs(second_order["change"]) < 1e-6


def test_products_agree_where_every_step_is_judged():
    found = derivatives("reverse", in_other_ways=("exact",), inner_steps=2, multi_step_loss=True)
    np.testing.assert_allclose(found["product"], found["exact"], atol=1e-4 * jnp.abs(found["exact"]).max())
    assert abs(found["change"]) < 1e-6


def test_first_order_is_another_gradient_and_another_product(second_order):
    first_order = derivatives("first_order", chunk_size=1)
    for name in ("gradient", "product"):
        difference = jnp.abs(first_order[name] - second_order[name]).max()
        assert difference > 1e-2 * jnp.abs(second_order[name]).max(), name


def test_likelihood_ratios_give_the_same_step_with_the_curvature_of_what_acts(batches):
    """The Hessians differ by the mean of A s s^T, s the score of an action: how its probability changes what is gathered."""
    params, found = batches
    batch = jax.tree.map(lambda leaf: leaf[0], found)
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def log_prob(flat):
        return action_distribution(MODEL, unravel(flat), batch).log_prob(batch.trajectories.actions)

    @jax.jit
    def run(flat):
        losses = [lambda flat, fn=fn: fn(MODEL, unravel(flat), batch) for fn in (reinforce_loss, likelihood_ratio_loss)]
        scores = jax.jacobian(log_prob)(flat).reshape(-1, flat.size)  # no step is masked here
        outer = jnp.einsum("n,ni,nj->ij", batch.advantages.reshape(-1), scores, scores) / len(scores)
        return [jax.grad(loss)(flat) for loss in losses], [jax.hessian(loss)(flat) for loss in losses], outer

    gradients, (plain, credited), outer = run(flat)
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-6)
    assert jnp.abs(outer).max() > 0.1 * jnp.abs(plain).max()
    np.testing.assert_allclose(credited, plain - outer, atol=1e-4 * jnp.abs(plain).max())


def test_the_meta_gradient_is_through_steps_on_likelihood_ratios():
    """Written out for two steps, each with the policy that acted before it, on the batches of an update with the same key."""
    settings = {"inner_steps": 2, "inner_objective": "likelihood_ratio"}
    found = derivatives("reverse", in_other_ways=("exact",), **settings)
    np.testing.assert_allclose(found["product"], found["exact"], atol=1e-4 * jnp.abs(found["exact"]).max())
    assert abs(found["change"]) < 1e-6

    @jax.jit
    def written_out(params):
        gather = functools.partial(collect_and_adapt, COLLECTOR, optax.sgd(0.3), 2)
        batches = jax.vmap(gather, (0, None, 0))(jax.random.split(KEY, 6), params, tasks_from(0))

        def loss(params, batches):
            *before, judge = (jax.tree.map(lambda leaf, step=step: leaf[step], batches) for step in range(3))
            for batch in before:
                gradient = jax.grad(functools.partial(likelihood_ratio_loss, MODEL))(params, batch)
                params = jax.tree.map(lambda leaf, slope: leaf - 0.3 * slope, params, gradient)
            return surrogate_loss(judge, action_distribution(MODEL, params, judge))

        grads = jax.grad(lambda params: jax.vmap(loss, (None, 0))(params, batches).mean())(params)
        return jax.flatten_util.ravel_pytree(grads)[0]

    np.testing.assert_allclose(found["gradient"], written_out(MODEL.init(KEY)), rtol=1e-3, atol=1e-5)
    on_log_probabilities = derivatives("reverse", inner_steps=2)["gradient"]
    assert jnp.abs(found["gradient"] - on_log_probabilities).max() > 1e-2 * jnp.abs(found["gradient"]).max()


def test_in_first_order_the_inner_objective_does_not_matter():
    first, second = (derivatives("first_order", inner_objective=name) for name in ("log_prob", "likelihood_ratio"))
    np.testing.assert_allclose(first["gradient"], second["gradient"], rtol=1e-4, atol=1e-6)


def test_losses_and_divergence_are_of_steps_within_trajectories_alone():
    """Against NumPy, for a policy that has moved, on made-up steps of which a third lies behind an end."""
    rng = np.random.default_rng(0)
    array = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    mask = rng.permutation(np.repeat([1.0, 1.0, 0.0], 4)).reshape(6, 2).astype(np.float32)
    data = jax.eval_shape(COLLECTOR.collect, KEY, MODEL.init(KEY), jnp.float32(1.0))
    old = Gaussian(array(6, 2, 1), 0.3 * array(6, 2, 1))
    steps = data.trajectories._replace(observations=array(6, 2, 1), actions=array(6, 2, 1), mask=mask, policy=old)
    batch = data._replace(trajectories=steps, advantages=array(6, 2))
    params = MODEL.init(KEY)
    new = Gaussian(*map(np.asarray, action_distribution(MODEL, params, batch)))

    def log_prob(mean, log_std):
        return (-((steps.actions - mean) ** 2) / (2 * np.exp(2 * log_std)) - log_std - 0.5 * np.log(2 * np.pi))[..., 0]

    def average(values):
        return (values * mask).sum() / mask.sum()

    ratio = np.exp(log_prob(*new) - log_prob(*old))
    variances = np.exp(2 * old.log_std), np.exp(2 * new.log_std)
    kl = (new.log_std - old.log_std + (variances[0] + (old.mean - new.mean) ** 2) / (2 * variances[1]) - 0.5)[..., 0]
    found = (reinforce_loss(MODEL, params, batch), *(fn(batch, new) for fn in (surrogate_loss, mean_kl)))
    expected = (-average(log_prob(*new) * batch.advantages), -average(ratio * batch.advantages), average(kl))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_adaptation_gathers_with_the_policy_of_each_step(batches):
    """The mean that acted changes from step to step as `inner.adapt` on the same batches says."""
    params, found = batches
    before = jax.tree.map(lambda leaf: leaf[:-1], found)
    _, path = adapt(functools.partial(reinforce_loss, MODEL), params, before, optax.sgd(0.3))
    means = jax.vmap(lambda params: MODEL.apply(params, jnp.ones(1))[0])(path)
    np.testing.assert_allclose(found.trajectories.policy.mean[:, 0, 0], means, rtol=1e-4, atol=1e-6)
    assert len(set(np.asarray(means[:, 0]))) == 3
    noise = (found.trajectories.actions - found.trajectories.policy.mean) / jnp.exp(found.trajectories.policy.log_std)
    assert len(np.unique(np.round(noise, 4))) > 0.9 * noise.size  # each step has a key of its own


def test_multi_step_loss_is_the_mean_over_steps_by_the_spread_of_returns():
    """Written out step by step, on the batches that an update with the same key gathers."""
    spy, task, rule = Spy(), jnp.float32(1.0), optax.sgd(0.3)
    learner = maml_rl(COLLECTOR, rule=0.3, inner_steps=2, eval_steps=0, tx=spy.tx(), multi_step_loss=True)

    @jax.jit
    def run():
        state = learner.init(KEY)
        learner.update(KEY, state, task[None])
        first, second, third = (
            jax.tree.map(lambda leaf, step=step: leaf[step], collect_and_adapt(COLLECTOR, rule, 2, *arguments))
            for arguments in [(jax.random.split(KEY, 1)[0], state.params, task)]
            for step in range(3)
        )

        def loss(params):
            total = 0.0
            for batch, judge in ((first, second), (second, third)):
                gradient = jax.grad(functools.partial(reinforce_loss, MODEL))(params, batch)
                params = jax.tree.map(lambda leaf, slope: leaf - 0.3 * slope, params, gradient)
                total += judge.advantage_std * surrogate_loss(judge, action_distribution(MODEL, params, judge))
            return total / (second.advantage_std + third.advantage_std)

        return spy.seen["value"], spy.seen["grads"], loss(state.params), jax.grad(loss)(state.params), (second, third)

    value, grads, expected, expected_grads, judges = run()
    assert len({round(float(judge.advantage_std), 3) for judge in judges}) == 2  # else no scale matters
    np.testing.assert_allclose(value, expected, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), grads, expected_grads)


def test_so_many_tasks_are_differentiated_at_a_time():
    """Of six tasks three at once, for which the program has loops of two; further ones are of other things."""

    def loops_of_two(chunk_size):
        learner = maml_rl(COLLECTOR, **SETTINGS, chunk_size=chunk_size)
        program = jax.make_jaxpr(learner.update)(KEY, learner.init(KEY), tasks_from(0))
        return len(re.findall(r"\blength=2\b", str(program)))

    assert loops_of_two(3) > loops_of_two(None)


@pytest.mark.parametrize("settings", [{"inner_steps": 0}, {"differentiation": "first_order"}])
def test_a_rule_that_is_not_differentiated_needs_no_derivative(settings):
    assert isinstance(maml_rl(COLLECTOR, **SETTINGS | {"rule": optax.adam(0.1)} | settings), MetaLearner)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_steps": -1}, "inner_steps must be a whole number of at least 0, got -1"),
        ({"eval_steps": 0.5}, "eval_steps must be a whole number of at least 0, got 0.5"),
        ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1, got 0"),
        ({"rule": 0.0}, "the inner step size must be positive and finite, got 0.0"),
        ({"rule": optax.adam(0.1)}, "the inner rule has no finite derivative"),
        ({"inner_objective": "ratio"}, "inner_objective must be one of ('log_prob', 'likelihood_ratio'), got 'ratio'"),
        ({"differentiation": "mixed"}, "differentiation must be one of ('reverse', 'first_order'), got 'mixed'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        maml_rl(COLLECTOR, **SETTINGS | settings)
