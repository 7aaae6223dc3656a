"""The networks of the image experiments as Flax modules, and their layers."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen
from jax import Array, lax

from mamljax.types import PyTree

PIECE_BYTES = 2**20  # of patches: about what a CPU core has in its cache while it multiplies


class BatchStatNorm(linen.Module):
    r"""Normalise each channel by the mean and variance of the examples at hand, and keep no running averages.

    $y = (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta$, with $\mu, \sigma^2$ over all axes but the last. As it is, a network
    that has it is *transductive*: what it predicts for one example depends on the others. With `reference` set to the size of
    the support set, and query sets from `tasks.images.inductive`, it is *inductive*: the support set alone decides.
    """

    use_scale: bool = False  # the authors' code has a shift only
    reference: int | None = None  # how many examples, the first ones, the statistics are of; by default all
    epsilon: float = 1e-3

    @linen.compact
    def __call__(self, x: Array, moments: tuple[Array, Array] | None = None) -> Array:
        """Normalise [n, ..., C] by its moments, or by others: mean and variance [n, ..., C] of each example."""
        if moments is None:
            axes = tuple(range(x.ndim - 1))
            mean = x[: self.reference].mean(axes, keepdims=True)
            variance = ((x[: self.reference] - mean) ** 2).mean(axes, keepdims=True)
        else:
            means, variances = (each[: self.reference] for each in moments)
            mean = means.mean(0, keepdims=True)
            variance = (variances + (means - mean) ** 2).mean(0, keepdims=True)
        y = (x - mean) * lax.rsqrt(variance + self.epsilon)
        if self.use_scale:
            y = y * _channels(self.param("scale", linen.initializers.ones, x.shape[-1:]), x.ndim)
        return y + _channels(self.param("shift", linen.initializers.zeros, x.shape[-1:]), x.ndim)


class PatchConv(linen.Module):
    """A 3x3 convolution with zero padding ("SAME"), as patches and one matrix product.

    Equal to `flax.linen.Conv`, and an order of magnitude faster on a CPU where each task has its own kernel: there XLA
    makes a grouped convolution of the usual form.
    """

    features: int
    stride: int = 1
    kernel_init: Callable = linen.initializers.glorot_uniform()
    then: Callable[[Array], PyTree] = lambda y: y  # of the output, image by image; done while that is in the cache

    @linen.compact
    def __call__(self, x: Array) -> PyTree:
        """Convolve [n, H, W, C] to [n, ceil(H / stride), ceil(W / stride), features], or to what `then` makes of that."""
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", linen.initializers.zeros, (self.features,))
        # Transposed, the kernel's gradient is a product that CPUs do at nearly twice the rate.
        rows = kernel.reshape(-1, self.features).T

        def convolve(x: Array) -> PyTree:
            patches = _patches(x, self.stride)
            y = lax.dot_general(patches.reshape(-1, patches.shape[-1]), rows, (((1,), (1,)), ((), ())))
            return self.then(y.reshape(*patches.shape[:-1], self.features) + _channels(bias, 4))

        patch_bytes = 9 * math.prod(x.shape[1:]) * x.dtype.itemsize // self.stride**2  # of one image
        return _in_pieces(convolve, x, max(1, PIECE_BYTES // patch_bytes))


def _in_pieces(convolve: Callable[[Array], PyTree], x: Array, at_most: int) -> PyTree:
    """`convolve(x)`, but on a CPU, where x is many times `at_most` images, only so many at a time.

    The patches of many large images would go through memory, and so would their gradients. Those of a piece stay in the
    cache; for the gradients they are made again.
    """
    n = len(x)
    if n <= 4 * at_most or jax.default_backend() != "cpu":
        return convolve(x)
    size = next(size for size in range(at_most, 0, -1) if n % size == 0)
    y = lax.map(jax.checkpoint(convolve), x.reshape(n // size, size, *x.shape[1:]))
    return jax.tree.map(lambda leaf: leaf.reshape(n, *leaf.shape[2:]), y)


def _patches(x: Array, stride: int) -> Array:
    """The 3x3 neighbourhoods of [n, H, W, C] as [n, ceil(H / stride), ceil(W / stride), 9 C], kernel position first."""
    sizes = [-(-size // stride) for size in x.shape[1:3]]
    missing = [max((size - 1) * stride + 3 - old, 0) for size, old in zip(sizes, x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *((pad // 2, pad - pad // 2) for pad in missing), (0, 0)))
    rows, columns = ((size - 1) * stride + 1 for size in sizes)
    shifted = [x[:, i : i + rows : stride, j : j + columns : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)


def _channels(values: Array, ndim: int) -> Array:
    return values.reshape((1,) * (ndim - 1) + (-1,))


class StridedConvNet(linen.Module):
    """The Omniglot network: blocks of [3x3 convolution of stride 2, normalisation, ReLU], mean over space, linear."""

    ways: int | None  # None for the features alone, [n, d]
    filters: int = 64
    blocks: int = 4
    norm: Callable[[], linen.Module] = BatchStatNorm

    @linen.compact
    def __call__(self, x: Array) -> Array:
        """Classify images [n, H, W, C] in [0, 1]; returns logits [n, ways]."""
        for _ in range(self.blocks):
            x = linen.relu(self.norm()(PatchConv(self.filters, stride=2)(x)))
        x = x.mean((1, 2))
        return x if self.ways is None else linen.Dense(self.ways, kernel_init=linen.initializers.normal(1.0))(x)


class PooledConvNet(linen.Module):
    """The miniImageNet network: blocks of [3x3 convolution, normalisation, ReLU, 2x2 max-pooling], linear.

    Pooling goes before normalisation and ReLU, which keep the order of numbers: that is the same function, unless a scale is
    learned and becomes negative, and leaves them a quarter of the work. The statistics are those of all numbers.
    """

    ways: int | None  # None for the features alone, [n, d]
    filters: int = 32
    blocks: int = 4
    norm: Callable[[], linen.Module] = BatchStatNorm

    @linen.compact
    def __call__(self, x: Array) -> Array:
        """Classify images [n, H, W, C] in [0, 1]; returns logits [n, ways]."""
        for _ in range(self.blocks):
            pooled, *moments = PatchConv(self.filters, then=_pool_and_moments)(x)
            x = linen.relu(self.norm()(pooled, moments))
        x = x.reshape(len(x), -1)
        return x if self.ways is None else linen.Dense(self.ways, kernel_init=linen.initializers.glorot_uniform())(x)


def _pool_and_moments(x: Array) -> tuple[Array, Array, Array]:
    """The maxima of images [n, H, W, C], [n, H // 2, W // 2, C], and the mean and the variance of each, [n, 1, 1, C]."""
    mean = x.mean((1, 2), keepdims=True)
    return _max_pool(x), mean, ((x - mean) ** 2).mean((1, 2), keepdims=True)


def _max_pool(x: Array) -> Array:
    """The maximum of each 2x2 block of [n, H, W, C], without overlap and without a rest: [n, H // 2, W // 2, C].

    By `where`, and not by `max`: the derivative of that asks which numbers equal the maximum, and none does where a compiled
    program has calculated them twice, with different rounding. Then parts of second derivatives are silently lost.
    """
    rows, columns = (size // 2 * 2 for size in x.shape[1:3])
    x = x[:, :rows, :columns]
    x = _larger(x[:, ::2], x[:, 1::2])
    return _larger(x[:, :, ::2], x[:, :, 1::2])


def _larger(a: Array, b: Array) -> Array:
    return jnp.where(a >= b, a, b)


class FullyConnectedNet(linen.Module):
    """The Omniglot network without convolutions: layers of [linear, normalisation, ReLU], linear."""

    ways: int | None  # None for the features alone, [n, d]
    hidden_sizes: Sequence[int] = (256, 128, 64, 64)
    norm: Callable[[], linen.Module] = BatchStatNorm

    @linen.compact
    def __call__(self, x: Array) -> Array:
        """Classify images [n, H, W, C] in [0, 1]; returns logits [n, ways]."""
        kernel_init = linen.initializers.truncated_normal(0.01)
        x = x.reshape(len(x), -1)
        for size in self.hidden_sizes:
            x = linen.relu(self.norm()(linen.Dense(size, kernel_init=kernel_init)(x)))
        return x if self.ways is None else linen.Dense(self.ways, kernel_init=kernel_init)(x)
