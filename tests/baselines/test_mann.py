"""Memory-augmented networks: what one step of the controller does, by NumPy, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamljax.baselines.mann import Controller, mann, see
from mamljax.losses import cross_entropy
from mamljax.types import Examples, Model, Task

HIDDEN, SLOTS, WIDTH, HEADS, WAYS = 3, 5, 2, 2, 2
IDENTITY = Model(lambda key: {"none": jnp.zeros(())}, lambda params, x: x)
SIZES = {"ways": WAYS, "hidden": HIDDEN, "slots": SLOTS, "width": WIDTH, "heads": HEADS, "tx": optax.sgd(0.1)}
START = Controller(*map(np.zeros, (HIDDEN, HIDDEN, (SLOTS, WIDTH), SLOTS, (HEADS, SLOTS), (HEADS, WIDTH))))


def build(**changes):
    return mann(IDENTITY, jnp.zeros((1, 4)), cross_entropy, **SIZES | changes)


@pytest.fixture(scope="module")
def params():
    """Larger than those of `init`, so that heads and slots differ."""
    return jax.tree.map(lambda leaf: 3 * leaf + 0.1, build().init(jax.random.key(0)).params)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def see_by_numpy(params, state, example):
    """Section 3 of the paper, a head and a slot at a time."""
    dense = lambda name, x: x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])  # noqa: E731
    take, keep, show, new = np.split(dense("lstm", np.concatenate([example, state.read.ravel(), state.hidden])), 4)
    cell = sigmoid(keep) * state.cell + sigmoid(take) * np.tanh(new)
    hidden = sigmoid(show) * np.tanh(cell)
    by_head = dense("heads", hidden).reshape(HEADS, WIDTH + 2)
    keys = np.tanh(by_head[:, :WIDTH])
    least_used = np.argsort(state.usage, kind="stable")[:HEADS]
    slots, usage = state.slots.copy(), 0.99 * state.usage
    slots[least_used[0]] = 0
    for head in range(HEADS):
        gate = sigmoid(by_head[head, WIDTH])
        weights = gate * state.attention[head]
        weights[least_used[head]] += 1 - gate
        slots += np.outer(weights, keys[head])
        usage += weights
    attention = np.empty((HEADS, SLOTS))
    for head in range(HEADS):
        lengths = np.maximum(np.linalg.norm(slots, axis=1) * np.linalg.norm(keys[head]), 1e-9)
        scores = (1 + np.log1p(np.exp(by_head[head, -1]))) * (slots @ keys[head]) / lengths
        attention[head] = np.exp(scores) / np.exp(scores).sum()
        usage += attention[head]
    return Controller(hidden, cell, slots, usage, attention, attention @ slots)


def test_steps_of_the_controller_by_numpy(params):
    """Four, so that all slots are in use and written to again."""
    state = by_numpy = START
    for example in np.random.default_rng(0).normal(size=(4, 4 + WAYS)):
        state, by_numpy = see(params, state, jnp.asarray(example, jnp.float32)), see_by_numpy(params, by_numpy, example)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state, by_numpy)
    assert (np.abs(state.slots).sum(1) > 0.05).all()


def test_at_first_little_of_a_cell_is_forgotten():
    """By the biases alone, without kernels, its gate is open by sigmoid(1) = 0.73; the others are half open."""
    params = build().init(jax.random.key(0)).params
    params = {name: layer | {"kernel": jnp.zeros_like(layer["kernel"])} for name, layer in params.items() if name != "features"}
    after = see(params, START._replace(cell=np.ones(HIDDEN)), jnp.zeros(4 + WAYS))
    np.testing.assert_allclose(after.cell, sigmoid(1.0), rtol=1e-5)
    np.testing.assert_allclose(after.hidden, 0.5 * np.tanh(sigmoid(1.0)), rtol=1e-5)


def test_a_query_sees_the_support_set_and_no_other_query(params):
    """Its logits by hand, which the loss gives away."""
    rng = np.random.default_rng(1)
    support = Examples(jnp.asarray(rng.normal(size=(1, 4)), jnp.float32), jnp.array([1]))
    query = Examples(jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), jnp.zeros(3, jnp.int32))
    state = see_by_numpy(params, START, np.append(support.x[0], [0, 1]))
    expected = []
    for x in np.asarray(query.x):
        after = see_by_numpy(params, state, np.append(x, [0, 0]))
        outputs = np.concatenate([after.hidden, after.read.ravel()])
        expected.append(outputs @ np.asarray(params["output"]["kernel"]) + np.asarray(params["output"]["bias"]))
    learner = mann(IDENTITY, query.x, lambda logits, labels: jnp.abs(logits - jnp.array(expected)).max(), **SIZES)
    state = learner.init(jax.random.key(0))._replace(params=params)
    scores = learner.evaluate(jax.random.key(1), state, Task(support, query))
    np.testing.assert_allclose(scores["loss"], [0.0], atol=1e-4)


def test_the_order_of_the_support_set_is_drawn():
    learner = build()
    state = learner.init(jax.random.key(0))
    support = Examples(jax.random.normal(jax.random.key(1), (2, 4)), jnp.arange(2))
    losses = {
        float(learner.evaluate(key, state, Task(support, support))["loss"][0]) for key in jax.random.split(jax.random.key(2), 8)
    }
    assert len(losses) == 2


def test_malformed_tasks_are_refused():
    learner = build()
    state, good = learner.init(jax.random.key(0)), Examples(jnp.zeros((2, 4)), jnp.arange(2))
    task = Task(Examples(jnp.zeros((3, 4)), jnp.arange(2)), good)
    for call in (
        learner.evaluate,
        lambda key, state, task: learner.update(key, state, jax.tree.map(lambda leaf: leaf[None], task)),
    ):
        with pytest.raises(ValueError, match="x and y of the support set must have one length"):
            call(jax.random.key(1), state, task)


def test_features_are_flat():
    with pytest.raises(ValueError, match=r"features must be \[n, d\], got \[1, 2, 2\]. Flatten them"):
        mann(IDENTITY, jnp.zeros((1, 2, 2)), cross_entropy, **SIZES)


def test_bad_sizes():
    for name, least in (("ways", 2), ("hidden", 1), ("slots", 1), ("width", 1), ("heads", 1)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least {least}, got 0"):
            build(**{name: 0})
    with pytest.raises(ValueError, match="a memory must have as many slots as heads, 3, got 2"):
        build(slots=2, heads=3)
