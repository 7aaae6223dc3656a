"""The networks of the image experiments, and their layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from jax import lax

from mamljax import convolution
from mamljax.image_models import BatchStatNorm, Conv3x3, FullyConnectedNet, PooledConvNet, StridedConvNet, _max_pool
from mamljax.inner import adapt
from mamljax.losses import cross_entropy
from mamljax.models import from_linen, mixed_precision

KEY = jax.random.key(0)
IMAGES = jax.random.uniform(jax.random.key(1), (5, 28, 28, 1))


def reference_conv(params, x, stride):
    kernel, bias = params["params"]["kernel"], params["params"]["bias"]
    y = lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + bias[None, None, None]


SIZES = ((7, 7), (8, 6), (1, 1))
AT_ONCE = [(stride, channels, size, 2, 2) for stride, channels in ((1, 3), (1, 16), (2, 3)) for size in SIZES]
IN_PIECES = [(1, 3, (4, 4), 9, 2), (1, 16, (4, 4), 9, 2), (2, 3, (4, 4), 10, 2)]


@pytest.mark.parametrize(("stride", "channels", "size", "images", "images_at_a_time"), AT_ONCE + IN_PIECES)
def test_convolution_is_that_of_xla_in_value_and_in_first_and_second_derivatives(
    stride, channels, size, images, images_at_a_time, monkeypatch
):
    patches_of_one = 9 * size[0] * size[1] * channels * 8 // stride**2
    monkeypatch.setattr(convolution, "PIECE_BYTES", images_at_a_time * patches_of_one)
    monkeypatch.setattr(convolution, "WINOGRAD_PIXELS", 1)
    program = check_convolution(Conv3x3(4, stride=stride), (images, *size, channels))
    assert ("scan" in program) == (images > 4 * images_at_a_time)


def test_patches_of_pieces_are_made_again_for_the_gradients_and_not_kept(monkeypatch):
    monkeypatch.setattr(convolution, "PIECE_BYTES", 1)
    conv, x = Conv3x3(2), jnp.ones((6, 4, 4, 1))
    _, pull = jax.vjp(lambda params: conv.apply(params, x), conv.init(KEY, x))
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) < 3 * x.size  # patches alone have nine times the numbers


@pytest.mark.parametrize(("stride", "parts"), [(1, 12), (2, 3)])
def test_convolution_on_a_gpu_is_the_same_in_parts(stride, parts, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(convolution, "PART_ROWS", 7)
    program = check_convolution(Conv3x3(4, stride=stride), (6, 4, 4, 3))
    assert f"f64[{parts},8,27]" in program


def test_gradients_of_parts_are_summed_in_float32(monkeypatch):
    """Read from the program: a CPU sums in float32 whatever it is told."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(convolution, "PART_ROWS", 1)
    kernel, images = jnp.zeros((3, 3, 1, 1), jnp.bfloat16), jnp.ones((2, 4, 4, 1), jnp.bfloat16)
    gradient = jax.grad(lambda kernel: convolution.by_patches(kernel, images).astype(jnp.float32).sum())
    program = jax.make_jaxpr(gradient)(kernel)
    sums = [equation.invars[0].aval for equation in program.eqns if equation.primitive.name == "reduce_sum"]
    assert (32, 9, 1) in [terms.shape for terms in sums]  # a gradient of each row of patches
    assert {terms.dtype for terms in sums} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("net", "backend"), [(StridedConvNet(5, blocks=2), "cpu"), (PooledConvNet(5, blocks=2), "gpu")])
