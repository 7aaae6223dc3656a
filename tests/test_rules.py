"""Inner rules: step sizes, Optax transformations, per-parameter and learned step sizes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from mamljax.baselines.meta_lstm import meta_lstm
from mamljax.inner import adapt
from mamljax.losses import mse
from mamljax.maml import maml
from mamljax.models import mixed_precision, mlp, with_context
from mamljax.rules import all_but, checked_rule, learned_by_step, learned_step_sizes
from mamljax.tasks.sinusoid import sinusoid
from mamljax.types import Examples, Model, Task

KEY = jax.random.key(0)
MODEL = mlp(1, (4,), 1)
PARAMS = {"a": jnp.ones(2), "b": jnp.ones(3)}


@pytest.mark.parametrize("step_size", [0.0, -0.1, float("nan"), float("inf")])
def test_step_size_must_be_positive_and_finite(step_size):
    with pytest.raises(ValueError, match="the inner step size must be positive and finite, got"):
        checked_rule(step_size, PARAMS, differentiable=True)
    with pytest.raises(ValueError, match="positive and finite"):
        learned_step_sizes(mlp(1, (2,), 1), step_size)


@pytest.mark.parametrize(
    "rule",
    [optax.adam(0.1), optax.rmsprop(0.1, eps=0.0), optax.adamw(0.1), optax.radam(0.1, eps_root=1e-8)],
    ids=["adam", "rmsprop", "adamw", "radam"],  # the last one in a later step
)
def test_rules_without_finite_meta_gradients_are_refused(rule):
    with pytest.raises(ValueError, match=r"no finite derivative where entries or whole arrays of the .* zero.*eps_root=1e-8"):
        checked_rule(rule, PARAMS, differentiable=True)
    assert checked_rule(rule, PARAMS, differentiable=False) is rule


def test_so_they_are_where_jax_looks_for_nan_itself():
    with jax.debug_nans(True), pytest.raises(ValueError, match="eps_root=1e-8"):
        checked_rule(optax.adam(0.1), PARAMS, differentiable=True)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jnp.log(-1.0)


@pytest.mark.parametrize("name", PARAMS)
def test_a_rule_without_a_derivative_where_a_whole_array_is_zero_is_refused(name):
    """As dead layers have it: the root mean square of an array of zeros has none. Whichever array that is."""
    clipped = optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(0.1))
    labels = dict.fromkeys(PARAMS, "plain") | {name: "clipped"}
    rule = optax.partition({"clipped": clipped, "plain": optax.sgd(0.1)}, labels)
    with pytest.raises(ValueError, match="no finite derivative where entries or whole arrays of the gradient are zero"):
        checked_rule(rule, PARAMS, differentiable=True)


def test_first_order_maml_takes_rules_without_finite_meta_gradients_and_no_other():
    build = functools.partial(maml, MODEL, mse, rule=optax.adam(0.1), inner_steps=1, eval_steps=1, tx=optax.sgd(0.1))
    build(differentiation="first_order")
    for differentiation in ("mixed", "reverse"):
        with pytest.raises(ValueError, match="no finite derivative"):
            build(differentiation=differentiation)


CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
GOOD = [optax.adam(0.1, eps_root=1e-8), optax.sgd(0.1, momentum=0.9), optax.adagrad(0.1), CLIPPED]


@pytest.mark.parametrize("rule", GOOD, ids=["adam", "momentum", "adagrad", "clipped"])
def test_other_rules_pass(rule):
    assert checked_rule(rule, PARAMS, differentiable=True) is rule


@pytest.mark.parametrize("rule", [optax.polyak_sgd(), optax.lbfgs(), optax.lookahead(optax.sgd(0.1), 5, 0.5)])
def test_rules_that_need_more_than_gradients_and_parameters_are_refused(rule):
    for differentiable in (True, False):
        with pytest.raises(ValueError, match="the inner rule failed when given gradients and parameters, which is all it gets"):
            checked_rule(rule, PARAMS, differentiable=differentiable)


def test_a_flag_is_no_step_size():
    with pytest.raises(ValueError, match="rule must be a step size or an Optax transformation, got True"):
        checked_rule(True, PARAMS, differentiable=True)


def test_a_number_of_any_kind_is_a_step_size():
    for number in (1, np.float32(1.0), np.array(1.0), jnp.float32(1.0)):
        rule = checked_rule(number, PARAMS, differentiable=True)
        assert rule.update(jnp.float32(2.0), rule.init(jnp.float32(0.0)))[0] == -2.0


@pytest.mark.parametrize("rule_of", [lambda lr: lr, optax.sgd, lambda lr: all_but([], lr)], ids=["number", "sgd", "all_but"])
def test_step_sizes_can_be_traced(rule_of):
    """A search over step sizes is one program."""
    tasks = jax.vmap(sinusoid(shots=3, queries=3))(jax.random.split(KEY, 2))

    def loss_after(lr):
        learner = maml(MODEL, mse, rule=rule_of(lr), inner_steps=1, eval_steps=1, tx=optax.sgd(0.1))
        return learner.update(KEY, learner.init(KEY), tasks)[1]["grad_norm"]

    np.testing.assert_allclose(jax.vmap(loss_after)(jnp.array([0.01, 0.1])), [loss_after(0.01), loss_after(0.1)], rtol=1e-5)


def test_a_learned_rule_goes_with_its_model():
    for _, rule in (learned_step_sizes(MODEL, 0.1), learned_by_step(MODEL, 0.1, 1)):
        with pytest.raises(ValueError, match="the inner rule looks for '(alpha|step)' in the parameters.*pass both"):
            maml(MODEL, mse, rule=rule, inner_steps=1, eval_steps=1, tx=optax.sgd(0.1))
    with pytest.raises(ValueError, match="the inner step size must be positive and finite, got <function"):
        learned_step_sizes(MODEL, optax.cosine_decay_schedule(0.1, 5))


def test_a_schedule_is_not_a_rule():
    with pytest.raises(ValueError, match="rule must be a step size or an Optax transformation, got <function.*optax.sgd"):
        checked_rule(optax.cosine_decay_schedule(0.1, 5), PARAMS, differentiable=True)


def test_integer_parameters_are_refused_at_once():
    with pytest.raises(ValueError, match=r"params\['n'\] has dtype int32"):
        checked_rule(0.1, {"n": jnp.ones(2, jnp.int32)}, differentiable=True)


def test_the_refused_rule_does_make_nan():
    """The reason for the check: one parameter with a zero gradient is enough."""

    def final(params, rule):
        return adapt(lambda p, _: (p**2).sum(), params, jnp.zeros(1), rule)[0].sum()

    assert jnp.isnan(jax.grad(final)(jnp.zeros(1), optax.adam(0.1))).all()
    assert jnp.isfinite(jax.grad(final)(jnp.zeros(1), optax.adam(0.1, eps_root=1e-8))).all()


def test_step_sizes_per_parameter():
    rule = optax.partition({"fast": optax.sgd(0.5), "frozen": optax.set_to_zero()}, {"a": "fast", "b": "frozen"})
    final, _ = adapt(
        lambda p, _: p["a"].sum() + p["b"].sum(), PARAMS, jnp.zeros(2), checked_rule(rule, PARAMS, differentiable=True)
    )
    np.testing.assert_allclose(final["a"], 0.0)
    np.testing.assert_allclose(final["b"], 1.0)


def test_learned_step_sizes_begin_as_gradient_descent():
    model = mlp(1, (8,), 1)
    learning, rule = learned_step_sizes(model, 0.1)
    params, x = model.init(jax.random.key(0)), jnp.ones((4, 1))
    data = jnp.zeros((3, 1))
    plain, _ = adapt(lambda p, _: jnp.mean(model.apply(p, x) ** 2), params, data, optax.sgd(0.1))
    learned, _ = adapt(lambda p, _: jnp.mean(learning.apply(p, x) ** 2), learning.init(jax.random.key(0)), data, rule)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, learned["theta"])
    assert all((leaf == 0.1).all() for leaf in jax.tree.leaves(learned["alpha"]))


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_meta_gradient_of_a_learned_step_size(mode):
    """L = theta'^2 / 2 with theta' = theta - alpha theta: dL/dalpha = -theta' theta."""

    def outer(params):
        final, _ = adapt(lambda p, _: 0.5 * p["theta"] ** 2, params, jnp.zeros(1), rule, differentiation=mode)
        return 0.5 * final["theta"] ** 2

    _, rule = learned_step_sizes(mlp(1, (2,), 1), 0.1)
    gradient = jax.grad(outer)({"theta": jnp.float32(3.0), "alpha": jnp.float32(0.1)})
    np.testing.assert_allclose(gradient["alpha"], -2.7 * 3.0, rtol=1e-6)
    np.testing.assert_allclose(gradient["theta"], 2.7 * 0.9, rtol=1e-6)


