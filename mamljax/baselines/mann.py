"""Memory-augmented networks, a comparison system of the paper's table 1: an LSTM that writes to a memory and reads from it."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from mamljax.baselines.meta_lstm import lstm
from mamljax.checks import check_count, check_counts, check_task
from mamljax.comparison import cosine_similarity, evaluation, features_of
from mamljax.models import feature_size
from mamljax.outer import meta_learner
from mamljax.types import LossFn, MetaLearner, Metrics, Model, PyTree, State, Task

USAGE_KEPT = 0.99  # of a slot's use, from one example to the next


class Controller(NamedTuple):
    """What is carried from one example to the next: the LSTM's state, and the memory of M slots with its R heads."""

    hidden: Array  # [h]
    cell: Array  # [h]
    slots: Array  # [M, d]
    usage: Array  # [M]: how much a slot was read and written of late
    attention: Array  # [R, M]: which slots each head read last
    read: Array  # [R, d]: what they held


def mann(
    features: Model,
    x: Array,
    loss_fn: LossFn,
    *,
    ways: int,
    tx: optax.GradientTransformation,
    hidden: int = 200,
    slots: int = 128,
    width: int = 40,
    heads: int = 4,
    metric_fns: Mapping[str, LossFn] = {},
    chunk_size: int | None = None,
) -> MetaLearner:
    r"""Memory-augmented neural networks (Santoro et al. 2016, arXiv 1605.06065, section 3).

    The support examples of a task are seen one after the other, in random order, then every query example for itself. An LSTM
    sees the features and the label of each, none with a query, and what it read last; see `see`. The logits are linear in its
    output and in what it reads then.

    Differs from the paper: an example comes with its own label, where theirs comes with the next example, an order in which it
    was slower to begin to learn; the LSTM sees features that are learned with it, not pixels; the sharpness of reading is
    learned, as in neural Turing machines, where theirs is 1; each head writes to one least used slot, of which theirs share as
    many as there are heads; the loss is that of the query examples, not of all steps of a longer sequence.

    Args:
        features: [n, ...] -> [n, f].
        x: [n, ...] an example input, for its shape and dtype only.
        loss_fn: (logits, labels) -> scalar, the mean over examples.
        ways: N, classes of a task, at least 2; labels are 0..N-1.
        tx: the outer optimiser.
        hidden: h, units of the LSTM.
        slots: M, of the memory, at least as many as heads.
        width: d, of a slot.
        heads: R, that write and read.
        metric_fns: further (logits, labels) -> scalar to report in evaluation, by name.
        chunk_size: tasks differentiated at a time; see `outer.meta_learner`.

    Returns:
        A meta-learner of `Task(support, query)` whose `evaluate` returns the `loss` and the metrics on the query set, each [1].

    Raises:
        ValueError: a count below 1, a single class, or fewer slots than heads; at the first update, a malformed task.
    """
    check_count("ways", ways, minimum=2)
    check_counts(hidden=hidden, slots=slots, width=width, heads=heads)
    if slots < heads:
        raise ValueError(f"a memory must have as many slots as heads, {heads}, got {slots}.")
    layers = {  # inputs and outputs
        "lstm": (feature_size(features, x) + ways + heads * width + hidden, 4 * hidden),
        "heads": (hidden, heads * (width + 2)),
        "output": (hidden + heads * width, ways),
    }

    def init(key: Array) -> PyTree:
        keys = jax.random.split(key, 1 + len(layers))
        kernels = map(jax.nn.initializers.glorot_uniform(), keys[1:], layers.values())
        params = {
            name: {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])} for name, kernel in zip(layers, kernels, strict=True)
        }
        params["lstm"]["bias"] = jnp.repeat(jnp.array([0.0, 1.0, 0.0, 0.0]), hidden)  # at first little is forgotten
        return {"features": features.init(keys[0]), **params}

    def compare(params: PyTree, task: Task) -> Array:
        """The logits of the query examples, after the support examples in their order: [n, N]."""
        support, query = features_of(features, params["features"], task)
        shown = jnp.concatenate([support, jax.nn.one_hot(task.support.y, ways)], axis=1)
        asked = jnp.concatenate([query, jnp.zeros((len(query), ways))], axis=1)
        start = Controller(
            hidden=jnp.zeros(hidden),
            cell=jnp.zeros(hidden),
            slots=jnp.zeros((slots, width)),
            usage=jnp.zeros(slots),
            attention=jnp.zeros((heads, slots)),
            read=jnp.zeros((heads, width)),
        )
        state, _ = lax.scan(lambda state, one: (see(params, state, one), None), start, shown)
        return jax.vmap(partial(answer, params, state))(asked)

    def task_loss(params: PyTree, task: Task) -> Array:
        return loss_fn(compare(params, task), task.query.y)

    scores = evaluation(compare, loss_fn, metric_fns)

    def evaluate(key: Array, state: State, task: Task) -> Metrics:
        return scores(key, state, _in_random_order(key, state.params, task))

    return meta_learner(init, task_loss, evaluate, tx=tx, gather=_in_random_order, chunk_size=chunk_size)


def see(params: PyTree, state: Controller, example: Array) -> Controller:
    r"""Show one example to the controller: its features with its label, [f + N].

    Each head has a key $k$ and a gate $\sigma(\alpha)$. It adds $k$ to the slots of the memory $M$ by the weights
    $\sigma(\alpha) w^r + (1 - \sigma(\alpha)) w^{lu}$: to those that it read last, or to one that was used the least, which the
    first head clears before. Then it reads by $w^r = \mathrm{softmax}(\beta \cos(k, M))$.
    """
    heads, width = state.read.shape
    inputs = jnp.concatenate([example, state.read.reshape(-1), state.hidden])
    out, cell = lstm(params["lstm"]["kernel"], params["lstm"]["bias"], inputs, state.cell)
    # Of each head its key [d], its gate, and how sharply it reads.
    by_head = _linear(params["heads"], out).reshape(heads, width + 2)
    keys, gate = jnp.tanh(by_head[:, :width]), jax.nn.sigmoid(by_head[:, width])
    sharpness = 1 + jax.nn.softplus(by_head[:, -1])
    least_used = jax.nn.one_hot(lax.top_k(-state.usage, heads)[1], len(state.usage))  # [R, M], a slot for each head
    written = gate[:, None] * state.attention + (1 - gate[:, None]) * least_used
    slots = (1 - least_used[0, :, None]) * state.slots + written.T @ keys
    attention = jax.nn.softmax(sharpness[:, None] * cosine_similarity(keys, slots))
    usage = USAGE_KEPT * state.usage + attention.sum(0) + written.sum(0)
    return Controller(out, cell, slots, usage, attention, attention @ slots)


def answer(params: PyTree, state: Controller, query: Array) -> Array:
    """The logits [N] of a query example: its features with no label, [f + N]."""
    after = see(params, state, query)
    return _linear(params["output"], jnp.concatenate([after.hidden, after.read.reshape(-1)]))


def _in_random_order(key: Array, params: PyTree, task: Task) -> Task:
    check_task(task)
    order = jax.random.permutation(key, len(task.support.y))
    return task._replace(support=jax.tree.map(lambda leaf: leaf[order], task.support))


def _linear(layer: PyTree, x: Array) -> Array:
    return x @ layer["kernel"] + layer["bias"]