def test_meta_gradients_in_mixed_precision_are_near_those_in_float32(net, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    whole = from_linen(net, IMAGES[:1])
    params = whole.init(KEY)
    classes = jax.image.resize(jax.random.uniform(KEY, (5, 4, 4, 1)), IMAGES.shape, "linear")
    images = jnp.tile(classes, (3, 1, 1, 1)) + 0.1 * jax.random.normal(KEY, (15, *IMAGES.shape[1:]))
    labels = jnp.arange(15) % 5

    def gradient(model):
        def meta_loss(params):
            def loss(params, entry):
                return cross_entropy(model.apply(params, images), labels)

            adapted, _ = adapt(loss, params, jnp.arange(1), optax.sgd(0.003))
            return cross_entropy(model.apply(adapted, images[::-1]), labels[::-1])

        grads = jax.jit(jax.grad(meta_loss))(params)
        # Nothing depends on the biases of convolutions, which normalisation takes away again.
        parts = [leaf for path, leaf in jax.tree.leaves_with_path(grads) if "bias" not in str(path)]
        assert {leaf.dtype for leaf in parts} == {jnp.dtype("float32")}
        return jnp.concatenate([leaf.ravel() for leaf in parts])

    half, exact = gradient(mixed_precision(whole)), gradient(whole)
    assert half @ exact > 0.95 * jnp.linalg.norm(half) * jnp.linalg.norm(exact)


def check_convolution(conv, shape):
    """It is that of XLA in value and in first and second derivatives; returns its program."""
    with jax.enable_x64(True):
        keys = jax.random.split(KEY, 3)
        x = jax.random.normal(keys[0], shape, jnp.float64)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), conv.init(keys[1], x))
        params["params"]["bias"] += jnp.arange(4.0)
        weights = jax.random.normal(keys[2], conv.apply(params, x).shape, jnp.float64)

        def results(apply):
            def loss(params, x):
                return (weights * jnp.sin(apply(params, x))).sum()

            gradient = jax.grad(loss, argnums=(0, 1))
            first = gradient(params, x)
            second = jax.grad(lambda *args: sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(gradient(*args))), (0, 1))
            return apply(params, x), first, second(params, x)

        ours = jax.jit(results, static_argnums=0)(conv.apply)
        theirs = jax.jit(results, static_argnums=0)(lambda params, x: reference_conv(params, x, conv.stride))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), ours, theirs)
        return str(jax.make_jaxpr(conv.apply)(params, x))


def test_the_way_of_a_convolution_is_chosen_by_its_sizes():
    def way(channels, size, stride=1):
        return convolution.convolution(jnp.ones((3, 3, channels, 4)), (size, size), stride).func

    assert way(16, 16) is convolution.by_winograd
    for sizes in ((15, 16), (16, 15), (16, 16, 2)):
        assert way(*sizes) is convolution.by_patches


class PooledLast(linen.Module):
    """Pooling in its usual place, where a compiled program calculates its input twice."""

    @linen.compact
    def __call__(self, x):
        for _ in range(3):
            x = _max_pool(linen.relu(BatchStatNorm()(Conv3x3(16)(x))))
        return linen.Dense(5)(x.reshape(len(x), -1))


def test_second_derivatives_of_pooling_survive_compilation():
    """What is calculated twice may be rounded differently; `max`, which asks what equals it, then loses derivatives."""
    with jax.enable_x64(True):
        x = jax.random.uniform(KEY, (5, 20, 20, 3), jnp.float64)
        model = from_linen(PooledLast(), x)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), jax.jit(model.init)(KEY))
        keys = iter(jax.random.split(KEY, 20))
        vector = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape, jnp.float64), params)

        def gradient(step):
            moved = jax.tree.map(lambda leaf, direction: leaf + step * direction, params, vector)
            return jax.grad(lambda params: cross_entropy(model.apply(params, x), jnp.arange(5)))(moved)

        product = jax.jit(lambda: jax.jvp(gradient, (0.0,), (1.0,))[1])()
        ahead, behind = (jax.jit(gradient)(step) for step in (1e-8, -1e-8))
        differences = jax.tree.map(lambda a, b: (a - b) / 2e-8, ahead, behind)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), product, differences)


@pytest.mark.parametrize("shape", [(6, 4), (3, 5, 5, 4)])
def test_normalisation_against_numpy(shape):
    x = 3 + 2 * jax.random.normal(KEY, shape)
    norm = BatchStatNorm(use_scale=True)
    params = {"params": {"scale": jnp.arange(1.0, 5.0), "shift": jnp.arange(4.0)}}
    flat = np.asarray(x, np.float64).reshape(-1, 4)
    expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-3) * np.arange(1, 5) + np.arange(4)
    np.testing.assert_allclose(norm.apply(params, x).reshape(-1, 4), expected, rtol=1e-4, atol=1e-4)


def test_normalisation_in_half_precision_has_statistics_in_float32():
    """Of values so far from zero that bfloat16, whose numbers there are 1/2 apart, would round their mean by as much."""
    x = (100 + jax.random.normal(KEY, (8, 5, 5, 2))).astype(jnp.bfloat16)
    found = BatchStatNorm().apply({"params": {"shift": jnp.zeros(2, jnp.bfloat16)}}, x)
    assert found.dtype == jnp.bfloat16
    flat = np.asarray(x, np.float64).reshape(-1, 2)
    expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-3)
    np.testing.assert_allclose(np.asarray(found, np.float64).reshape(-1, 2), expected, atol=0.02)