def test_maml_learns_step_sizes():
    model, rule = learned_step_sizes(mlp(1, (8,), 1), 0.01)
    learner = maml(model, mse, rule=rule, inner_steps=2, eval_steps=2, tx=optax.adam(1e-2))
    x = jnp.linspace(-1, 1, 5)[None, :, None]
    tasks = Task(*[Examples(x, jnp.sin(x))] * 2)
    state, _ = jax.jit(learner.update)(jax.random.key(0), learner.init(jax.random.key(0)), tasks)
    assert any((leaf != 0.01).any() for leaf in jax.tree.leaves(state.params["alpha"]))


SCALED = Model(lambda key: {"kernel": jnp.float32(2.0), "scale": jnp.float32(1.0)}, lambda p, x: p["kernel"] * p["scale"] * x)


def test_each_step_has_its_own_step_sizes_and_parameters():
    """Of the kernel; the scale of the network after i steps is its i-th one, and beyond the last step its last."""
    model, rule = learned_by_step(SCALED, 0.5, 2, per_step="scale")
    params = model.init(jax.random.key(0))
    assert params["step_sizes"]["kernel"].tolist() == [0.5, 0.5]
    assert params["theta"]["scale"].tolist() == [1, 1, 1]
    params["theta"]["scale"], params["step_sizes"]["kernel"] = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 0.25])
    _, path = adapt(lambda p, _: model.apply(p, 1.0), params, jnp.zeros(4), rule)
    # Its derivative is the scale: 2 - 0.5 * 1, - 0.25 * 2, and from there on with the last step size and the last scale.
    np.testing.assert_allclose(path["theta"]["kernel"], [2, 1.5, 1, 0.25, -0.5])
    np.testing.assert_allclose(jax.vmap(model.apply, (0, None))(path, 1.0), [2, 3, 3, 0.75, -1.5])
    assert path["step"].tolist() == [0, 1, 2, 3, 4]


