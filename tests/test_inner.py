"""The inner loop: values, derivatives of every mode, messages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamljax.inner import adapt
from mamljax.maml import maml
from mamljax.types import Examples, Model, Task

MODES = ("mixed", "reverse", "first_order")
EXACT = ("mixed", "reverse")


def quadratic(params, target):
    return 0.5 * jnp.sum((params - target) ** 2)


@pytest.mark.parametrize("rule", [None, "sgd", optax.sgd])
def test_a_rule_is_a_step_size_or_a_transformation(rule):
    with pytest.raises(ValueError, match="rule must be a step size or an Optax transformation"):
        adapt(quadratic, jnp.ones(2), jnp.zeros((1, 2)), rule)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_gradient_descent_on_a_quadratic(mode, steps):
    """theta_s = target + (1 - alpha)^s (theta_0 - target)."""
    params, target = jnp.array([3.0, -1.0]), jnp.array([1.0, 2.0])
    final, path = adapt(quadratic, params, jnp.tile(target, (steps, 1)), optax.sgd(0.1), differentiation=mode)
    shrink = 0.9 ** np.arange(steps + 1)[:, None]
    np.testing.assert_allclose(path, np.asarray(target) + shrink * np.asarray(params - target), rtol=1e-5)
    np.testing.assert_array_equal(final, path[-1])


def test_each_step_has_its_own_entry_of_data():
    final, _ = adapt(quadratic, jnp.zeros(1), jnp.array([[1.0], [10.0]]), optax.sgd(0.5))
    np.testing.assert_allclose(final, [0.5 + 0.5 * (10 - 0.5)])


@pytest.mark.parametrize("data", [None, jnp.float32(1.0), (jnp.ones(1), jnp.ones(5))])
def test_entries_are_equally_many(data):
    with pytest.raises(
        ValueError, match="data needs arrays with one leading axis in common, an entry for each step; got shapes"
    ):
        adapt(lambda params, entry: params, jnp.float32(0.0), data, optax.sgd(0.5))


def test_no_entries_no_steps():
    final, path = adapt(quadratic, jnp.ones(2), jnp.zeros((0, 2)), optax.sgd(0.5))
    np.testing.assert_array_equal(final, jnp.ones(2))
    np.testing.assert_array_equal(path, jnp.ones((1, 2)))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("mode", "factor"), [("mixed", 0.9), ("reverse", 0.9), ("first_order", 1.0)])
def test_derivative_of_adaptation_on_a_quadratic(mode, factor, steps):
    """d theta_s / d theta_0 = (1 - alpha)^s exactly, and 1 to first order."""

    def final(params):
        return adapt(quadratic, params, jnp.zeros((steps, 1)), optax.sgd(0.1), differentiation=mode)[0].sum()

    np.testing.assert_allclose(jax.grad(final)(jnp.array([3.0])), [factor**steps], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_first_step_is_the_same_in_the_loop_as_before_it(mode, steps):
    params, data = jnp.array([3.0, -1.0]), jax.random.normal(jax.random.key(0), (steps, 2))
    rule = optax.sgd(0.1, momentum=0.9)

    def last(params, unroll_first):
        final, path = adapt(quadratic, params, data, rule, differentiation=mode, unroll_first=unroll_first)
        return final.sum(), (final, path)

    one, other = (jax.value_and_grad(last, has_aux=True)(params, unroll_first) for unroll_first in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, other)


@pytest.mark.parametrize(
    ("steps", "unroll_first", "loops"), [(4, True, {3}), (4, False, {4}), (1, True, set()), (1, False, set())]
)
def test_how_many_steps_the_loop_has(steps, unroll_first, loops):
    """A lone step has none."""
    adapted = lambda params: adapt(quadratic, params, jnp.zeros((steps, 2)), optax.sgd(0.1), unroll_first=unroll_first)  # noqa: E731
    assert lengths_of_loops(jax.make_jaxpr(adapted)(jnp.ones(2)).jaxpr) == loops


@pytest.mark.parametrize(("chunk_size", "in_the_loop"), [(None, 3), (2, 3), (1, 4)])
def test_tasks_taken_one_at_a_time_have_all_steps_in_the_loop(chunk_size, in_the_loop):
    model = Model(lambda key: jnp.ones((1, 1)), lambda params, x: x @ params)
    sizes = {"inner_steps": 4, "eval_steps": 1, "chunk_size": chunk_size}
    learner = maml(model, lambda outputs, y: jnp.mean((outputs - y) ** 2), rule=0.1, tx=optax.sgd(0.1), **sizes)
    tasks = Task(*[Examples(jnp.ones((2, 6, 1)), jnp.ones((2, 6, 1)))] * 2)
    program = jax.make_jaxpr(learner.update)(jax.random.key(0), learner.init(jax.random.key(0)), tasks)
    assert lengths_of_loops(program.jaxpr) - {2} == {in_the_loop}  # two chunks


def lengths_of_loops(jaxpr):
    """Of all loops in a program, those within others too."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found.add(equation.params["length"])
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                found |= lengths_of_loops(getattr(inner, "jaxpr", inner))
    return found


