"""Meta-gradients of MAML in float64: finite differences, an independent implementation, stored numbers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from mamljax.inner import adapt
from mamljax.losses import mse
from mamljax.maml import fine_tune
from mamljax.types import Examples, Model, Task

EXACT = ("mixed", "reverse")


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def smooth_network(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


MODEL = Model(init=lambda key: None, apply=smooth_network)


def problem(seed, hidden=5):
    """Parameters and three tasks, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    params = {"w1": rng.normal(size=(1, hidden)), "b1": rng.normal(size=(1, hidden)), "w2": rng.normal(size=(hidden, 1))}
    support, query = (Examples(rng.normal(size=(3, 4, 1)), rng.normal(size=(3, 4, 1))) for _ in range(2))
    return params, Task(support, query)


def meta_loss(params, tasks, mode, steps, alpha=0.1):
    def task_loss(task):
        adapted, _ = fine_tune(MODEL, mse, params, task.support, optax.sgd(alpha), steps, differentiation=mode)
        return mse(MODEL.apply(adapted, task.query.x), task.query.y)

    return jax.vmap(task_loss)(tasks).mean()


class NumPyMAML:
    """MAML on the network above, with every derivative worked out by hand."""

    def __init__(self, alpha, steps):
        self.alpha, self.steps = alpha, steps

    @staticmethod
    def gradient(theta, x, y):
        hidden = np.tanh(x @ theta["w1"] + theta["b1"])
        error = 2 * (hidden @ theta["w2"] - y) / y.size
        back = (error @ theta["w2"].T) * (1 - hidden**2)
        return {"w1": x.T @ back, "b1": back.sum(0, keepdims=True), "w2": hidden.T @ error}

    @staticmethod
    def hessian_vector_product(theta, v, x, y):
        """Pearlmutter's R-operator: the derivative of `gradient` along v."""
        hidden = np.tanh(x @ theta["w1"] + theta["b1"])
        slope = 1 - hidden**2
        r_hidden = slope * (x @ v["w1"] + v["b1"])
        error = 2 * (hidden @ theta["w2"] - y) / y.size
        r_error = 2 * (r_hidden @ theta["w2"] + hidden @ v["w2"]) / y.size
        r_back = (r_error @ theta["w2"].T + error @ v["w2"].T) * slope + (error @ theta["w2"].T) * (-2 * hidden * r_hidden)
        return {"w1": x.T @ r_back, "b1": r_back.sum(0, keepdims=True), "w2": r_hidden.T @ error + hidden.T @ r_error}

    def meta_gradient(self, theta, tasks, second_order=True):
        total = {name: np.zeros_like(value) for name, value in theta.items()}
        count = len(tasks.support.x)
        for i in range(count):
            support, query = ((examples.x[i], examples.y[i]) for examples in tasks)
            path = [theta]
            for _ in range(self.steps):
                gradient = self.gradient(path[-1], *support)
                path.append({name: value - self.alpha * gradient[name] for name, value in path[-1].items()})
            v = self.gradient(path[-1], *query)
            for at in reversed(path[:-1]):
                if second_order:
                    product = self.hessian_vector_product(at, v, *support)
                    v = {name: value - self.alpha * product[name] for name, value in v.items()}
            total = {name: value + v[name] / count for name, value in total.items()}
        return total


def assert_close(actual, expected, rtol=1e-9):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("mode", EXACT)
def test_against_finite_differences(mode, steps):
    params, tasks = problem(0)
    check_grads(lambda params: meta_loss(params, tasks, mode, steps), (params,), order=1, modes="rev", eps=1e-6, rtol=1e-6)


def test_first_order_fails_finite_differences():
    params, tasks = problem(0)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_grads(
            lambda params: meta_loss(params, tasks, "first_order", 3), (params,), order=1, modes="rev", eps=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("mode", ["mixed", "reverse", "first_order"])
def test_against_numpy(mode, steps):
    params, tasks = problem(1)
    expected = NumPyMAML(0.1, steps).meta_gradient(params, tasks, second_order=mode != "first_order")
    assert_close(jax.grad(meta_loss)(params, tasks, mode, steps), expected)


def test_reverse_equals_mixed_and_first_order_differs():
    params, tasks = problem(2)
    mixed, reverse, first = (jax.grad(meta_loss)(params, tasks, mode, 3) for mode in ("mixed", "reverse", "first_order"))
    assert_close(mixed, reverse)
    assert np.abs(first["w1"] - reverse["w1"]).max() > 0.01 * np.abs(reverse["w1"]).max()


@pytest.mark.parametrize("mode", EXACT)
def test_closed_form_on_linear_regression(mode):
    """theta' = theta - alpha A (theta - theta*), so the meta-gradient is (I - alpha A) B (theta' - phi*)."""
    rng = np.random.default_rng(3)
    x, z, theta, optimum = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)), rng.normal(size=(3, 1)), rng.normal(size=(3, 1))
    a, b, alpha = 2 * x.T @ x / 6, 2 * z.T @ z / 6, 0.05
    linear = Model(init=lambda key: None, apply=lambda params, x: x @ params)
    adapted = theta - alpha * a @ (theta - optimum)
    expected = (np.eye(3) - alpha * a) @ b @ (adapted - optimum)

    def loss(params):
        final, _ = fine_tune(linear, mse, params, Examples(x, x @ optimum), optax.sgd(alpha), 1, differentiation=mode)
        return mse(linear.apply(final, z), z @ optimum)

    np.testing.assert_allclose(jax.grad(loss)(theta), expected, rtol=1e-10)


