"""3x3 convolutions as matrix products: XLA makes slow grouped convolutions of those whose kernels differ from task to task."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from mamljax.types import PyTree

PIECE_BYTES = 2**20  # of patches: about what a CPU core has in its cache while it multiplies
WINOGRAD_CHANNELS = 16  # at least so many, or its products are too thin for their small number to gain
WINOGRAD_PIXELS = 16 * 16  # of an image: it takes long to compile, which smaller ones do not win back
WORTH_A_LOOP = 4  # pieces; the loop over fewer takes longer than it saves
PART_ROWS = 512  # of a product on a GPU, at least


def convolution(kernel: Array, size: Sequence[int], stride: int = 1) -> Callable[[Array], Array]:
    """Build the convolution by a kernel with zero padding ("SAME"), done the way that is fastest.

    Args:
        kernel: [3, 3, C, F].
        size: height and width of the images.
        stride: in both directions.

    Returns:
        images [n, H, W, C] -> [n, ceil(H / stride), ceil(W / stride), F].
    """
    large = kernel.shape[2] >= WINOGRAD_CHANNELS and math.prod(size) >= WINOGRAD_PIXELS
    # Half precision would lose two bits by it. On accelerators, whose products may have that, it was not measured.
    precise = jnp.finfo(kernel.dtype).bits >= 32 and jax.default_backend() == "cpu"
    if stride == 1 and large and precise:
        return functools.partial(by_winograd, winograd_weights(kernel))
    return functools.partial(by_patches, kernel, stride=stride)


def by_patches(kernel: Array, x: Array, *, stride: int = 1) -> Array:
    """Convolve [n, H, W, C] by one product of all 3x3 neighbourhoods with the kernel."""
    sizes = [-(-size // stride) for size in x.shape[1:3]]
    # As XLA pads for "SAME": where the padding is odd, one more at the end.
    missing = [max((size - 1) * stride + 3 - old, 0) for size, old in zip(sizes, x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *((pad // 2, pad - pad // 2) for pad in missing), (0, 0)))
    rows, columns = ((size - 1) * stride + 1 for size in sizes)
    shifted = [x[:, i : i + rows : stride, j : j + columns : stride] for i in range(3) for j in range(3)]
    patches = jnp.concatenate(shifted, axis=-1)
    product = _product_in_parts if jax.default_backend() == "gpu" else _product
    y = product(patches.reshape(-1, patches.shape[-1]), kernel.reshape(-1, kernel.shape[-1]))
    return y.reshape(*patches.shape[:-1], -1)


def _product(rows: Array, filters: Array) -> Array:
    """[n, k] x [k, F]. Transposed, the filters' gradient is a product that CPUs do at nearly twice the rate."""
    return lax.dot_general(rows, filters.T, (((1,), (1,)), ((), ())))


def _product_in_parts(rows: Array, filters: Array) -> Array:
    """The same, with a copy of the filters for each part of the rows.

    The filters' gradient is small and a sum over all rows, which as one product would leave most of a GPU idle; that of the
    copies is many at once, and their sum, in float32 at least.
    """
    # As many equal parts as there are of PART_ROWS rows or more.
    parts = next(parts for parts in range(max(1, len(rows) // PART_ROWS), 0, -1) if len(rows) % parts == 0)
    # Copied in float32, as the derivative of copying is a sum: that of the gradients of all copies.
    summed = filters.astype(jnp.promote_types(filters.dtype, jnp.float32))
    copies = jnp.broadcast_to(summed, (parts, *filters.shape)).astype(filters.dtype)
    return lax.batch_matmul(rows.reshape(parts, -1, rows.shape[1]), copies).reshape(len(rows), -1)


@jax.jit  # traced once, not at each call, each derivative and each piece
def by_winograd(weights: Array, x: Array) -> Array:
    r"""Convolve [n, H, W, C] with stride 1 in 4/9 of the multiplications: Winograd's minimal filtering F(2x2, 3x3).

    Along each axis, two neighbouring outputs come of four inputs d and three weights g by four products instead of six,
    $y = A^T [(G g) \odot (B^T d)]$, and along both by 16 instead of 36; summed over channels, these are 16 matrix products
    (Lavin & Gray 2016, arXiv 1509.09308, section 4.1). `weights` [16, C, F] are `winograd_weights` of the kernel.
    """
    n, height, width, _ = x.shape
    rows, columns = -(-height // 2), -(-width // 2)  # of blocks of 2x2 outputs
    # A border of one, as for any 3x3 kernel, and at the end one more where the outputs are of an odd number.
    x = jnp.pad(x, ((0, 0), (1, 2 * rows - height + 1), (1, 2 * columns - width + 1), (0, 0)))
    # [16, n, rows, columns, C]: first the 4x4 numbers of each block.
    inputs = jnp.stack([part for by_row in _four_inputs(x, 1) for part in _four_inputs(by_row, 2)])
    # Weights are transposed for the same reason as in `_product`.
    products = lax.dot_general(inputs.reshape(16, -1, x.shape[-1]), weights.swapaxes(1, 2), (((2,), (2,)), ((0,), (0,))))
    y = [_two_outputs(by_row) for by_row in _two_outputs(products.reshape(4, 4, n, rows, columns, -1))]
    y = jnp.stack([jnp.stack(row, axis=3) for row in y], axis=2)  # [n, rows, 2, columns, 2, F]
    return y.reshape(n, 2 * rows, 2 * columns, -1)[:, :height, :width]


@jax.jit
def winograd_weights(kernel: Array) -> Array:
    """G g along both axes, of a kernel [3, 3, C, F]: [16, C, F]."""
    return jnp.stack([part for by_row in _four_weights(kernel) for part in _four_weights(by_row)])


def _four_inputs(x: Array, axis: int) -> list[Array]:
    """B^T d, for d the entries 2i to 2i + 3 along an axis, for all i."""
    last = x.shape[axis] - 3
    d = [lax.slice_in_dim(x, start, start + last, 2, axis) for start in range(4)]
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _four_weights(g: Array) -> list[Array]:
    """G g, for the three weights along the leading axis."""
    outer = (g[0] + g[2]) / 2
    return [g[0], outer + g[1] / 2, outer - g[1] / 2, g[2]]


def _two_outputs(m: Array | list[Array]) -> list[Array]:
    """A^T m, for the four products along the leading axis."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def in_pieces(fn: Callable[[Array], PyTree], x: Array, *, stride: int = 1) -> PyTree:
    """`fn(x)`, for a function of images [n, H, W, C] that convolves them, and does the same with each.

    On a CPU many large images are done a few at a time, and again for the gradients: their patches, and what is made of
    them, would go through memory, and those of a few stay in the cache.
    """
    n = len(x)
    patch_bytes = 9 * math.prod(x.shape[1:]) * x.dtype.itemsize // stride**2  # of one image
    at_most = max(1, PIECE_BYTES // patch_bytes)
    if n <= WORTH_A_LOOP * at_most or jax.default_backend() != "cpu":
        return fn(x)
    size = next(size for size in range(at_most, 0, -1) if n % size == 0)
    y = lax.map(jax.checkpoint(fn), x.reshape(n // size, size, *x.shape[1:]))
    return jax.tree.map(lambda leaf: leaf.reshape(n, *leaf.shape[2:]), y)
