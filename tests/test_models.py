"""Networks of Linen and NNX as pure functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from mamljax.losses import mse
from mamljax.maml import maml
from mamljax.models import from_linen, from_nnx, gaussian_policy, mixed_precision, mlp, with_context, with_linear_head
from mamljax.types import Examples, Model, Task

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 3))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)])

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        return self.layers[1](nnx.relu(self.layers[0](x)))


def test_mlp_against_numpy():
    model = mlp(3, (4,), 2, kernel_init=jax.nn.initializers.normal(1.0))
    params = jax.tree.map(np.asarray, model.init(KEY))
    hidden = np.maximum(np.asarray(X) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], 0)
    expected = hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    np.testing.assert_allclose(model.apply(params, X), expected, rtol=1e-5, atol=1e-6)


def test_mlp_keeps_the_scale_of_its_inputs():
    params = mlp(100, (100,), 1).init(KEY)
    np.testing.assert_allclose(params["Dense_0"]["kernel"].std(), 0.1, rtol=0.03)  # 10,000 samples tell it to 1 %
    assert not params["Dense_0"]["bias"].any()


def test_mlp_begins_all_its_weights_as_it_is_told():
    params = mlp(3, (4, 5), 2, kernel_init=jax.nn.initializers.constant(0.25)).init(KEY)
    assert [layer["kernel"].shape for layer in params.values()] == [(3, 4), (4, 5), (5, 2)]
    assert all((layer["kernel"] == 0.25).all() for layer in params.values())


def test_weights_of_a_policy_are_uniform_up_to_the_bound_of_glorot():
    """sqrt(6 / (inputs + outputs)) of a layer; thousands of samples come near to it."""
    params = gaussian_policy(60, 20, hidden_sizes=(40,)).init(KEY)["MLP_0"]
    for name, units in (("Dense_0", 60 + 40), ("Dense_1", 40 + 20)):
        kernel = params[name]["kernel"]
        np.testing.assert_allclose(jnp.abs(kernel).max(), np.sqrt(6 / units), rtol=0.01)
        np.testing.assert_allclose(kernel.std(), np.sqrt(2 / units), rtol=0.1)


def test_hidden_sizes_are_several():
    with pytest.raises(ValueError, match=r"hidden_sizes must be a sequence, such as \(40, 40\), got 8"):
        mlp(1, 8, 1)


@pytest.mark.parametrize(("inputs", "hidden", "outputs"), [(0, (4,), 1), (1, (4, 0), 1), (1, (4,), -1)])
def test_mlp_sizes_are_positive(inputs, hidden, outputs):
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        mlp(inputs, hidden, outputs)


@pytest.mark.parametrize("model", [mlp(3, (8,), 2), from_nnx(NNXNet)], ids=["linen", "nnx"])
def test_models_are_pure(model):
    params = model.init(KEY)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    before = jax.tree.map(np.asarray, params)
    np.testing.assert_array_equal(model.apply(params, X), model.apply(params, X))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    other = model.init(jax.random.key(7))
    assert jax.tree.structure(other) == jax.tree.structure(params)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True))


def test_nnx_computes_what_linen_does():
    linen_model, nnx_model = mlp(3, (8, 8), 2), from_nnx(NNXNet)
    layers = list(linen_model.init(KEY).values())
    params = {"first": layers[0], "layers": {0: layers[1], 1: layers[2]}}
    assert jax.tree.structure(params) == jax.tree.structure(nnx_model.init(KEY))
    np.testing.assert_allclose(nnx_model.apply(params, X), linen_model.apply(linen_model.init(KEY), X), rtol=1e-5)


@pytest.mark.parametrize("differentiation", ["mixed", "reverse", "first_order"])
def test_nnx_is_adapted_under_jit_vmap_scan_and_grad(differentiation):
    learner = maml(
        from_nnx(NNXNet), mse, rule=0.1, inner_steps=3, eval_steps=1, tx=optax.adam(1e-2), differentiation=differentiation
    )
    tasks = Task(*[Examples(jnp.stack([X, X + 1]), jnp.ones((2, 6, 2)))] * 2)
    state = learner.init(KEY)
    losses = []
    for _ in range(5):
        state, metrics = jax.jit(learner.update)(KEY, state, tasks)
        losses.append(metrics["loss"])
    assert losses[-1] < losses[0]


def test_linen_module_with_state_is_refused():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=False)(x)

    with pytest.raises(ValueError, match=r"Net keeps state in \['batch_stats'\].*Use layers that keep none"):
        from_linen(Net(), X)


def test_linen_module_that_draws_random_numbers_is_refused():
    with pytest.raises(ValueError, match="Dropout draws random numbers.*Switch dropout off, by deterministic=True"):
        from_linen(linen.Dropout(0.5, deterministic=False), X).apply({}, X)
    np.testing.assert_array_equal(from_linen(linen.Dropout(0.5, deterministic=True), X).apply({}, X), X)


def test_modules_go_in_at_their_own_door():
    with pytest.raises(ValueError, match="module must be a Flax Linen module, got Linear. For Flax NNX there is from_nnx"):
        from_linen(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), X)
    for wrong in (nnx.Linear(3, 2, rngs=nnx.Rngs(0)), 3):
        with pytest.raises(ValueError, match="build must be a function that makes the module.*got (Linear|int)"):
            from_nnx(wrong)
    with pytest.raises(ValueError, match="model must be a Model, got Dense. Make one by models.from_linen or from_nnx"):
        maml(linen.Dense(1), mse, rule=0.1, inner_steps=1, eval_steps=1, tx=optax.sgd(0.1))


def test_nnx_module_with_state_is_refused():
    with pytest.raises(ValueError, match=r"variables of type \['BatchStat'\].*Use layers that keep none"):
        from_nnx(lambda rngs: nnx.BatchNorm(3, rngs=rngs))


class Recurrent(nnx.Module):
    """An LSTM with dropout that is switched off: [n, T, 3] -> [n, T, 2]."""

    def __init__(self, rngs, *, dropout, rnn):
        self.rnn = nnx.RNN(nnx.LSTMCell(3, 2, rngs=rngs), **rnn)
        self.dropout = nnx.Dropout(0.5, deterministic=True, **dropout)

    def __call__(self, x):
        return self.dropout(self.rnn(x, rngs=nnx.Rngs(0)))


def test_nnx_layers_that_keep_random_streams_are_refused_with_what_keeps_none():
    for build in (
        functools.partial(Recurrent, dropout={}, rnn={}),
        lambda rngs: Recurrent(rngs, dropout={"rngs": rngs}, rnn={"rngs": False}),
    ):
        with pytest.raises(ValueError, match=r"\['RngCount', 'RngKey'\].*deterministic=True.*rngs=False"):
            from_nnx(build)
    model = from_nnx(functools.partial(Recurrent, dropout={}, rnn={"rngs": False}))
    assert model.apply(model.init(KEY), jnp.ones((5, 7, 3))).shape == (5, 7, 2)


def test_a_context_stands_beside_every_input():
    network = mlp(2 + 3, (4,), 1)
    model = with_context(network, 3)
    params = model.init(jax.random.key(0)) | {"context": jnp.array([1.0, 2.0, 3.0])}
    x = jax.random.normal(jax.random.key(1), (5, 2))
    beside = jnp.concatenate([x, jnp.tile(params["context"], (5, 1))], axis=1)
    np.testing.assert_array_equal(model.apply(params, x), network.apply(params["network"], beside))
    whole = model.apply(params | {"context": jnp.array([0.5, 0.25, -1.5])}, jnp.ones((1, 2), jnp.int32))
    np.testing.assert_array_equal(whole, network.apply(params["network"], jnp.array([[1, 1, 0.5, 0.25, -1.5]])))
    half = with_context(Model(lambda key: {}, lambda params, x: x), 3)  # what the network sees
    assert half.apply(half.init(jax.random.key(0)), jnp.ones((5, 2), jnp.bfloat16)).dtype == jnp.bfloat16
    assert with_context(network, np.int64(3)).init(jax.random.key(0))["context"].shape == (3,)
    for shape in (0, (4, 4, 0), ()):
        with pytest.raises(ValueError, match="the size of a context must be a whole number of at least 1, got 0"):
            with_context(network, shape)


def test_the_context_of_images_is_further_channels():
    model = with_context(Model(lambda key: {}, lambda params, x: x), (2, 2, 1))
    context = jnp.arange(4.0).reshape(2, 2, 1)
    images = jax.random.normal(jax.random.key(0), (3, 2, 2, 3))
    seen = model.apply(model.init(jax.random.key(0)) | {"context": context}, images)
    np.testing.assert_array_equal(seen[..., :3], images)
    np.testing.assert_array_equal(seen[..., 3:], jnp.tile(context, (3, 1, 1, 1)))


def test_a_head_keeps_the_scale_of_its_features_and_is_drawn_apart_from_them():
    """Features whose weights have the shape and the distribution of the head's, so that the same key would give the same."""
    init = jax.nn.initializers.lecun_normal()
    features = Model(lambda key: init(key, (100, 100)), lambda params, x: x @ params)
    params = with_linear_head(features, jnp.zeros((1, 100)), 100).init(KEY)
    kernel = params["head"]["kernel"]
    np.testing.assert_allclose(kernel.std(), 0.1, rtol=0.03)  # 10,000 samples tell it to 1 %
    assert not params["head"]["bias"].any()
    assert abs(np.corrcoef(kernel.ravel(), params["features"].ravel())[0, 1]) < 0.05


