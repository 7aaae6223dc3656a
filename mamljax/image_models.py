"""The networks of the image experiments as Flax modules, and their layers."""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen
from jax import Array, lax

from mamljax.convolution import convolution, in_pieces
from mamljax.types import PyTree


class BatchStatNorm(linen.Module):
    r"""Normalise each channel by the mean and variance of the examples at hand, and keep no running averages.

    $y = (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta$, with $\mu, \sigma^2$ over all axes but the last. As it is, a network
    that has it is *transductive*: what it predicts for one example depends on the others. With `reference` set to the size of
    the support set, and query sets from `tasks.images.inductive`, it is *inductive*: the support set alone decides.
    """

    use_scale: bool = False  # the authors' code has a shift only
    reference: int | None = None  # how many examples, the first ones, the statistics are of; by default all
    # The default of TensorFlow's batch_norm, which the authors' code leaves as it is.
    epsilon: float = 1e-3

    def __call__(self, x: Array) -> Array:
        """Normalise examples [n, ..., C]."""
        return self.by_moments(*moments(x))(x)

    @linen.compact
    def by_moments(self, means: Array, variances: Array) -> Callable[[Array], Array]:
        """Return the normalisation of examples [n, ..., C], or of any of them, by the `moments` [n, 1, ..., C] of all."""
        means, variances = means[: self.reference], variances[: self.reference]
        mean = means.mean(0, keepdims=True)
        # The variance of all numbers: the mean of that within examples, and that between their means.
        variance = (variances + (means - mean) ** 2).mean(0, keepdims=True)
        factor = lax.rsqrt(variance + self.epsilon)
        if self.use_scale:
            factor *= _channels(self.param("scale", linen.initializers.ones, mean.shape[-1:]), mean.ndim)
        shift = _channels(self.param("shift", linen.initializers.zeros, mean.shape[-1:]), mean.ndim)
        return lambda x: ((x - mean) * factor + shift).astype(x.dtype)


def moments(x: Array) -> tuple[Array, Array]:
    """The mean and the variance of each channel in each example [n, ..., C]: both [n, 1, ..., C], in float32 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(range(1, x.ndim - 1))
    mean = x.mean(axes, keepdims=True)
    return mean, ((x - mean) ** 2).mean(axes, keepdims=True)


def _identity(x: Array) -> Array:
    return x


class Conv3x3(linen.Module):
    """A 3x3 convolution with zero padding ("SAME"), equal to `flax.linen.Conv`.

    An order of magnitude faster on a CPU where each task has its own kernel; see `convolution.py`.
    """

    features: int
    stride: int = 1
    kernel_init: Callable = linen.initializers.glorot_uniform()

    @linen.compact
    def __call__(
        self, x: Array, before: Callable[[Array], Array] = _identity, then: Callable[[Array], PyTree] = _identity
    ) -> PyTree:
        """Convolve [n, H, W, C] to [n, ceil(H / stride), ceil(W / stride), features].

        `before` is applied to the input, and `then` to the output, image by image, while these are in the cache.
        """
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
        bias = _channels(self.param("bias", linen.initializers.zeros, (self.features,)), 4)
        convolve = convolution(kernel, x.shape[1:3], self.stride)
        return in_pieces(lambda x: then(convolve(before(x)) + bias), x, stride=self.stride)


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
            x = linen.relu(self.norm()(Conv3x3(self.filters, stride=2)(x)))
        x = x.mean((1, 2))
        # The authors draw this layer's weights, and these alone, with a standard deviation of 1.
        return x if self.ways is None else linen.Dense(self.ways, kernel_init=linen.initializers.normal(1.0))(x)


class PooledConvNet(linen.Module):
    """The miniImageNet network: blocks of [3x3 convolution, normalisation, ReLU, 2x2 max-pooling], linear.

    It pools before it normalises and rectifies. Both of these are monotone, so that the function is the same (unless a learned
    scale becomes negative) for a quarter of the work; the statistics are still those of all activations, before pooling. Each
    block leaves normalisation and ReLU to the next one, which applies them to its input piece by piece.
    """

    ways: int | None  # None for the features alone, [n, d]
    filters: int = 32
    blocks: int = 4
    norm: Callable[[], BatchStatNorm] = BatchStatNorm

    @linen.compact
    def __call__(self, x: Array) -> Array:
        """Classify images [n, H, W, C] in [0, 1]; returns logits [n, ways]."""
        if min(x.shape[1:3]) < 2**self.blocks:
            raise ValueError(
                f"{self.blocks} blocks that each halve height and width need images of {2**self.blocks} pixels or more in "
                f"both, got {x.shape[1]} x {x.shape[2]}. Use larger images, or StridedConvNet."
            )
        activate = _identity
        for _ in range(self.blocks):
            x, statistics = Conv3x3(self.filters)(x, before=activate, then=_pool_and_moments)
            activate = functools.partial(_normalise_and_rectify, self.norm().by_moments(*statistics))
        # The last block has no next one to apply its normalisation.
        x = activate(x)
        x = x.reshape(len(x), -1)
        return x if self.ways is None else linen.Dense(self.ways, kernel_init=linen.initializers.glorot_uniform())(x)


def _normalise_and_rectify(norm: Callable[[Array], Array], x: Array) -> Array:
    return linen.relu(norm(x))


def _pool_and_moments(x: Array) -> tuple[Array, tuple[Array, Array]]:
    """The maxima of images [n, H, W, C], [n, H // 2, W // 2, C], and their `moments` before that."""
    return _max_pool(x), moments(x)


def _max_pool(x: Array) -> Array:
    """The maximum of each 2x2 block of [n, H, W, C], without overlap and without a rest: [n, H // 2, W // 2, C].

    By `where`, and not by `max`, whose derivative asks which of its inputs equal the maximum: in a compiled program that has
    computed the two separately, with different rounding, none does, and parts of second derivatives are silently lost.
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
        # As in the authors' code; after it, normalisation brings hidden layers back to scale.
        kernel_init = linen.initializers.truncated_normal(0.01)
        x = x.reshape(len(x), -1)
        for size in self.hidden_sizes:
            x = linen.relu(self.norm()(linen.Dense(size, kernel_init=kernel_init)(x)))
        return x if self.ways is None else linen.Dense(self.ways, kernel_init=kernel_init)(x)
