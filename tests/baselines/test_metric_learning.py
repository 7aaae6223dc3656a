"""Methods that compare or look up features: matching, prototypical and siamese networks, and those with a memory."""

import battery
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import KEY

from mamljax.baselines.mann import mann
from mamljax.baselines.memory_module import memory_module
from mamljax.baselines.metric_learning import matching, prototypical, siamese
from mamljax.baselines.neural_statistician import neural_statistician
from mamljax.losses import accuracy, cross_entropy
from mamljax.tasks.images import episodes, inductive
from mamljax.types import Examples, Model, Task

FEATURES = Model(
    init=lambda key: {"kernel": jax.random.normal(key, (16, 8)) / 4},
    apply=lambda params, x: x.reshape(len(x), -1) @ params["kernel"],
)
IDENTITY = Model(lambda key: {"none": jnp.zeros(())}, lambda params, x: x)
# Classes differ in their first two pixels, which the others drown at first.
RNG = np.random.default_rng(0)
BANK = RNG.integers(0, 255, (12, 20, 4, 4, 1)).astype(np.uint8)
BANK[..., 0, :2, 0] = RNG.integers(0, 255, (12, 1, 2))
TRAIN, TEST = (episodes(part, ways=3, shots=2, queries=4) for part in (BANK[:8], BANK[8:]))
SHARED = {"ways": 3, "tx": optax.adam(0.03), "metric_fns": {"accuracy": accuracy}}
SLOWER = SHARED | {"tx": optax.adam(0.01)}
LEARNERS = {
    "matching": matching(FEATURES, cross_entropy, **SHARED),
    "prototypical": prototypical(FEATURES, cross_entropy, **SHARED),
    "siamese": siamese(FEATURES, jnp.zeros((1, 4, 4, 1)), cross_entropy, **SHARED),
    "memory_module": memory_module(FEATURES, cross_entropy, **SHARED),
    "mann": mann(
        FEATURES,
        jnp.zeros((1, 4, 4, 1)),
        cross_entropy,
        hidden=32,
        slots=8,
        width=8,
        heads=2,
        **SHARED | {"tx": optax.adam(0.01)},
    ),
    "neural_statistician": neural_statistician(
        FEATURES, jnp.zeros((1, 4, 4, 1)), cross_entropy, context_size=4, latent_size=1, hidden=32, **SLOWER
    ),
}


@pytest.fixture(params=LEARNERS)
def learner(request):
    return LEARNERS[request.param]


def tasks_from(seed, num_tasks=4, sample=TRAIN):
    return jax.vmap(sample)(jax.random.split(jax.random.key(seed), num_tasks))


def mean_accuracy(learner, state):
    evaluate = jax.jit(jax.vmap(learner.evaluate, in_axes=(None, None, 0)))
    scores = evaluate(KEY, state, tasks_from(5, 200, TEST))["accuracy"]
    assert scores.shape == (200, 1)
    return scores.mean()


@pytest.mark.parametrize("name", LEARNERS)
def test_learns_features_that_tell_classes_never_seen_apart(name):
    learner, (num_updates, num_tasks) = LEARNERS[name], (400, 16) if name in ("mann", "neural_statistician") else (200, 4)

    def body(t, state):
        tasks = jax.vmap(TRAIN)(jax.random.split(jax.random.fold_in(KEY, t), num_tasks))
        return learner.update(jax.random.fold_in(KEY, t), state, tasks)[0]

    start = learner.init(KEY)
    state = jax.jit(lambda state: jax.lax.fori_loop(0, num_updates, body, state))(start)
    before, after = mean_accuracy(learner, start), mean_accuracy(learner, state)
    assert before < 0.65
    assert after > before + 0.15


def test_updates_keep_the_state_as_it_is_and_are_traced_once(learner):
    battery.check_arguments(learner)
    for metrics in battery.check_updates(battery.compiled(learner), map(tasks_from, range(2))):
        assert metrics.keys() == {"loss", "grad_norm"}


@pytest.mark.parametrize("learner", ["matching", "prototypical", "siamese"], indirect=True)
def test_order_of_the_support_set_does_not_matter(learner):
    state, task = learner.init(KEY), TRAIN(KEY)
    turned = task._replace(support=jax.tree.map(lambda leaf: leaf[::-1], task.support))
    one, other = (learner.evaluate(KEY, state, task) for task in (task, turned))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, other)
    one, other = (learner.update(KEY, state, jax.tree.map(lambda leaf: leaf[None], task))[1]["loss"] for task in (task, turned))
    np.testing.assert_allclose(one, other, rtol=1e-5)


