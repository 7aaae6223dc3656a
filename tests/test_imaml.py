"""Implicit MAML: its meta-gradient against a closed form and against the way to the minimum, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamljax.imaml import held_near_start, imaml
from mamljax.losses import mse
from mamljax.maml import fine_tune
from mamljax.models import mlp
from mamljax.rules import all_but, learned_step_sizes
from mamljax.types import Examples, Model, State, Task

KEY = jax.random.key(0)


def meta_gradient(model, params, tasks, **settings):
    """That of one meta-update, which is plain descent by it."""
    learner = imaml(model, mse, eval_steps=1, tx=optax.sgd(1.0), **settings)
    new, metrics = jax.jit(learner.update)(KEY, State(params, optax.sgd(1.0).init(params)), tasks)
    return jax.tree.map(jnp.subtract, params, new.params), metrics["loss"]


def test_the_meta_gradient_of_linear_regression_is_the_closed_form():
    """With damping."""
    rng = np.random.default_rng(0)
    support, query = (rng.normal(size=(1, 6, 2)) for _ in range(2))
    (y, query_y), start = rng.normal(size=(2, 1, 6)), rng.normal(size=2)
    strength, damping, x = 0.5, 0.25, support[0]
    hessian = 2 * x.T @ x / 6
    minimum = np.linalg.solve(hessian + strength * np.eye(2), 2 * x.T @ y[0] / 6 + strength * start)
    slope = 2 * query[0].T @ (query[0] @ minimum - query_y[0]) / 6
    expected = np.linalg.solve(np.eye(2) + hessian / (strength + damping), slope)
    linear = Model(lambda key: jnp.zeros(2), lambda params, x: x @ params)
    tasks = jax.tree.map(jnp.float32, Task(Examples(support, y), Examples(query, query_y)))
    settings = {"rule": 0.2, "inner_steps": 200, "strength": strength, "cg_steps": 2, "damping": damping}
    found, loss = meta_gradient(linear, jnp.float32(start), tasks, **settings)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(loss, ((query[0] @ minimum - query_y[0]) ** 2).mean(), rtol=1e-4)


def test_it_is_the_gradient_through_all_steps_if_they_lead_to_a_minimum():
    """In float64, of a network; with too few iterations it is another one."""
    with jax.enable_x64(True):
        model = Model(lambda key: None, lambda params, x: jnp.tanh(x @ params["first"] + params["shift"]) @ params["last"])
        rng = np.random.default_rng(1)
        params = {"first": rng.normal(size=(1, 4)), "shift": rng.normal(size=(1, 4)), "last": rng.normal(size=(4, 1))}
        params = jax.tree.map(jnp.asarray, params)
        tasks = Task(*(Examples(*(jnp.asarray(rng.normal(size=(3, 5, 1))) for _ in range(2))) for _ in range(2)))
        held = optax.chain(held_near_start(2.0), optax.sgd(0.05))

        def through_all_steps(params, task):
            adapted, _ = fine_tune(model, mse, params, task.support, held, 800, differentiation="reverse")
            return mse(model.apply(adapted, task.query.x), task.query.y)

        expected = jax.grad(lambda params: jax.vmap(through_all_steps, (None, 0))(params, tasks).mean())(params)
        settings = {"rule": 0.05, "inner_steps": 800, "strength": 2.0}
        found, _ = meta_gradient(model, params, tasks, cg_steps=13, **settings)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), found, expected)
        by_chunks, _ = meta_gradient(model, params, tasks, cg_steps=13, chunk_size=1, **settings)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), by_chunks, expected)
        too_few, _ = meta_gradient(model, params, tasks, cg_steps=1, **settings)
        assert not np.allclose(too_few["first"], expected["first"], rtol=1e-2)


def test_strength_and_damping_can_be_mapped_over():
    """Two of each, as two alone."""
    model = Model(lambda key: jnp.zeros(2), lambda params, x: x @ params)
    x, y = jax.random.normal(KEY, (1, 6, 2)), jnp.ones((1, 6))
    pairs = [(0.5, 0.0), (2.0, 1.0)]

    def gradient(strength, damping):
        settings = {"rule": 0.2, "inner_steps": 5, "strength": strength, "damping": damping, "cg_steps": 1}
        return meta_gradient(model, jnp.ones(2), Task(Examples(x, y), Examples(x, 2 * y)), **settings)[0]

    alone = [gradient(*pair) for pair in pairs]
    assert not np.allclose(*alone)
    np.testing.assert_allclose(jax.vmap(gradient)(*jnp.array(pairs).T), alone, rtol=1e-5)


def test_memory_does_not_grow_with_the_steps():
    tasks = jax.tree.map(jnp.zeros_like, Task(*[Examples(*jnp.zeros((2, 4, 100, 1)))] * 2))

    def temporary_bytes(inner_steps):
        sizes = {"inner_steps": inner_steps, "strength": 2.0, "cg_steps": 5}
        learner = imaml(mlp(1, (40, 40), 1), mse, rule=0.01, eval_steps=1, tx=optax.sgd(0.1), **sizes)
        compiled = jax.jit(learner.update).lower(KEY, learner.init(KEY), tasks).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(50) < 1.02 * temporary_bytes(2)


def test_evaluation_is_held_near_the_start():
    model = Model(lambda key: jnp.zeros(1), lambda params, x: x @ params[None])
    x = jnp.ones((3, 1))
    task = Task(Examples(x, 2 * x), Examples(x, 2 * x))
    learner = imaml(
        model,
        mse,
        rule=0.1,
        inner_steps=1,
        strength=2.0,
        cg_steps=1,
        eval_steps=50,
        tx=optax.sgd(0.1),
        metric_fns={"at": lambda y, _: y.mean()},
    )
    at = learner.evaluate(KEY, learner.init(KEY), task)["at"]
    # (theta - 2)^2 + theta^2 has its minimum at 1.
    np.testing.assert_allclose(at[jnp.array([0, 1, -1])], [0.0, 0.4, 1.0], atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.0}, "strength must be positive and finite, got 0.0"),
        ({"strength": "2"}, "strength must be positive and finite, got '2'"),
        ({"strength": float("inf")}, "strength must be positive and finite, got inf"),
        ({"damping": -1.0}, "damping must be at least 0 and finite, got -1.0"),
        ({"rule": 0.0}, "the inner step size must be positive and finite"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    sizes = {"inner_steps": 1, "strength": 1.0, "cg_steps": 1, "eval_steps": 1, "rule": 0.1} | settings
    with pytest.raises(ValueError, match=message):
        imaml(mlp(1, (4,), 1), mse, tx=optax.sgd(0.1), **sizes)


@pytest.mark.parametrize(
    "rule", [optax.sgd(optax.linear_schedule(0.0, 0.1, 5)), optax.chain(optax.centralize(), optax.sgd(0.1))]
)
def test_a_rule_that_at_first_or_to_equal_gradients_does_nothing_is_taken(rule):
    imaml(mlp(3, (4,), 2), mse, rule=rule, inner_steps=1, strength=1.0, cg_steps=1, eval_steps=1, tx=optax.sgd(0.1))


def test_a_gradient_that_is_not_finite_is_not_lost():
    """Where the query set is fitted exactly, the root of the error has no derivative."""
    model = Model(lambda key: jnp.zeros((1, 1)), lambda params, x: x @ params)
    x = jnp.ones((1, 3, 1))
    tasks = Task(Examples(x, 0 * x), Examples(x, 0 * x))
    sizes = {"rule": 0.1, "inner_steps": 1, "strength": 1.0, "cg_steps": 2, "eval_steps": 1}
    learner = imaml(model, lambda outputs, y: jnp.sqrt(mse(outputs, y)), tx=optax.sgd(0.1), **sizes)
    assert jnp.isnan(learner.update(KEY, learner.init(KEY), tasks)[1]["grad_norm"])


def test_a_rule_that_adapts_some_parameters_alone_is_refused():
    rule = all_but("Dense_0", 0.1)
    with pytest.raises(ValueError, match="imaml adapts all parameters, and the rule leaves some as they are"):
        imaml(mlp(1, (4,), 1), mse, rule=rule, inner_steps=1, strength=1.0, cg_steps=1, eval_steps=1, tx=optax.sgd(0.1))


def test_a_rule_that_it_would_not_learn_is_refused():
    model, rule = learned_step_sizes(mlp(1, (4,), 1), 0.1)
    with pytest.raises(ValueError, match="imaml goes through no step, and so learns nothing of a rule"):
        imaml(model, mse, rule=rule, inner_steps=1, strength=1.0, cg_steps=1, eval_steps=1, tx=optax.sgd(0.1))
