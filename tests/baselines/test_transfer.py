"""The baselines of Ravi & Larochelle: a classifier over all training classes, then fine-tuned or compared."""

import functools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamljax.baselines.transfer import fine_tuning, nearest_neighbour
from mamljax.losses import accuracy, cross_entropy
from mamljax.tasks.images import episodes, labelled
from mamljax.types import Examples, Model, Task

KEY = jax.random.key(0)
FEATURES = Model(
    init=lambda key: {"kernel": jax.random.normal(key, (16, 8)) / 4},
    apply=lambda params, x: x.reshape(len(x), -1) @ params["kernel"],
)
X = jnp.zeros((1, 4, 4, 1))
# Class i is a noisy picture of its own: what a classifier can learn and an episode's task can use.
RNG = np.random.default_rng(0)
BANK = np.clip(RNG.integers(0, 255, (12, 1, 4, 4, 1)) + RNG.normal(0, 10, (12, 20, 4, 4, 1)), 0, 255).astype(np.uint8)
SHARED = {"num_classes": 6, "ways": 3, "tx": optax.adam(0.01), "metric_fns": {"accuracy": accuracy}}
LEARNERS = {
    "fine_tuning": fine_tuning(FEATURES, X, cross_entropy, rule=0.5, eval_steps=20, **SHARED),
    "nearest_neighbour": nearest_neighbour(FEATURES, X, cross_entropy, **SHARED),
}
TRAIN = labelled(BANK[:6], batch_size=16)
TEST = episodes(BANK[6:], ways=3, shots=2, queries=4)


@functools.cache
def trained(learner, updates=150):
    def body(t, state):
        tasks = jax.vmap(TRAIN)(jax.random.split(jax.random.fold_in(KEY, t), 2))
        return learner.update(KEY, state, tasks)[0]

    return jax.jit(lambda state: jax.lax.fori_loop(0, updates, body, state))(learner.init(KEY))


@pytest.mark.parametrize("name", LEARNERS)
def test_training_learns_the_classes_of_the_bank(name):
    learner = LEARNERS[name]
    tasks = jax.vmap(TRAIN)(jax.random.split(KEY, 2))
    losses = [learner.update(KEY, state, tasks)[1]["loss"] for state in (learner.init(KEY), trained(learner))]
    assert losses[0] > 0.7 * np.log(6)
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", LEARNERS)
def test_updates_keep_the_state_as_it_is_and_are_traced_once(name):
    batches = [jax.vmap(TRAIN)(jax.random.split(jax.random.key(seed), 2)) for seed in range(2)]
    for metrics in battery.check_updates(battery.compiled(LEARNERS[name]), batches):
        assert metrics.keys() == {"loss", "grad_norm"}


def test_fine_tuning_adapts_a_new_head_to_classes_never_seen():
    learner = LEARNERS["fine_tuning"]
    state = trained(learner)
    curve = jax.jit(jax.vmap(lambda key: learner.evaluate(key, state, TEST(key))))(jax.random.split(KEY, 50))
    assert curve["accuracy"].shape == curve["loss"].shape == (50, 21)
    assert abs(curve["accuracy"][:, 0].mean() - 1 / 3) < 0.15  # the new head knows nothing yet
    assert curve["accuracy"][:, -1].mean() > 0.8


def test_the_head_of_the_training_classes_is_not_used():
    learner = LEARNERS["fine_tuning"]
    state = trained(learner, updates=2)
    other = state._replace(params=state.params | {"head": jax.tree.map(lambda leaf: leaf + 1, state.params["head"])})
    moved = state._replace(params=state.params | {"features": jax.tree.map(lambda leaf: -leaf, state.params["features"])})
    loss = jax.jit(lambda state, key=KEY: learner.evaluate(key, state, TEST(KEY))["loss"])
    np.testing.assert_array_equal(loss(state), loss(other))
    assert (loss(moved) != loss(state)).any()
    assert loss(state, jax.random.key(1))[0] != loss(state)[0]  # the new one is drawn


def test_nearest_neighbour_by_hand():
    features = Model(lambda key: {"none": jnp.zeros(())}, lambda params, x: x)
    learner = nearest_neighbour(features, jnp.zeros((1, 2)), lambda logits, labels: logits[0, 0], **SHARED)
    support = Examples(jnp.array([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0]]), jnp.array([0, 1, 2, 2]))
    # By angle the first is nearest to class 2 (45 degrees), although its largest product is with class 0.
    query = Examples(jnp.array([[1.0, 0.9], [0.1, 1.0], [5.0, 0.1], [-1.0, 0.2]]), jnp.array([2, 1, 0, 1]))
    metrics = learner.evaluate(KEY, learner.init(KEY), Task(support, query))
    np.testing.assert_allclose(metrics["accuracy"], [0.75])  # all but the last
    np.testing.assert_allclose(metrics["loss"], [1.0 / np.sqrt(1.81)], rtol=1e-6)  # the cosine with class 0


def test_labelled_batches_hold_images_of_their_class():
    bank = np.broadcast_to(np.arange(12, dtype=np.uint8)[:, None, None, None, None], (12, 5, 2, 2, 1)).copy()
    bank[:, 3:] = 99
    task = labelled(bank, batch_size=6000, counts=[3] * 12)(KEY)
    np.testing.assert_array_equal(np.rint(255 * task.support.x[:, 0, 0, 0]), task.support.y)  # and none beyond the counts
    jax.tree.map(np.testing.assert_array_equal, task.query, task.support)
    counts = np.bincount(task.support.y, minlength=12)
    assert np.abs(counts - 500).max() < 4.5 * np.sqrt(500 * 11 / 12)
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        labelled(bank, batch_size=0)


def test_labelled_images_are_turned_one_by_one():
    bank = np.zeros((1, 1, 2, 2, 1), np.uint8)
    bank[0, 0, 0, 0] = 255
    x = labelled(bank, batch_size=4000, rotations=True)(KEY).support.x[..., 0]
    counts = np.asarray((x == 1.0).sum(0)).ravel()
    assert np.abs(counts - 1000).max() < 4.5 * np.sqrt(4000 * 3 / 16)


@pytest.mark.parametrize(("name", "least"), [("ways", 2), ("num_classes", 1)])
def test_counts_are_checked(name, least):
    with pytest.raises(ValueError, match=f"must be a whole number of at least {least}, got 0"):
        nearest_neighbour(FEATURES, X, cross_entropy, **SHARED | {name: 0})


def test_steps_of_fine_tuning_are_counted_from_one():
    with pytest.raises(ValueError, match="eval_steps must be a whole number of at least 1, got 0"):
        fine_tuning(FEATURES, X, cross_entropy, rule=0.5, eval_steps=0, **SHARED)
