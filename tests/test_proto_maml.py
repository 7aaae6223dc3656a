"""Proto-MAML: where adaptation begins, and a meta-gradient that goes through that beginning."""

import battery
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import KEY

from mamljax.baselines.metric_learning import prototypical
from mamljax.losses import accuracy, cross_entropy
from mamljax.maml import fine_tune
from mamljax.models import with_linear_head
from mamljax.proto_maml import proto_maml, with_prototypes
from mamljax.types import Examples, Model, State, Task

X = jnp.zeros((1, 2))
FEATURES = Model(lambda key: jax.random.normal(key, (2, 3)), lambda params, x: jnp.tanh(x @ params))
SIZES = {"ways": 3, "inner_steps": 2, "eval_steps": 3, "rule": 0.5}


def task_of(rng, ways=3, shots=2):
    """A task whose classes are clouds of points."""
    centres, labels = rng.normal(size=(ways, 2)), np.arange(ways).repeat(shots)
    return Task(*(Examples(jnp.asarray(centres[labels] + rng.normal(0, 0.3, (len(labels), 2))), labels) for _ in range(2)))


def test_the_layer_on_top_by_hand():
    identity = Model(lambda key: (), lambda params, x: x)
    support = Examples(jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [1.0, 1.0]]), jnp.array([0, 1, 2, 2]))
    params = with_prototypes(identity, (), support, 4)
    assert params["features"] == ()
    # Prototypes (1, 0), (0, 2), (2, 2), and none.
    assert params["head"]["kernel"].tolist() == [[2.0, 0.0, 4.0, 0.0], [0.0, 4.0, 4.0, 0.0]]
    assert params["head"]["bias"].tolist() == [[-1.0, -4.0, -8.0, -np.inf]]


def test_before_the_first_step_it_is_a_prototypical_network():
    task = task_of(np.random.default_rng(0))
    shared = {"tx": optax.sgd(0.1), "metric_fns": {"accuracy": accuracy}}
    adapting = proto_maml(FEATURES, X, cross_entropy, **SIZES, **shared)
    comparing = prototypical(FEATURES, cross_entropy, ways=3, **shared)
    assert jax.tree.structure(adapting.init(KEY)) == jax.tree.structure(comparing.init(KEY))
    scores, expected = (learner.evaluate(KEY, learner.init(KEY), task) for learner in (adapting, comparing))
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(scores[name][:1], expected[name], rtol=1e-5)
    assert scores["loss"].shape == (4,)
    assert len({*scores["loss"].tolist()}) == 4


def noisy_tasks(rng, number):
    """Tasks whose second coordinate says nothing, and drowns the first."""
    tasks = jax.tree.map(lambda *leaves: np.stack(leaves), *(task_of(rng) for _ in range(number)))
    noisy = (Examples(np.stack([3 * x[..., 0], rng.normal(0, 3, x.shape[:-1])], -1), y) for x, y in tasks)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, "float32" if leaf.dtype == float else None), Task(*noisy))


def test_it_learns_features_to_begin_with():
    rng = np.random.default_rng(3)
    settings = SIZES | {"rule": 0.05, "tx": optax.adam(0.05), "metric_fns": {"accuracy": accuracy}}
    learner = proto_maml(FEATURES, X, cross_entropy, **settings)
    battery.check_arguments(learner)
    for metrics in battery.check_updates(battery.compiled(learner), [noisy_tasks(rng, 4) for _ in range(2)]):
        assert metrics.keys() == {"loss", "grad_norm"}
    update, state, test = jax.jit(learner.update), learner.init(KEY), noisy_tasks(rng, 300)
    evaluate = jax.jit(jax.vmap(learner.evaluate, (None, None, 0)))
    before = evaluate(KEY, state, test)["accuracy"].mean(0)
    for _ in range(150):
        state, _ = update(KEY, state, noisy_tasks(rng, 16))
    after = evaluate(KEY, state, test)["accuracy"].mean(0)
    assert (after > before + 0.1).all()


@pytest.mark.parametrize("differentiation", ["mixed", "reverse", "first_order"])
def test_the_meta_gradient(differentiation):
    """Of one task: by finite differences, in first order by those of where the steps begin alone."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        task, params, network = task_of(rng), rng.normal(size=(2, 3)), with_linear_head(FEATURES, X, 3)
        settings = {"differentiation": differentiation}
        learner = proto_maml(FEATURES, X, cross_entropy, tx=optax.sgd(1.0), **SIZES, **settings)
        state = State(jnp.asarray(params), optax.sgd(1.0).init(params))
        new, metrics = learner.update(KEY, state, jax.tree.map(lambda leaf: leaf[None], task))

        def start_of(params):
            return with_prototypes(FEATURES, params, task.support, 3)

        def adapted_from(start):
            return fine_tune(network, cross_entropy, start, task.support, 0.5, 2)[0]

        moved = jax.tree.map(lambda a, b: a - b, adapted_from(start_of(params)), start_of(params))

        @jax.jit
        def loss(params):
            start = start_of(params)
            adapted = optax.tree.add(start, moved) if differentiation == "first_order" else adapted_from(start)
            return cross_entropy(network.apply(adapted, task.query.x), task.query.y)

        steps = 1e-5 * np.eye(6).reshape(6, 2, 3)
        expected = np.array([(loss(params + step) - loss(params - step)) / 2e-5 for step in steps]).reshape(2, 3)
        np.testing.assert_allclose(params - new.params, expected, rtol=1e-7)
        np.testing.assert_allclose(metrics["loss"], loss(params), rtol=1e-12)


def test_a_class_without_support_is_never_predicted_and_hinders_no_learning():
    tasks = jax.tree.map(lambda leaf: leaf[None], task_of(np.random.default_rng(2)))
    four, three = (
        proto_maml(FEATURES, X, cross_entropy, tx=optax.sgd(0.1), **SIZES | {"ways": ways}).update(
            KEY, State(FEATURES.init(KEY), optax.sgd(0.1).init(FEATURES.init(KEY))), tasks
        )
        for ways in (4, 3)
    )
    assert four[1]["grad_norm"] > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), four, three)