def test_the_count_of_steps_may_have_moved_a_little():
    """As by noise of the outer optimiser, to which it is a parameter."""
    model, rule = learned_by_step(SCALED, 0.5, 2, per_step="scale")
    params = model.init(jax.random.key(0))
    params["step_sizes"]["kernel"] = jnp.array([0.5, 0.25])
    for moved in (-1e-3, 1e-3):
        _, path = adapt(lambda p, _: model.apply(p, 1.0), params | {"step": jnp.float32(moved)}, jnp.zeros(2), rule)
        np.testing.assert_allclose(path["theta"]["kernel"], [2, 1.5, 1.25])


@pytest.mark.parametrize("mode", ["mixed", "reverse"])
def test_meta_gradient_of_what_each_step_has_of_its_own(mode):
    """L = k_2 s_2 with k_2 = k - a_0 s_0 - a_1 s_1."""
    model, rule = learned_by_step(SCALED, 0.5, 2, per_step="scale")
    params = model.init(jax.random.key(0))
    params["theta"]["scale"], params["step_sizes"]["kernel"] = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 0.25])

    def outer(params):
        final, _ = adapt(lambda p, _: model.apply(p, 1.0), params, jnp.zeros(2), rule, differentiation=mode)
        return model.apply(final, 1.0)

    gradient = jax.grad(outer)(params)
    np.testing.assert_allclose(gradient["theta"]["kernel"], 3)
    np.testing.assert_allclose(gradient["theta"]["scale"], [-0.5 * 3, -0.25 * 3, 1])
    np.testing.assert_allclose(gradient["step_sizes"]["kernel"], [-1 * 3, -2 * 3])
    assert gradient["step"] == 0


def test_what_steps_can_not_have_of_their_own_is_refused():
    with pytest.raises(ValueError, match=r"no parameter and no layer is called \['shift'\]"):
        learned_by_step(SCALED, 0.5, 2, per_step="shift")
    with pytest.raises(ValueError, match="inner_steps must be a whole number of at least 1, got 0"):
        learned_by_step(SCALED, 0.5, 0)
    for step_size in (-0.5, optax.sgd(0.1)):
        with pytest.raises(ValueError, match="positive and finite"):
            learned_by_step(SCALED, step_size, 2)


def test_all_but_does_not_divide_a_rule_by_step():
    with pytest.raises(ValueError, match="all_but cannot divide the rule of learned_by_step. Name what is not to be adapted"):
        all_but("Dense_0", learned_by_step(mlp(1, (4,), 1), 0.1, 2)[1])


def test_all_but_leaves_the_named_parameters_to_the_outer_loop():
    params = {"Conv": {"kernel": jnp.ones(2)}, "Norm": {"shift": jnp.ones(2), "scale": jnp.ones(2)}}

    def loss_fn(params, entry):
        return (params["Conv"]["kernel"] * params["Norm"]["scale"] * entry + params["Norm"]["shift"]).sum()

    rule = all_but(("shift", "scale"), 0.5)
    final, _ = adapt(loss_fn, params, jnp.array([2.0]), rule)
    np.testing.assert_allclose(final["Conv"]["kernel"], 1 - 0.5 * 2)
    np.testing.assert_array_equal(final["Norm"]["shift"], params["Norm"]["shift"])
    np.testing.assert_array_equal(final["Norm"]["scale"], params["Norm"]["scale"])
    meta_gradient = jax.grad(lambda params: adapt(loss_fn, params, jnp.array([2.0]), rule)[0]["Conv"]["kernel"].sum())(params)
    np.testing.assert_allclose(meta_gradient["Norm"]["scale"], -0.5 * 2)  # it reaches the frozen ones through the others


