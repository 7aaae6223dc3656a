"""Few-shot classification: episodes of N classes and K images of each, drawn from a bank of images."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jax.typing import ArrayLike

from mamljax.checks import check_count, check_counts
from mamljax.closures import as_partial
from mamljax.tasks.host import prepared
from mamljax.types import Examples, SampleFn, Task


def episodes(
    images: ArrayLike, *, ways: int, shots: int, queries: int, rotations: bool = False, counts: ArrayLike | None = None
) -> Partial:
    """Build the sampler of N-way K-shot episodes: N distinct classes, K + Q distinct images of each, in random order.

    Args:
        images: [classes, images, H, W, C] uint8. An argument of the sampler rather than a part of it, so that compiled
            programs do not copy it.
        ways: N, classes of an episode.
        shots: K, support images of each class.
        queries: Q, query images of each class.
        rotations: turn each class of an episode by a random multiple of 90 degrees; images must be square.
        counts: [classes], how many images each class has where they are not alike; the others are never drawn.

    Returns:
        key -> Task with x [N * K or N * Q, H, W, C] float32 in [0, 1] and y [N * K or N * Q] int32 in 0..N-1; a pytree.
        The same key gives the same episode.

    Raises:
        ValueError: the images are of another shape or dtype; a count below 1, or more than the images have.

    >>> task = episodes(np.zeros((10, 20, 28, 28, 1), np.uint8), ways=5, shots=1, queries=15)(jax.random.key(0))
    >>> task.support.x.shape, task.query.y.shape
    ((5, 28, 28, 1), (75,))
    """
    counts = _checked_episodes(images, counts, ways=ways, shots=shots, queries=queries, rotations=rotations)
    draw = functools.partial(_draw, ways=ways, shots=shots, queries=queries, rotations=rotations)
    return Partial(draw, _on_device(images), jnp.asarray(counts, jnp.int32))


class HostEpisodes:
    """The sampler of the same episodes from images that the device has no room for, memory-mapped ones for example.

    `fit` has it read the episodes of the next compiled call while the device computes this one, for which each seed takes
    twice `log_every * num_tasks` episodes of device memory. Elsewhere, as in `evaluate`, the program calls back to the host.
    """

    def __init__(
        self,
        images: np.ndarray,
        *,
        ways: int,
        shots: int,
        queries: int,
        rotations: bool = False,
        classes: ArrayLike | None = None,
        counts: ArrayLike | None = None,
    ) -> None:
        """Describe the episodes.

        Args:
            images: [classes, images, H, W, C] uint8, left where they are.
            ways, shots, queries, rotations, counts: as of `episodes`.
            classes: numbers of those to draw from, in the order of `counts`; by default all.

        Raises:
            ValueError: as `episodes`; or there is no such class.
        """
        self.classes = np.arange(len(images)) if classes is None else np.asarray(classes)
        if not np.isin(self.classes, np.arange(len(images))).all():
            raise ValueError(f"classes must lie in 0..{len(images) - 1}, got {self.classes}.")
        self.counts = np.full(len(self.classes), images.shape[1]) if counts is None else np.asarray(counts)
        self.images, self.ways, self.shots, self.per_class, self.rotations = images, ways, shots, shots + queries, rotations
        chosen = np.broadcast_to(images[:1], (len(self.classes), *images.shape[1:]))  # of the shape alone
        _checked_episodes(chosen, self.counts, ways=ways, shots=shots, queries=queries, rotations=rotations)
        counts = jnp.asarray(self.counts, jnp.int32)
        self._indices = functools.partial(draw_indices, counts=counts, ways=ways, per_class=self.per_class)
        self._all_indices = jax.jit(jax.vmap(self._indices))

    def __call__(self, key: Array) -> Task:
        """Draw one episode."""
        index, turns = self._indices(key)
        shape = jax.ShapeDtypeStruct((self.ways, self.per_class, *self.images.shape[2:]), np.uint8)
        drawn = jax.pure_callback(self._read, shape, *index, vmap_method="broadcast_all")
        return self._as_task(drawn, turns)

    def prepare(self, keys: Array) -> Partial:
        """Read the episodes of some keys [n]; returns a sampler for these keys alone."""
        index, turns = self._all_indices(keys)
        return Partial(self._task_of, prepared(keys, (self._read(*index), turns)))

    def _task_of(self, images_of: SampleFn, key: Array) -> Task:
        return self._as_task(*images_of(key))

    def _read(self, classes: ArrayLike, numbers: ArrayLike) -> np.ndarray:
        return self.images[self.classes[np.asarray(classes)], np.asarray(numbers)]

    def _as_task(self, drawn: Array, turns: Array) -> Task:
        return as_task(jax.vmap(turn)(drawn, turns) if self.rotations else drawn, shots=self.shots)


def labelled(images: ArrayLike, *, batch_size: int, rotations: bool = False, counts: ArrayLike | None = None) -> Partial:
    """Build the sampler of batches of images from all classes, to train a classifier over them.

    Args:
        images: as of `episodes`; so are `rotations`, but that each image is turned on its own, and `counts`.
        batch_size: images of a batch, drawn independently of each other: first a class, then an image of it.

    Returns:
        key -> Task whose support and query sets are the same x [batch_size, H, W, C] float32 in [0, 1] and y [batch_size]
        int32, the number of the class; a pytree.

    Raises:
        ValueError: as `episodes`.
    """
    check_count("batch_size", batch_size)
    counts = _checked_counts(images, counts, rotations=rotations)
    draw = functools.partial(_draw_labelled, batch_size=batch_size, rotations=rotations)
    return Partial(draw, _on_device(images), jnp.asarray(counts, jnp.int32))


def _on_device(images: ArrayLike) -> Array:
    """Images in device memory. A CPU keeps using the array it is given, a memory map for example, unless it may change."""
    if isinstance(images, np.ndarray) and images.flags.writeable:
        images = images.copy()
    return jax.device_put(images)


def _draw_labelled(images: Array, counts: Array, key: Array, *, batch_size: int, rotations: bool) -> Task:
    class_key, image_key, turn_key = jax.random.split(key, 3)
    classes = jax.random.randint(class_key, (batch_size,), 0, len(counts))
    drawn = images[classes, jax.random.randint(image_key, (batch_size,), 0, counts[classes])]
    if rotations:
        drawn = jax.vmap(turn)(drawn, jax.random.randint(turn_key, (batch_size,), 0, 4))
    examples = Examples(_unit_range(drawn), classes)
    return Task(examples, examples)


def _checked_episodes(
    images: ArrayLike, counts: ArrayLike | None, *, ways: int, shots: int, queries: int, rotations: bool
) -> np.ndarray:
    """Check the arguments of `episodes`; returns the images of each class, [classes]."""
    check_counts(ways=ways, shots=shots, queries=queries)
    counts = _checked_counts(images, counts, rotations=rotations)
    if ways > len(counts):
        raise ValueError(f"{ways}-way episodes need {ways} classes, but there are {len(counts)}. Lower ways.")
    if shots + queries > counts.min():
        raise ValueError(
            f"{shots} support and {queries} query images a class need {shots + queries} images, but class {counts.argmin()} "
            f"has {counts.min()}. Lower shots or queries."
        )
    return counts


def _checked_counts(images: Any, counts: ArrayLike | None, *, rotations: bool) -> np.ndarray:
    """Check the images and how many there are of each class: [classes]."""
    images = images if hasattr(images, "dtype") else np.asarray(images)
    shape = images.shape
    if len(shape) != 5 or images.dtype != np.uint8:
        raise ValueError(f"images must be an array [classes, images, H, W, C] uint8, got {list(shape)} {images.dtype}.")
    if rotations and shape[2] != shape[3]:
        raise ValueError(f"rotations need square images, got {shape[2]} x {shape[3]}.")
    counts = np.full(shape[0], shape[1]) if counts is None else np.asarray(counts)
    if counts.shape != shape[:1] or not ((counts >= 1) & (counts <= shape[1])).all():
        raise ValueError(f"counts must be [classes] of 1 to {shape[1]} for images {list(shape)}, got {counts}.")
    return counts


def _draw(images: Array, counts: Array, key: Array, *, ways: int, shots: int, queries: int, rotations: bool) -> Task:
    index, turns = draw_indices(key, counts, ways=ways, per_class=shots + queries)
    drawn = images[index]
    if rotations:
        drawn = jax.vmap(turn)(drawn, turns)
    return as_task(drawn, shots=shots)


def draw_indices(key: Array, counts: Array, *, ways: int, per_class: int) -> tuple[tuple[Array, Array], Array]:
    """Draw the classes and images of an episode: index arrays (class [N, 1], image [N, K + Q]), and quarter turns [N]."""
    # For each class its number, its turn, its images. All at once: each call takes the compiler a good part of a second.
    bits = jax.random.bits(key, (ways, 2 + per_class), jnp.uint32)
    classes = distinct(bits[:, 0], jnp.int32(len(counts)))
    chosen = jax.vmap(distinct)(bits[:, 2:], counts[classes])
    return (classes[:, None], chosen), (bits[:, 1] % 4).astype(jnp.int32)


def distinct(bits: Array, total: Array) -> Array:
    """Draw as many different numbers of 0..total-1 as there are random bits [count] uint32, in random order: [count] int32.

    Each is drawn from those not drawn before, at a cost that does not grow with `total`. None is likelier than another by more
    than total / 2^32 of its probability.
    """
    count = len(bits)
    draws = (bits % (total - jnp.arange(count)).astype(jnp.uint32)).astype(jnp.int32)

    def add(i: Array, chosen: Array) -> Array:
        # Below a chosen number c lie c - rank numbers that are still free. Sought is the free number with draws[i] free ones
        # below it: draws[i], plus one for each c that it lies above, which are those with c - rank <= draws[i].
        ranks = (chosen[None] < chosen[:, None]).sum(1, dtype=jnp.int32)
        return chosen.at[i].set(draws[i] + (chosen - ranks <= draws[i]).sum(dtype=jnp.int32))

    # Places not drawn yet hold a number above all others, so that they count for nothing in `add`.
    return jax.lax.fori_loop(0, count, add, jnp.full(count, total + count, jnp.int32))


def turn(images: Array, turns: Array) -> Array:
    """Turn square images [..., H, H, C] by `turns` times 90 degrees."""
    # All four are made, of which one is taken: under `vmap` a condition would make them all as well.
    turned = [jnp.rot90(images, times, axes=(-3, -2)) for times in range(4)]
    return jax.lax.select_n(turns, *turned)


def as_task(images: Array, *, shots: int) -> Task:
    """Make a task of the images [N, K + Q, H, W, C] uint8 of an episode; class i is labelled i."""

    def examples(images: Array) -> Examples:
        ways, per_class = images.shape[:2]
        x = _unit_range(images.reshape(ways * per_class, *images.shape[2:]))
        return Examples(x, jnp.repeat(jnp.arange(ways), per_class))

    return Task(examples(images[:, :shots]), examples(images[:, shots:]))


def _unit_range(images: Array) -> Array:
    return images.astype(jnp.float32) / 255


def inductive(sample: SampleFn) -> SampleFn:
    """Put the support images, unlabelled, before the query images, so that the network can normalise by them alone.

    Args:
        sample: of episodes; the network's `image_models.BatchStatNorm` must have `reference=ways * shots`.

    Returns:
        The sampler of the same episodes with query sets of x [N * K + N * Q, H, W, C] and y that begins with N * K times -1.
    """
    return _InductiveHostEpisodes(sample) if hasattr(sample, "prepare") else Partial(_draw_inductive, as_partial(sample))


class _InductiveHostEpisodes:
    """Those of `HostEpisodes`, which `fit` reads ahead likewise."""

    def __init__(self, sample: Any) -> None:
        self.sample = sample

    def __call__(self, key: Array) -> Task:
        return _draw_inductive(self.sample, key)

    def prepare(self, keys: Array) -> Partial:
        return Partial(_draw_inductive, self.sample.prepare(keys))


def _draw_inductive(sample: SampleFn, key: Array) -> Task:
    support, query = sample(key)
    x = jnp.concatenate([support.x, query.x])
    return Task(support, Examples(x, jnp.concatenate([jnp.full_like(support.y, -1), query.y])))
