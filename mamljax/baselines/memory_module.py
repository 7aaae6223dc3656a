"""The memory module, a comparison system of the paper's table 1: examples are kept as keys, of which the nearest decides."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mamljax.checks import check_count, check_task
from mamljax.comparison import evaluation, features_of, largest_of_class, unit
from mamljax.outer import meta_learner
from mamljax.types import Examples, LossFn, MetaLearner, Model, PyTree, Task

INVERSE_TEMPERATURE = 40.0  # makes logits of cosines, for the loss in evaluation; predictions do not depend on it


class Memory(NamedTuple):
    """Keys with their classes, written from the first slot on."""

    keys: Array  # [M, d], of length 1
    labels: Array  # [M] int32, -1 where nothing is written yet


def memory_module(
    features: Model,
    loss_fn: LossFn,
    *,
    ways: int,
    tx: optax.GradientTransformation,
    margin: float = 0.1,
    metric_fns: Mapping[str, LossFn] = {},
    chunk_size: int | None = None,
) -> MetaLearner:
    r"""Features with the memory of "Learning to Remember Rare Events" (Kaiser et al. 2017, arXiv 1703.03129, section 2).

    The examples of a task are seen one by one: of every class the first, then of every class the second, and so on, those of
    the query set last. The features $q$ of each, of length 1, should be nearer to a key of its class than to any other: its
    loss is $[q \cdot k_- - q \cdot k_+ + \alpha]_+$ with the nearest key of another class and the nearest of its own, where
    there are both; others do not count. Then it is written down: by moving the nearest key halfway to it, if that is of its
    class, else as a key of its own. Keys are constants to the gradient.

    In evaluation the support set alone is written down, and the logit of a class is 40 times the largest cosine with one of its
    keys.

    Differs from the authors' code: each task has a memory of its own, with room for all of its examples, so that none is ever
    overwritten, where theirs is shared by the episodes of a batch; all examples of a meta-batch count in one step of the
    optimiser, where theirs takes one after each showing, and lets a class without a key count too; the features are compared as
    they are, without a last linear layer.

    Args:
        features: [n, ...] -> [n, d].
        loss_fn: (logits, labels) -> scalar, the mean over examples; reported in evaluation.
        ways: N, classes of a task, at least 2; labels are 0..N-1.
        tx: the outer optimiser.
        margin: the $\alpha$ of the loss.
        metric_fns: further (logits, labels) -> scalar to report in evaluation, by name.
        chunk_size: tasks differentiated at a time; see `outer.meta_learner`.

    Returns:
        A meta-learner of `Task(support, query)` whose `evaluate` returns the `loss` and the metrics on the query set, each [1].

    Raises:
        ValueError: `ways` below 2, or a margin that is not positive; at the first update, a malformed task.
    """
    check_count("ways", ways, minimum=2)
    if not margin > 0:
        raise ValueError(f"margin must be positive, got {margin}. Give 0.1, for example.")

    def keys_of(params: PyTree, task: Task) -> tuple[Examples, Examples]:
        """The keys of the support and the query set, which the network sees together, with their labels."""
        support, query = map(unit, features_of(features, params, task))
        return Examples(support, task.support.y), Examples(query, task.query.y)

    def task_loss(params: PyTree, task: Task) -> Array:
        check_task(task)

        def see(memory: Memory, example: Examples) -> tuple[Memory, tuple[Array, Array]]:
            return write(memory, jax.lax.stop_gradient(example)), margin_loss(memory, example, margin)

        support, query = map(by_showing, keys_of(params, task))
        seen = jax.tree.map(lambda *sets: jnp.concatenate(sets), support, query)
        _, (losses, counted) = jax.lax.scan(see, empty_memory(seen), seen)
        return losses.sum() / jnp.maximum(counted.sum(), 1)

    def compare(params: PyTree, task: Task) -> Array:
        support, query = keys_of(params, task)
        written, _ = jax.lax.scan(lambda memory, one: (write(memory, one), None), empty_memory(support), by_showing(support))
        return INVERSE_TEMPERATURE * largest_of_class(query.x @ written.keys.T, written.labels, ways)

    return meta_learner(features.init, task_loss, evaluation(compare, loss_fn, metric_fns), tx=tx, chunk_size=chunk_size)


def by_showing(examples: Examples) -> Examples:
    """Of every class the first example, then of every class the second, and so on."""
    showing = jnp.tril(examples.y[:, None] == examples.y[None], -1).sum(1)  # how many of its class come before it
    order = jnp.argsort(showing, stable=True)
    return jax.tree.map(lambda leaf: leaf[order], examples)


def empty_memory(examples: Examples) -> Memory:
    """A memory with room for examples with x [M, d]."""
    return Memory(jnp.zeros_like(examples.x), jnp.full_like(examples.y, -1, jnp.int32))


def write(memory: Memory, example: Examples) -> Memory:
    """Write one example down, x [d] and y []; one without a label, which is negative, changes nothing."""
    # In an empty memory that is slot 0, whose label, -1, is that of no class.
    nearest = jnp.where(memory.labels >= 0, memory.keys @ example.x, -jnp.inf).argmax()
    known = memory.labels[nearest] == example.y
    slot = jnp.where(known, nearest, (memory.labels >= 0).sum())
    key = jnp.where(known, unit(memory.keys[nearest] + example.x), example.x)
    written = Memory(memory.keys.at[slot].set(key), memory.labels.at[slot].set(example.y))
    return optax.tree.where(example.y >= 0, written, memory)


def margin_loss(memory: Memory, example: Examples, margin: float) -> tuple[Array, Array]:
    """The loss of one example, 0 where it does not count, and whether it does: there are keys of its class and of others."""
    similarity, alike = memory.keys @ example.x, memory.labels == example.y
    unlike = (memory.labels >= 0) & ~alike
    right, wrong = (similarity.max(where=which, initial=-1.0) for which in (alike, unlike))
    counted = (example.y >= 0) & alike.any() & unlike.any()
    return jnp.where(counted, jax.nn.relu(wrong - right + margin), 0.0), counted