def test_head_needs_flat_features():
    with pytest.raises(ValueError, match=r"features must be \[n, d\], got \[1, 4, 4, 1\]. Flatten them"):
        with_linear_head(Model(lambda key: {}, lambda params, x: x), jnp.zeros((1, 4, 4, 1)), 3)


def test_inputs_may_be_a_dict_in_mixed_precision():
    model = Model(lambda key: {"w": jnp.ones(3)}, lambda params, x: params["w"] * x["a"] + x["which"].astype(x["a"].dtype))
    inputs = {"a": jnp.full(3, 1.001), "which": jnp.arange(3)}
    outputs = mixed_precision(model).apply(model.init(KEY), inputs)
    assert outputs.dtype == jnp.float32
    np.testing.assert_array_equal(outputs, np.arange(3) + 1.0)  # of 1.001 bfloat16 keeps 1
    with pytest.raises(ValueError, match="a context is put beside inputs of one array, got dict"):
        with_context(model, 2).apply({"context": jnp.zeros(2), "network": model.init(KEY)}, inputs)


def test_mixed_precision_calculates_in_half_precision_between_whole_numbers():
    seen = []

    def apply(params, x):
        seen.append((params["w"].dtype, x.dtype))
        return x * params["w"], params["w"]

    model = mixed_precision(Model(lambda key: {"w": jnp.float32(1.0)}, apply))
    product, weight = model.apply({"w": jnp.float32(1 + 2**-7)}, jnp.array([1 + 2**-12, 3.0]))
    assert seen == [(jnp.bfloat16, jnp.bfloat16)]
    assert product.dtype == weight.dtype == jnp.float32
    np.testing.assert_array_equal(product, [1 + 2**-7, 3.03125])  # of 3.0234375, as near as bfloat16 is to it
    model.apply({"w": jnp.float32(1.0)}, jnp.array([1, 3]))
    assert seen[1] == (jnp.bfloat16, jnp.int32)
    with jax.enable_x64(True):
        assert model.apply({"w": jnp.float64(1.0)}, jnp.ones(3))[0].dtype == jnp.float64
    with pytest.raises(ValueError, match=r"dtype must be one of floating-point numbers, got int32. Take jnp.bfloat16"):
        mixed_precision(model, jnp.int32)
