"""Counting products: against what can be counted by hand, and against XLA's own count where there is no loop."""

from collections import Counter

import arithmetic
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from mamljax import convolution
from mamljax.image_models import Conv3x3
from mamljax.models import from_linen

SQUARE = arithmetic.Product(1, 8, 8, 8)


def power(x, rounds):
    return lax.scan(lambda carry, _: (carry @ x, None), x, None, length=rounds)[0]


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    x = jnp.eye(8)
    assert arithmetic.products(lambda x: power(power(x, 3), 5), x) == Counter({SQUARE: 8})
    assert arithmetic.products(lambda x: lax.fori_loop(0, 7, lambda i, y: y @ x, x), x) == Counter({SQUARE: 7})
    assert arithmetic.flops({SQUARE: 7}) == 7 * 2 * 8**3


def test_batched_products_convolutions_and_branches():
    left, right = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    assert arithmetic.products(jnp.matmul, left, right) == Counter({arithmetic.Product(3, 4, 5, 6): 1})
    image, kernel = jnp.ones((2, 7, 7, 3)), jnp.ones((3, 3, 3, 4))
    convolve = jax.tree_util.Partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
    found = arithmetic.products(lambda *args: convolve(*args, dimension_numbers=("NHWC", "HWIO", "NHWC")), image, kernel)
    assert found == Counter({arithmetic.Product(1, 2 * 7 * 7, 27, 4): 1})
    x = jnp.eye(8)
    found = arithmetic.products(lambda x: lax.cond(x.sum() > 1, lambda x: x @ x @ x, lambda x: x @ x, x), x)
    assert found == Counter({SQUARE: 2})


def test_what_nothing_depends_on_does_not_count():
    assert arithmetic.products(lambda x: (x @ x, x + 1)[1], jnp.eye(8)) == Counter()


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="a loop of unknown length holds products"):
        arithmetic.products(lambda x: lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, x), jnp.eye(8))


def test_without_loops_it_is_about_what_xla_counts():
    """XLA also counts additions outside products, which are few here."""
    model = from_linen(Conv3x3(32), jnp.zeros((1, 8, 8, 8)))
    params, x = model.init(jax.random.key(0)), jnp.ones((4, 8, 8, 8))
    gradient = jax.grad(lambda params: (model.apply(params, x) ** 2).sum())
    counted = arithmetic.flops(arithmetic.products(gradient, params))
    assert counted == 2 * 2 * (4 * 8 * 8) * (9 * 8) * 32
    assert jax.jit(gradient).lower(params).compile().cost_analysis()["flops"] == pytest.approx(counted, rel=0.05)


def test_a_convolution_in_pieces_multiplies_no_more(monkeypatch):
    """Patches are made again for the gradients, products are not."""
    model = from_linen(Conv3x3(32), jnp.zeros((1, 8, 8, 8)))
    params, x = model.init(jax.random.key(0)), jnp.ones((10, 8, 8, 8))
    gradient = jax.grad(lambda params, x: (model.apply(params, x) ** 2).sum(), (0, 1))
    whole = arithmetic.products(gradient, params, x)
    monkeypatch.setattr(convolution, "PIECE_BYTES", 1)
    in_pieces = arithmetic.products(lambda *args: gradient(*args), params, x)
    assert in_pieces != whole
    assert arithmetic.flops(in_pieces) == arithmetic.flops(whole)


def test_winograds_convolution_multiplies_four_ninths_as_often():
    x, kernel = jnp.ones((2, 8, 8, 16)), jnp.ones((3, 3, 16, 32))
    by_patches = arithmetic.products(convolution.by_patches, kernel, x)
    by_winograd = arithmetic.products(convolution.by_winograd, convolution.winograd_weights(kernel), x)
    assert 9 * arithmetic.flops(by_winograd) == 4 * arithmetic.flops(by_patches)


def test_rate_of_a_longer_program_is_about_the_same():
    rates = [arithmetic.product_rate({arithmetic.Product(2, 64, 64, 64): times}, 3) for times in (1, 100)]
    assert all(1e8 < rate < 1e14 for rate in rates)
    assert 0.2 < rates[0] / rates[1] < 5