@pytest.mark.parametrize("mode", ["mixed", "reverse", "first_order"])
def test_golden_values(mode):
    """Numbers stored with their inputs, computed once by `NumPyMAML`."""
    golden = json.loads((Path(__file__).parent / "golden" / "meta_gradient.json").read_text())
    params = {name: np.array(value) for name, value in golden["params"].items()}
    tasks = Task(*(Examples(*(np.array(values) for values in golden[name])) for name in ("support", "query")))
    gradient = jax.grad(meta_loss)(params, tasks, mode, golden["inner_steps"], golden["alpha"])
    expected = golden["first_order" if mode == "first_order" else "second_order"]
    assert_close(gradient, {name: np.array(value) for name, value in expected.items()})


@jax.custom_jvp
def quantised(x, step):
    """To multiples of a learned step, with the derivative of Esser et al. 2020, that of no function."""
    return jnp.round(x / step) * step


@quantised.defjvp
def _(primals, tangents):
    (x, step), (dx, dstep) = primals, tangents
    return quantised(x, step), dx + (jnp.round(x / step) - x / step) * dstep


def test_mixed_mode_warns_of_derivatives_that_may_be_made_up():
    """Within a loop and a compiled function, too; not of JAX's own, nor of one argument."""

    def loss_fn(params, _):
        x = jax.lax.fori_loop(0, 2, lambda _, x: jax.jit(quantised)(x, params[1]), params[0])
        return jnp.logaddexp(jax.nn.relu(x), params[1])

    params = jnp.array([0.7, 0.3])
    with pytest.warns(UserWarning, match="custom_jvp of several arguments, quantised at .*: choose differentiation='reverse'"):
        adapt(loss_fn, params, jnp.zeros(1), 0.1)
    adapt(loss_fn, params, jnp.zeros(1), 0.1, differentiation="reverse")
    adapt(lambda params, _: jnp.logaddexp(jax.nn.relu(params[0]), params[1]), params, jnp.zeros(1), 0.1)


def test_what_has_no_forward_derivative_is_refused_in_mixed_mode():
    """As functions of the pattern in JAX's documentation, which call themselves; reverse mode takes them."""

    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (double(x), None), lambda _, slope: (2 * slope,))
    model = Model(lambda key: jnp.ones(()), lambda params, x: double(params * x))
    x = jnp.ones((3, 1))

    def meta_loss(params, mode):
        return mse(model.apply(fine_tune(model, mse, params, Examples(x, x), optax.sgd(0.1), 1, differentiation=mode)[0], x), x)

    assert jnp.isfinite(jax.grad(meta_loss)(jnp.ones(()), "reverse"))
    with pytest.raises(ValueError, match="has no derivative in forward mode, which mixed mode needs. Choose .*'reverse'"):
        jax.grad(meta_loss)(jnp.ones(()), "mixed")


def test_an_error_of_the_loss_itself_is_not_taken_for_a_missing_forward_derivative():
    """One that shows only in the second derivative."""

    @jax.custom_jvp
    def slope(x):
        return 2 * x

    @slope.defjvp
    def slope_of_slope(primals, tangents):
        raise TypeError("the user's own")

    @jax.custom_jvp
    def square(x):
        return x**2

    square.defjvp(lambda primals, tangents: (square(*primals), slope(*primals) * tangents[0]))
    model = Model(lambda key: jnp.ones(()), lambda params, x: square(params) * x)
    x = jnp.ones((3, 1))
    with pytest.raises(TypeError, match="the user's own"):
        jax.grad(lambda params: fine_tune(model, mse, params, Examples(x, x), optax.sgd(0.1), 1)[0])(jnp.ones(()))
