"""TRPO's parts on problems with a known answer, and its promises on any problem."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamljax.rl.trpo import backtrack, conjugate_gradient, hessian_vector_product, trpo

START = {"a": jnp.array([0.5, -1.0]), "b": jnp.array(2.0)}
MATRIX = np.array([[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 1.0]], np.float32)


def kl_fn(params, scale=1.0):
    """A quadratic of known Hessian about `START`."""
    offset = jnp.append(params["a"] - START["a"], params["b"] - START["b"])
    return scale * offset @ (MATRIX @ offset) / 2


def linear_loss(params):
    return params["a"] @ jnp.array([1.0, 2.0]) - 3.0 * params["b"]


def product(v):
    """Of that Hessian and a vector."""
    image = MATRIX @ jnp.append(v["a"], v["b"])
    return {"a": image[:2], "b": image[2]}


@functools.partial(jax.jit, static_argnames=("tx", "value_fn", "kl_fn"))
def step(tx, value_fn, kl_fn=kl_fn):
    value, grads = jax.value_and_grad(value_fn)(START)
    return tx.update(grads, tx.init(START), START, value=value, value_and_kl_fn=lambda p: (value_fn(p), kl_fn(p)))


def test_conjugate_gradient_solves_a_known_system():
    x = jnp.array([1.0, -2.0, 3.0])
    found, residual = conjugate_gradient(lambda v: MATRIX @ v, MATRIX @ x, 3)
    np.testing.assert_allclose(found, x, rtol=1e-4)
    np.testing.assert_allclose(residual, 0, atol=1e-4)


def test_conjugate_gradient_returns_the_residual_of_what_it_found():
    target = jnp.array([1.0, -2.0, 3.0])
    found, residual = conjugate_gradient(lambda v: MATRIX @ v, target, 1)
    np.testing.assert_allclose(residual, target - MATRIX @ found, atol=1e-5)
    assert jnp.abs(residual).max() > 0.1


def test_conjugate_gradient_of_nothing_is_nothing():
    found, residual = conjugate_gradient(lambda v: MATRIX @ v, jnp.zeros(3), 10)
    assert not found.any()
    assert not residual.any()


@pytest.mark.parametrize(("method", "rtol"), [("exact", 1e-5), ("finite_differences", 1e-2)])
def test_hessian_vector_products(method, rtol):
    def fn(x):
        return jnp.sum(x**4) + x[0] * x[1]

    x, v = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, -1.0, 0.5])
    np.testing.assert_allclose(hessian_vector_product(fn, x, method)(v), jax.hessian(fn)(x) @ v, rtol=rtol)


@pytest.mark.parametrize("hvp", ["exact", "finite_differences"])
def test_a_step_down_a_linear_loss_is_the_natural_gradient_to_the_bound(hvp):
    updates, state = step(trpo(0.01, hvp=hvp), linear_loss)
    direction = np.linalg.solve(MATRIX, [1.0, 2.0, -3.0])
    full = -direction * np.sqrt(2 * 0.01 / (direction @ MATRIX @ direction))
    assert state.fraction == 1.0 or abs(state.fraction - np.sqrt(0.9)) < 0.01  # as rounding may break the bound
    tolerance = 0.01  # the error of finite differences
    np.testing.assert_allclose(jnp.append(updates["a"], updates["b"]), state.fraction * full, rtol=tolerance)
    assert 0.88 * 0.01 < state.kl <= 0.01


def test_damping_is_added_to_the_diagonal_of_the_curvature():
    updates, state = step(trpo(0.01, damping=2.0), linear_loss)
    damped = MATRIX + 2 * np.eye(3)
    direction = np.linalg.solve(damped, [1.0, 2.0, -3.0])
    full = -direction * np.sqrt(2 * 0.01 / (direction @ damped @ direction))
    assert state.fraction == 1  # well within the bound
    np.testing.assert_allclose(jnp.append(updates["a"], updates["b"]), full, rtol=1e-3)


def test_one_iteration_of_conjugate_gradients_is_a_step_along_the_gradient():
    updates, _ = step(trpo(0.01, cg_steps=1), linear_loss)
    taken = np.append(updates["a"], updates["b"])
    assert taken[0] < 0
    np.testing.assert_allclose(taken / taken[0], [1, 2, -3], rtol=1e-4)


@pytest.mark.parametrize(
    ("scale", "max_backtracks", "fraction"),
    [
        (3.0, 2, np.sqrt(0.9 / 3)),  # at once to nine tenths of the bound
        (100.0, 5, np.sqrt(0.9 / 100)),  # by halves first: 1, 1/2, 1/4, 1/8 are too much
        (100.0, 4, 0.0),  # these four are all that may be tried
    ],
)
def test_a_step_too_long_is_shortened_by_the_divergence_it_makes(scale, max_backtracks, fraction):
    """The divergence is quadratic, and so many times the one that it is told the curvature of."""
    value, grads = jax.value_and_grad(linear_loss)(START)
    arguments = {"value": value, "value_and_kl_fn": lambda p: (linear_loss(p), kl_fn(p, scale=scale))}
    tx = trpo(0.01, max_backtracks=max_backtracks)
    state = tx.update(grads, None, START, kl_product=product, **arguments)[1]
    np.testing.assert_allclose(state.fraction, fraction, rtol=1e-3)
    np.testing.assert_allclose(state.kl, 0.009 if fraction else 0, rtol=1e-3)


def test_a_step_that_improves_nothing_is_shortened_by_the_ratio():
    _, state = step(trpo(0.5, backtrack_ratio=0.7), lambda p: linear_loss(p) + 3.0 * kl_fn(p), lambda p: kl_fn(p, scale=0.1))
    assert state.fraction == np.float32(0.7)  # the loss is higher at 1
    assert state.change < 0


@pytest.mark.parametrize(("hvp", "ratio"), [("exact", 2.0), ("finite_differences", 1.0)])
def test_a_product_that_the_caller_knows_is_used_for_the_exact_one(hvp, ratio):
    def with_product(scale):
        value, grads = jax.value_and_grad(linear_loss)(START)
        product = lambda v: jax.tree.map(lambda leaf: scale * leaf, v)  # noqa: E731
        both = lambda p: (linear_loss(p), kl_fn(p))  # noqa: E731
        return trpo(0.01, hvp=hvp).update(grads, None, START, value=value, value_and_kl_fn=both, kl_product=product)[0]

    # Steps go with the root of the curvature.
    np.testing.assert_allclose(with_product(100.0)["b"] / with_product(400.0)["b"], ratio, rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
@pytest.mark.parametrize("value_fn", [linear_loss, lambda p: jnp.sin(40 * p["b"]) + p["a"] @ p["a"]], ids=["linear", "wild"])
def test_every_step_keeps_to_the_bound_and_improves(scale, value_fn):
    """The divergence has a steep quartic term that its Hessian at the start tells nothing of."""

    def quartic(params):
        return kl_fn(params) + scale * jnp.sum((params["a"] - START["a"]) ** 4 + (params["b"] - START["b"]) ** 4)

    updates, state = step(trpo(0.5), value_fn, quartic)
    moved = optax.apply_updates(START, updates)
    assert state.fraction > 0
    assert quartic(moved) <= 0.5 * (1 + 1e-6)
    assert value_fn(moved) < value_fn(START)
    np.testing.assert_allclose(state.kl, quartic(moved), rtol=1e-5)
    np.testing.assert_allclose(state.change, value_fn(moved) - value_fn(START), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("value_fn", "kl_fn"),
    [
        (lambda p: linear_loss(p) + 1e6 * kl_fn(p), kl_fn),  # no step improves
        (linear_loss, lambda p: kl_fn(p) + jnp.where(p["b"] == START["b"], 0.0, 1.0)),  # every step breaks the bound
        (lambda p: linear_loss(p) + jnp.where(p["b"] == START["b"], 0.0, jnp.nan), kl_fn),
        (linear_loss, lambda p: kl_fn(p) + jnp.where(p["b"] == START["b"], 0.0, jnp.nan)),
        (linear_loss, lambda p: -kl_fn(p)),  # no trust region: the length of the step is not a number
    ],
    ids=["no improvement", "bound", "loss not a number", "divergence not a number", "negative curvature"],
)
def test_parameters_are_left_alone_if_no_step_is_acceptable(value_fn, kl_fn):
    updates, state = step(trpo(0.01, max_backtracks=5), value_fn, kl_fn)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    assert (state.fraction, state.change, state.kl) == (0, 0, 0)


def test_no_gradient_no_step():
    updates, state = step(trpo(0.01), lambda p: 0.0 * linear_loss(p))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    assert state.fraction == 0


def test_backtracking_takes_the_first_acceptable_fraction():
    def attempt(fraction):
        return fraction < 0.3, jnp.float32(0.5), jnp.stack([10 * fraction, -fraction])

    fraction, numbers = backtrack(attempt, 15)
    assert (fraction, *numbers) == (0.25, 2.5, -0.25)
    fraction, numbers = backtrack(attempt, 2)
    assert (fraction, *numbers) == (0, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_kl": 0.0}, "max_kl must be positive and finite, got 0.0"),
        ({"max_kl": float("nan")}, "max_kl must be positive"),
        ({"damping": 0.0}, "damping must be positive and finite, got 0.0"),
        ({"damping": -1.0}, "damping must be positive"),
        ({"backtrack_ratio": 1.0}, "backtrack_ratio must lie between 0 and 1"),
        ({"cg_steps": 0}, "cg_steps must be a whole number of at least 1"),
        ({"max_backtracks": 0}, "max_backtracks must be a whole number of at least 1"),
        ({"hvp": "guess"}, "hvp must be one of"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        trpo(**{"max_kl": 0.01} | arguments)