def test_all_but_knows_attributes_by_their_names():
    class Norm(NamedTuple):
        shift: Array
        weight: Array

    params = Norm(jnp.ones(2), jnp.ones(2))
    rule = all_but(("shift",), 0.5)
    updates, _ = rule.update(params, rule.init(params), params)
    assert (updates.shift.tolist(), updates.weight.tolist()) == ([0.0, 0.0], [-0.5, -0.5])


def test_all_but_knows_layers_by_their_names():
    """ANIL, which adapts the last layer alone, and BOIL, which adapts all others; a single name needs no tuple."""
    model = mlp(1, (4, 4), 1)
    params = model.init(jax.random.key(0))
    for frozen, names in ((("Dense_0", "Dense_1"), {"Dense_0", "Dense_1"}), ("Dense_2", {"Dense_2"})):
        rule = all_but(frozen, 0.5)
        updates, _ = rule.update(params, rule.init(params), params)
        moved = {layer for layer, leaves in updates.items() if leaves["kernel"].any()}
        assert moved == params.keys() - names


def test_all_but_knows_a_layer_within_another():
    params = {part: {"Dense_0": {"kernel": jnp.ones(2)}} for part in ("encoder", "decoder")}
    rule = all_but("encoder/Dense_0", 0.5)
    updates, _ = rule.update(params, rule.init(params), params)
    assert jax.tree.map(lambda leaf: leaf.any().item(), updates) == {
        "encoder": {"Dense_0": {"kernel": False}},
        "decoder": {"Dense_0": {"kernel": True}},
    }
    with pytest.raises(ValueError, match=r"no parameter and no layer is called \['Dense_0/encoder'\]"):
        all_but("Dense_0/encoder", 0.5).init(params)


def test_all_but_refuses_a_name_that_nothing_has():
    with pytest.raises(
        ValueError, match=r"no parameter and no layer is called \['scale'\]. There are \['Dense_0', 'Dense_1', 'bias'"
    ):
        maml(mlp(1, (4,), 1), mse, rule=all_but(("bias", "scale"), 0.5), inner_steps=1, eval_steps=1, tx=optax.adam(1e-3))


def test_all_but_leaves_something_to_adapt():
    rule = all_but(["a", "b"], 0.1)
    with pytest.raises(ValueError, match=r"\['a', 'b'\] are all the parameters there are. Leave some to adapt"):
        rule.init(PARAMS)


def test_all_but_checks_its_step_size():
    with pytest.raises(ValueError, match="positive and finite"):
        all_but(("shift",), -1.0)


@pytest.mark.parametrize(
    "learning",
    [
        lambda model: learned_step_sizes(model, 0.1),
        lambda model: learned_by_step(model, 0.1, 2),
        lambda model: meta_lstm(model, 0.1),
    ],
)
def test_a_model_that_learns_its_rule_is_not_given_another(learning):
    """With a step size it would be plain MAML, under the name of the method."""
    model, rule = learning(mlp(1, (2,), 1))
    settings = {"inner_steps": 2, "eval_steps": 2, "tx": optax.adam(1e-3), "differentiation": "first_order"}
    maml(model, mse, rule=rule, **settings)
    with pytest.raises(ValueError, match=r"the model learns its own inner rule, .* with rule=0.1. Pass that rule"):
        maml(model, mse, rule=0.1, **settings)


def test_a_rule_that_clips_serves_scalars_and_half_precision():
    """No gradient that is zero as a whole is tried, which would have no norm to differentiate."""
    for params in (
        {"w": jnp.ones(()), "b": jnp.ones(())},
        {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)},
    ):
        assert checked_rule(CLIPPED, params, differentiable=True) is CLIPPED


def test_a_wrapped_model_that_learns_its_rule_refuses_a_step_size_too():
    model, _ = learned_step_sizes(mlp(3, (2,), 1), 0.1)
    for wrapped in (mixed_precision(model), with_context(model, 2)):
        with pytest.raises(ValueError, match="the model learns its own inner rule"):
            maml(wrapped, mse, rule=0.1, inner_steps=1, eval_steps=1, tx=optax.adam(1e-3))