# Not the neural statistician, which draws other samples then; its own tests have that.
@pytest.mark.parametrize("learner", [name for name in LEARNERS if name != "neural_statistician"], indirect=True)
def test_unlabelled_queries_do_not_count(learner):
    """As those are that inductive episodes begin with."""
    state = learner.init(KEY)
    one, other = (learner.evaluate(KEY, state, sample(KEY)) for sample in (TRAIN, inductive(TRAIN)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, other)
    one, other = (learner.update(KEY, state, tasks_from(0, sample=sample))[1]["loss"] for sample in (TRAIN, inductive(TRAIN)))
    np.testing.assert_allclose(one, other, rtol=1e-5)


SUPPORT = Examples(jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [1.0, 1.0]]), jnp.array([0, 1, 2, 2]))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        # Cosines with (1, 0): 1, 0, and 0.5 ** 0.5 twice.
        (matching, np.log([np.e, 1, 2 * np.exp(0.5**0.5)] / (np.e + 1 + 2 * np.exp(0.5**0.5)))),
        # Prototypes (1, 0), (0, 2), (2, 2).
        (prototypical, [-1.0, -8.0, -4.0]),
    ],
)
def test_logits_by_hand(build, expected):
    expected = jnp.asarray(expected)
    learner = build(IDENTITY, lambda logits, labels: jnp.abs(logits[0] - expected).max(), **SHARED)
    query = Examples(jnp.array([[2.0, 0.0]]), jnp.array([0]))
    np.testing.assert_allclose(learner.evaluate(KEY, learner.init(KEY), Task(SUPPORT, query))["loss"], [0.0], atol=1e-6)


@pytest.mark.parametrize("build", [matching, prototypical])
def test_a_class_without_support_is_never_predicted_and_hinders_no_learning(build):
    features = Model(lambda key: jnp.eye(2), lambda params, x: x @ params)
    learner = build(features, cross_entropy, ways=4, tx=optax.sgd(0.1), metric_fns={"accuracy": accuracy})
    query = Examples(SUPPORT.x + 0.1, SUPPORT.y)
    tasks = jax.tree.map(lambda leaf: leaf[None], Task(SUPPORT, query))
    metrics = learner.update(KEY, learner.init(KEY), tasks)[1]
    assert 0 < metrics["grad_norm"] < np.inf
    three = build(features, cross_entropy, ways=3, tx=optax.sgd(0.1))
    np.testing.assert_allclose(metrics["loss"], three.update(KEY, three.init(KEY), tasks)[1]["loss"], rtol=1e-6)


def test_siamese_logits_and_loss_by_hand():
    expected = jnp.array([-1.0 + 0.5, -2.0 - 4.0 + 0.5, -1.0 - 2.0 + 0.5])  # of class 2 with (1, 1), the nearer one
    learner = siamese(IDENTITY, jnp.zeros((1, 2)), lambda logits, labels: jnp.abs(logits[0] - expected).max(), **SHARED)
    state = learner.init(KEY)
    head = {"kernel": jnp.array([[-1.0], [-2.0]]), "bias": jnp.full((1, 1), 0.5)}
    state = state._replace(params=state.params | {"head": head})
    task = Task(SUPPORT, Examples(jnp.array([[2.0, 0.0]]), jnp.array([2])))
    np.testing.assert_allclose(learner.evaluate(KEY, state, task)["loss"], [0.0], atol=1e-6)
    alike = [-1.0 - 6.0 + 0.5, -1.0 - 2.0 + 0.5]
    unlike = [-0.5, -5.5]
    loss = (np.log1p(np.exp(-np.array(alike))).mean() + np.log1p(np.exp(unlike)).mean()) / 2
    metrics = learner.update(KEY, state, jax.tree.map(lambda leaf: leaf[None], task))[1]
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    # Without a support example of its class, the pairs of two classes are all there is.
    of_others = jax.tree.map(lambda leaf: leaf[SUPPORT.y != 2][None], SUPPORT)
    metrics = learner.update(KEY, state, Task(of_others, jax.tree.map(lambda leaf: leaf[None], task.query)))[1]
    np.testing.assert_allclose(metrics["loss"], np.log1p(np.exp(unlike)).mean() / 2, rtol=1e-6)
    assert jnp.isfinite(metrics["grad_norm"])