def test_normalisation_begins_as_the_identity_on_normalised_values_and_has_a_shift_only():
    params = BatchStatNorm().init(KEY, IMAGES)
    assert jax.tree.map(jnp.shape, params) == {"params": {"shift": (1,)}}
    assert not params["params"]["shift"].any()


def test_statistics_of_the_reference_examples_alone():
    """Inductive: the outputs of all examples stay when the last ones change, and are those of the usual normalisation
    for the reference examples themselves."""
    norm = BatchStatNorm(reference=3)
    x = jax.random.normal(KEY, (6, 4))
    params = norm.init(KEY, x)
    changed = norm.apply(params, x.at[5].set(100.0))
    np.testing.assert_array_equal(changed[:5], norm.apply(params, x)[:5])
    np.testing.assert_allclose(changed[:3], BatchStatNorm().apply(params, x[:3]), rtol=1e-6)
    transductive = BatchStatNorm().apply(params, x.at[5].set(100.0))
    assert not np.allclose(transductive[:5], BatchStatNorm().apply(params, x)[:5], atol=1e-2)


def shapes(module, x):
    return {
        name: jax.tree.map(lambda leaf: leaf.shape, layer)
        for name, layer in jax.eval_shape(from_linen(module, x).init, KEY).items()
    }


def test_strided_net_has_the_layers_of_the_paper():
    conv = {f"Conv3x3_{i}": {"kernel": (3, 3, 64 if i else 1, 64), "bias": (64,)} for i in range(4)}
    norm = {f"BatchStatNorm_{i}": {"shift": (64,)} for i in range(4)}
    assert shapes(StridedConvNet(5), IMAGES) == conv | norm | {"Dense_0": {"kernel": (64, 5), "bias": (5,)}}


def test_pooled_net_has_the_layers_of_the_paper():
    conv = {f"Conv3x3_{i}": {"kernel": (3, 3, 32 if i else 3, 32), "bias": (32,)} for i in range(4)}
    norm = {f"BatchStatNorm_{i}": {"shift": (32,)} for i in range(4)}
    head = {"Dense_0": {"kernel": (800, 5), "bias": (5,)}}  # 5 x 5 x 32
    assert shapes(PooledConvNet(5), jnp.zeros((1, 84, 84, 3))) == conv | norm | head


def test_fully_connected_net_has_the_layers_of_the_paper():
    sizes = (784, 256, 128, 64, 64, 5)
    dense = {f"Dense_{i}": {"kernel": sizes[i : i + 2], "bias": sizes[i + 1 : i + 2]} for i in range(5)}
    norm = {f"BatchStatNorm_{i}": {"shift": sizes[i + 1 : i + 2]} for i in range(4)}
    assert shapes(FullyConnectedNet(5), IMAGES) == dense | norm