@pytest.mark.parametrize(
    "rule",
    [optax.sgd(0.1, momentum=0.9), optax.adam(0.1, eps_root=1e-8), optax.chain(optax.clip(0.5), optax.sgd(0.3))],
    ids=["momentum", "adam", "clipped"],
)
def test_mixed_mode_equals_reverse_mode_for_any_rule(rule):
    def loss_fn(params, x):
        return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2) + jnp.sum(jnp.sin(params["w"]))

    params = {"w": jax.random.normal(jax.random.key(0), (3, 2)), "b": jnp.ones((1, 2))}
    data = jax.random.normal(jax.random.key(1), (4, 5, 3))

    def outer(params, data, mode):
        final, path = adapt(loss_fn, params, data, rule, differentiation=mode)
        return loss_fn(final, data[0]) + jnp.sum(path["w"][2] ** 3)  # an intermediate step takes part

    mixed, reverse = (jax.grad(outer, argnums=(0, 1))(params, data, mode) for mode in EXACT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), mixed, reverse)


@pytest.mark.parametrize("mode", EXACT)
def test_derivative_in_data_that_also_holds_integers(mode):
    """A step is -alpha (theta - x[y]); its derivative in x[y] is alpha."""

    def loss_fn(params, entry):
        values, index = entry
        return 0.5 * (params - values[index]) ** 2

    def final(values):
        data = (values[None], jnp.array([1]))
        return adapt(loss_fn, jnp.float32(0.0), data, optax.sgd(0.25), differentiation=mode)[0]

    np.testing.assert_allclose(jax.grad(final)(jnp.array([5.0, 7.0])), [0.0, 0.25])


@pytest.mark.parametrize("mode", EXACT)
def test_derivative_in_what_the_loss_closes_over_under_vmap(mode):
    """A step is -alpha (theta - values[index] * noise); floats, integers and random keys of a task are closed over."""

    def final(values, index, key):
        def loss_fn(params, _):
            return 0.5 * (params - values[index] * jax.random.normal(key)) ** 2

        return adapt(loss_fn, jnp.float32(0.0), jnp.zeros(1), optax.sgd(0.25), differentiation=mode)[0]

    values, index, keys = jnp.ones((3, 2)), jnp.array([0, 1, 1]), jax.random.split(jax.random.key(0), 3)
    gradient = jax.grad(lambda values: jax.vmap(final)(values, index, keys).sum())(values)
    expected = 0.25 * np.asarray(jax.vmap(jax.random.normal)(keys))[:, None] * np.eye(2)[index]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("unroll_first", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_derivative_of_the_derivative(steps, unroll_first):
    """In reverse mode, as of a penalty on the meta-gradient: by both exact ways the same, with data and what is closed over."""
    inputs = jax.random.normal(jax.random.key(0), (5, 1))
    data = jnp.linspace(0.5, 1.0, steps)

    def outer(params, mode):
        how = {"differentiation": mode, "unroll_first": unroll_first}
        final, _ = adapt(lambda p, d: (d * (inputs @ p) ** 4).mean(), params, data, 0.1, **how)
        return (final**2).sum()

    def penalty(params, mode):
        return (jax.grad(outer)(params, mode) ** 2).sum()

    mixed, reverse = (jax.grad(penalty)(jnp.array([0.7]), mode) for mode in EXACT)
    np.testing.assert_allclose(mixed, reverse, rtol=1e-5)


def test_reverse_mode_can_be_differentiated_forward():
    def final(params):
        return adapt(quadratic, params, jnp.zeros((2, 1)), optax.sgd(0.1), differentiation="reverse")[0]

    tangent = jax.jvp(final, (jnp.ones(1),), (jnp.ones(1),))[1]
    np.testing.assert_allclose(tangent, [0.81], rtol=1e-6)


def test_tasks_do_not_touch_each_other():
    params, data = jnp.ones(3), jax.random.normal(jax.random.key(0), (4, 2, 3))

    def adapted(data):
        return jax.vmap(lambda d: adapt(quadratic, params, d, optax.sgd(0.1))[0])(data)

    changed = adapted(data.at[1].add(1.0))
    np.testing.assert_array_equal(adapted(data)[jnp.array([0, 2, 3])], changed[jnp.array([0, 2, 3])])
    assert (adapted(data)[1] != changed[1]).all()


@pytest.mark.parametrize("mode", MODES)
def test_loss_must_be_a_scalar(mode):
    with pytest.raises(ValueError, match=r"the loss must be a scalar, got shape \(2,\)\. Take its mean"):
        adapt(
            lambda params, target: (params - target) ** 2, jnp.ones(2), jnp.zeros((1, 2)), optax.sgd(0.1), differentiation=mode
        )


def test_parameters_must_be_floating_point():
    params = {"layer": {"w": jnp.ones(2), "count": jnp.ones(2, jnp.int32)}}
    with pytest.raises(ValueError, match=r"params\['layer'\]\['count'\] has dtype int32.*Convert it"):
        adapt(lambda params, _: params["layer"]["w"].sum(), params, jnp.zeros(1), optax.sgd(0.1))


def test_unknown_differentiation():
    with pytest.raises(ValueError, match=r"must be one of \('mixed', 'reverse', 'first_order'\), got 'second'"):
        adapt(quadratic, jnp.ones(2), jnp.zeros((1, 2)), optax.sgd(0.1), differentiation="second")