def unit(vector):
    return np.asarray(vector) / np.linalg.norm(vector)


# 0 is written, 1 is written, 0 is nearest to its own key, 1 is nearest to that of 0 and written once more; 0 is then nearest to
# a key of 1 and written once more; in the end both classes have two keys.
SEEN = Examples(
    jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [3.0, 1.0, 0.0], [2.0, 1.0, 1.0], [0.0, 0.0, 0.5], [0.0, 1.0, 0.4]]),
    jnp.array([0, 1, 0, 1, 0, 1]),
)
KEYS = [unit(unit([3, 1, 0]) + np.array([1, 0, 0])), np.array([0, 1, 0]), unit([2, 1, 1])]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3]])
def test_a_memory_by_hand(order):
    """Four examples to remember and two to classify, which are written down in training alone; class by class or not."""
    expected = 40 * np.array([KEYS[0] @ [0, 0, 1], max(KEYS[1] @ [0, 0, 1], KEYS[2] @ [0, 0, 1])])
    deviation = lambda logits, labels: jnp.abs(logits[0, :2] - expected).max()  # noqa: E731
    learner = memory_module(IDENTITY, deviation, **SHARED | {"ways": 2}, margin=0.3)
    task = Task(Examples(SEEN.x[jnp.array(order)], SEEN.y[jnp.array(order)]), Examples(SEEN.x[4:], SEEN.y[4:]))
    state = learner.init(KEY)
    np.testing.assert_allclose(learner.evaluate(KEY, state, task)["loss"], [0.0], atol=1e-5)
    third, fourth, fifth, sixth = unit([3, 1, 0]), unit([2, 1, 1]), np.array([0, 0, 1]), unit([0, 1, 0.4])
    losses = [  # of those whose class, and another, is known
        third[1] - third[0] + 0.3,
        KEYS[0] @ fourth - fourth[1] + 0.3,
        KEYS[2] @ fifth - KEYS[0] @ fifth + 0.3,
        max(KEYS[0] @ sixth, fifth @ sixth) - max(KEYS[1] @ sixth, KEYS[2] @ sixth) + 0.3,
    ]
    assert min(losses[0], losses[3]) < 0 < min(losses[1:3])
    metrics = learner.update(KEY, state, jax.tree.map(lambda leaf: leaf[None], task))[1]
    np.testing.assert_allclose(metrics["loss"], np.maximum(losses, 0).mean(), rtol=1e-5)


def test_keys_are_constants_to_the_gradient():
    """It moves an example, not those that were seen before it."""
    positions = Model(lambda key: {"x": SEEN.x}, lambda params, x: params["x"] + 0 * x)
    learner = memory_module(positions, cross_entropy, **SHARED | {"ways": 2, "tx": optax.sgd(1.0)})
    state, task = learner.init(KEY), Task(Examples(SEEN.x[:4], SEEN.y[:4]), Examples(SEEN.x[4:], SEEN.y[4:]))
    moved = learner.update(KEY, state, jax.tree.map(lambda leaf: leaf[None], task))[0].params["x"] != SEEN.x
    assert moved.any(1).tolist() == [False, False, False, True, True, False]  # the first two do not count, two are near enough


def test_labels_may_be_of_any_whole_numbers():
    learner = memory_module(FEATURES, cross_entropy, **SHARED)
    tasks, state = tasks_from(1), learner.init(jax.random.key(0))
    unsigned = jax.tree.map(lambda leaf: leaf.astype(jnp.uint8) if leaf.dtype == jnp.int32 else leaf, tasks)
    metrics = [learner.update(jax.random.key(0), state, tasks)[1] for tasks in (tasks, unsigned)]
    jax.tree.map(np.testing.assert_array_equal, *metrics)
    assert metrics[0]["grad_norm"] > 0


def test_the_margin_is_positive():
    with pytest.raises(ValueError, match=r"margin must be positive, got 0\.0"):
        memory_module(FEATURES, cross_entropy, **SHARED, margin=0.0)


def test_counts_are_checked():
    for build in (matching, prototypical, memory_module):
        with pytest.raises(ValueError, match="ways must be a whole number of at least 2, got 1"):
            build(FEATURES, cross_entropy, **SHARED | {"ways": 1})
    with pytest.raises(ValueError, match="ways must be a whole number of at least 2, got 1"):
        siamese(FEATURES, jnp.zeros((1, 4, 4, 1)), cross_entropy, **SHARED | {"ways": 1})