def test_strided_net_against_xla_step_by_step():
    module = StridedConvNet(5, filters=8)
    params = jax.jit(module.init)(KEY, IMAGES)
    params["params"]["BatchStatNorm_1"]["shift"] += 0.5
    x = IMAGES
    for i, size in enumerate((14, 7, 4, 2)):
        x = reference_conv({"params": params["params"][f"Conv3x3_{i}"]}, x, 2)
        x = (x - x.mean((0, 1, 2), keepdims=True)) / jnp.sqrt(x.var((0, 1, 2), keepdims=True) + 1e-3)
        x = jnp.maximum(x + params["params"][f"BatchStatNorm_{i}"]["shift"][None, None, None], 0)
        assert x.shape == (5, size, size, 8)
    expected = x.mean((1, 2)) @ params["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(jax.jit(module.apply)(params, IMAGES), expected, rtol=1e-3, atol=1e-4)


def test_fully_connected_net_against_numpy_step_by_step():
    module, images = FullyConnectedNet(3, (6, 4)), jax.random.uniform(KEY, (5, 4, 4, 1))
    params = jax.tree.map(lambda leaf: 30 * leaf, jax.jit(module.init)(KEY, images))  # so that the variance is far above 0.001
    x = np.asarray(images, np.float64).reshape(5, 16)
    for i, shift in enumerate((0.5, -0.2)):
        params["params"][f"BatchStatNorm_{i}"]["shift"] += shift
        x = x @ params["params"][f"Dense_{i}"]["kernel"]
        x = np.maximum((x - x.mean(0)[None]) / np.sqrt(x.var(0)[None] + 1e-3) + shift, 0)
    expected = x @ params["params"]["Dense_2"]["kernel"]
    np.testing.assert_allclose(jax.jit(module.apply)(params, images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reference", [None, 2])
def test_pooled_net_against_xla_step_by_step(reference):
    """It pools before it normalises; the usual order is the other, and gives the same."""
    module = PooledConvNet(3, filters=4, norm=functools.partial(BatchStatNorm, use_scale=True, reference=reference))
    images = jax.random.uniform(KEY, (3, 23, 23, 3))
    params = jax.jit(module.init)(KEY, images)
    x = images
    for i, size in enumerate((11, 5, 2, 1)):
        norm = params["params"][f"BatchStatNorm_{i}"]
        norm |= {"scale": jnp.array([0.5, 1.0, 1.5, 2.0]), "shift": jnp.array([-0.5, 0.0, 0.3, 1.0])}
        x = reference_conv({"params": params["params"][f"Conv3x3_{i}"]}, x, 1)
        statistics = {"axis": (0, 1, 2), "keepdims": True}
        x = (x - x[:reference].mean(**statistics)) / jnp.sqrt(x[:reference].var(**statistics) + 1e-3)
        x = jnp.maximum(x * norm["scale"][None, None, None] + norm["shift"][None, None, None], 0)
        x = linen.max_pool(x, (2, 2), (2, 2))
        assert x.shape == (3, size, size, 4)
    expected = x.reshape(3, -1) @ params["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(jax.jit(module.apply)(params, images), expected, rtol=1e-3, atol=1e-4)


def test_images_that_pooling_would_leave_nothing_of_are_refused():
    with pytest.raises(ValueError, match="need images of 16 pixels or more in both, got 15 x 84"):
        from_linen(PooledConvNet(5), jnp.zeros((1, 15, 84, 3))).init(KEY)


def test_other_normalisation_layers_fit_in():
    model = from_linen(StridedConvNet(5, filters=4, norm=linen.LayerNorm), IMAGES)
    assert jax.eval_shape(lambda: model.apply(model.init(KEY), IMAGES)).shape == (5, 5)


def test_head_weights_are_standard_normal():
    kernel = jax.jit(from_linen(StridedConvNet(200), IMAGES).init)(KEY)["Dense_0"]["kernel"]
    assert abs(kernel.std() - 1) < 4 / np.sqrt(2 * kernel.size)


def test_weights_of_convolutions_and_of_the_head_after_pooling_are_uniform_up_to_the_bound_of_glorot():
    """sqrt(6 / (inputs + outputs)), where a convolution has nine of each."""
    params = from_linen(PooledConvNet(20, filters=30, blocks=1), jnp.zeros((1, 2, 2, 30))).init(KEY)
    for name, units in (("Conv3x3_0", 9 * (30 + 30)), ("Dense_0", 30 + 20)):
        kernel = params[name]["kernel"]
        np.testing.assert_allclose(jnp.abs(kernel).max(), np.sqrt(6 / units), rtol=0.02)
        np.testing.assert_allclose(kernel.std(), np.sqrt(2 / units), rtol=0.1)


def test_weights_of_the_fully_connected_net_are_small_and_cut_off_at_two_deviations():
    params = from_linen(FullyConnectedNet(64, (64, 64)), jnp.zeros((1, 8, 8, 1))).init(KEY)
    for i in range(3):
        assert 0.015 < jnp.abs(params[f"Dense_{i}"]["kernel"]).max() <= 0.02


def test_mixed_mode_and_reverse_mode_agree_on_the_meta_gradient():
    model = from_linen(StridedConvNet(5, filters=4, blocks=2), IMAGES)
    labels = jnp.arange(5)

    def meta_loss(params, differentiation):
        loss_fn = lambda params, step: cross_entropy(model.apply(params, IMAGES), labels)  # noqa: E731
        final, _ = adapt(loss_fn, params, jnp.arange(1), optax.sgd(0.4), differentiation=differentiation)
        return cross_entropy(model.apply(final, IMAGES[:, ::-1]), labels)

    params = jax.jit(model.init)(KEY)
    gradient = jax.jit(jax.grad(meta_loss), static_argnums=1)
    grads = {name: gradient(params, name) for name in ("mixed", "reverse", "first_order")}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), grads["mixed"], grads["reverse"])
    assert optax.tree.norm(optax.tree.sub(grads["first_order"], grads["reverse"])) > 0.01 * optax.tree.norm(grads["reverse"])
