"""One battery for every learner of tasks like those of regression: a new method is one more row of the table.

Those of reinforcement learning have theirs in `rl/test_maml_rl.py`, the classifiers of many classes in `baselines/`; but what
the builders of all of them have in common is checked here.
"""

import functools
import re

import battery
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import KEY, equal

from mamljax.baselines.mann import mann
from mamljax.baselines.memory_module import memory_module
from mamljax.baselines.meta_lstm import meta_lstm
from mamljax.baselines.metric_learning import matching, prototypical, siamese
from mamljax.baselines.multi_task import multi_task, squared_distance
from mamljax.baselines.neural_statistician import neural_statistician
from mamljax.baselines.pretrain import pretrain
from mamljax.baselines.transfer import fine_tuning, nearest_neighbour
from mamljax.checkpoint import Checkpoints
from mamljax.imaml import imaml
from mamljax.losses import cross_entropy, mse
from mamljax.maml import maml
from mamljax.maml_plus_plus import maml_plus_plus
from mamljax.models import mlp
from mamljax.proto_maml import proto_maml
from mamljax.reptile import reptile
from mamljax.rules import learned_by_step, learned_step_sizes
from mamljax.tasks.sinusoid import sinusoid
from mamljax.types import Model, Task

MODEL = mlp(1, (8, 8), 1)
METRICS = {"absolute": lambda outputs, y: jnp.abs(outputs - y).mean(), "mean_output": lambda outputs, y: outputs.mean()}
TRAINING = {"tx": optax.adam(1e-2), "metric_fns": METRICS}
SAMPLE = sinusoid(shots=5, queries=6)


def meta_sgd(inner_steps):
    model, rule = learned_step_sizes(MODEL, 0.01)
    return maml(model, mse, rule=rule, inner_steps=inner_steps, eval_steps=3, **TRAINING)


def learned_lstm(inner_steps):
    model, rule = meta_lstm(MODEL, 0.01, hidden=3)
    sizes = {"inner_steps": inner_steps, "eval_steps": 3}
    return maml(model, mse, rule=rule, differentiation="first_order", **sizes, **TRAINING)


def plus_plus(inner_steps):
    model, rule = learned_by_step(MODEL, 0.01, inner_steps)
    sizes = {"inner_steps": inner_steps, "multi_step_updates": 2, "eval_steps": 3}
    return maml_plus_plus(model, mse, rule=rule, **sizes, **TRAINING)


MAML = functools.partial(maml, MODEL, mse, inner_steps=2, eval_steps=3, **TRAINING)
MULTI_TASK = functools.partial(multi_task, MODEL, mse, task_tx=optax.adam(1e-2), task_steps=3, metric_fns=METRICS)
PRETRAIN = functools.partial(pretrain, MODEL, mse, **TRAINING)
LEARNERS = {  # name: (learner, adaptation steps in evaluation)
    "maml": (MAML(rule=0.01), 3),
    "maml, one step": (MAML(rule=0.01, inner_steps=1), 3),
    "maml, reverse": (MAML(rule=0.01, differentiation="reverse"), 3),
    "fomaml": (MAML(rule=0.01, differentiation="first_order"), 3),
    "maml, adam inside": (MAML(rule=optax.adam(0.01, eps_root=1e-8)), 3),
    "meta-sgd": (meta_sgd(2), 3),
    "maml++": (plus_plus(2), 3),
    "meta-learner lstm": (learned_lstm(2), 3),
    "imaml": (imaml(MODEL, mse, rule=0.01, inner_steps=3, strength=2.0, cg_steps=2, eval_steps=3, **TRAINING), 3),
    "reptile": (reptile(MODEL, mse, rule=0.01, inner_steps=3, batch_size=4, eval_steps=3, **TRAINING), 3),
    "pretrained": (PRETRAIN(rule=0.01, eval_steps=3), 3),
    "multi-task": (MULTI_TASK(rule=0.01, eval_steps=3, penalty=squared_distance), 3),
    "oracle": (PRETRAIN(rule=0.01, eval_steps=0), 0),
}


FEATURES = Model(lambda key: jax.random.normal(key, (1, 4)), lambda params, x: x @ params)
FEATURES_AND_LOSS = (FEATURES, jnp.zeros((1, 1)), cross_entropy)
TX = {"tx": optax.sgd(0.1)}
ADAPTED = {"rule": 0.1, "eval_steps": 1}
BUILDERS = {  # name: (builder, whether it builds a classifier)
    "maml": (functools.partial(maml, MODEL, mse, inner_steps=2, **ADAPTED, **TX), False),
    "maml++": (functools.partial(maml_plus_plus, MODEL, mse, inner_steps=2, multi_step_updates=2, **ADAPTED, **TX), False),
    "imaml": (functools.partial(imaml, MODEL, mse, inner_steps=2, strength=2.0, cg_steps=2, **ADAPTED, **TX), False),
    "proto-maml": (functools.partial(proto_maml, *FEATURES_AND_LOSS, ways=2, inner_steps=2, **ADAPTED, **TX), True),
    "reptile": (functools.partial(reptile, MODEL, mse, inner_steps=2, batch_size=4, **ADAPTED, **TX), False),
    "pretrained": (functools.partial(pretrain, MODEL, mse, **ADAPTED, **TX), False),
    "multi-task": (functools.partial(multi_task, MODEL, mse, task_tx=optax.sgd(0.1), task_steps=2, **ADAPTED), False),
    "fine-tuning": (functools.partial(fine_tuning, *FEATURES_AND_LOSS, num_classes=2, ways=2, **ADAPTED, **TX), True),
    "nearest neighbour": (functools.partial(nearest_neighbour, *FEATURES_AND_LOSS, num_classes=2, ways=2, **TX), True),
    "matching": (functools.partial(matching, FEATURES, cross_entropy, ways=2, **TX), True),
    "prototypical": (functools.partial(prototypical, FEATURES, cross_entropy, ways=2, **TX), True),
    "siamese": (functools.partial(siamese, *FEATURES_AND_LOSS, ways=2, **TX), True),
    "memory module": (functools.partial(memory_module, FEATURES, cross_entropy, ways=2, **TX), True),
    "mann": (functools.partial(mann, *FEATURES_AND_LOSS, ways=2, **TX), True),
    "neural statistician": (functools.partial(neural_statistician, *FEATURES_AND_LOSS, ways=2, **TX), True),
}


@pytest.fixture(params=LEARNERS, scope="module")
def case(request):
    """A learner with its update compiled, its number of steps, and its evaluation compiled."""
    learner, num_steps = LEARNERS[request.param]
    return battery.compiled(learner), num_steps, jax.jit(learner.evaluate)


def tasks_from(seed, num_tasks=4):
    return jax.vmap(SAMPLE)(jax.random.split(jax.random.key(seed), num_tasks))


def test_is_three_functions_with_the_same_arguments(case):
    battery.check_arguments(case[0].learner)


def test_updates_keep_the_state_as_it_is_and_are_traced_once(case):
    for metrics in battery.check_updates(case[0], map(tasks_from, range(3))):
        assert {"loss", "grad_norm"} <= metrics.keys()


def test_same_key_same_result(case):
    learner, update, _ = case[0]
    assert equal(learner.init(KEY), learner.init(KEY))
    first, second = (update(KEY, learner.init(KEY), tasks_from(0)) for _ in range(2))
    assert equal(first, second)
    assert not equal(first[0].params, update(KEY, learner.init(KEY), tasks_from(1))[0].params)


def test_order_of_tasks_does_not_matter(case):
    learner, update, _ = case[0]
    tasks = tasks_from(0)
    one = update(KEY, learner.init(KEY), tasks)[1]
    other = update(KEY, learner.init(KEY), jax.tree.map(lambda leaf: leaf[::-1], tasks))[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, other)


def test_loss_is_the_mean_of_the_losses_of_single_tasks(case):
    """So no task takes part in another one's adaptation."""
    learner, update, _ = case[0]
    tasks = tasks_from(0)
    singles = [
        update(KEY, learner.init(KEY), jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], tasks))[1]["loss"] for i in range(4)
    ]
    together = jax.jit(learner.update)(KEY, learner.init(KEY), tasks)[1]["loss"]
    np.testing.assert_allclose(together, np.mean(singles), rtol=1e-5)


def test_evaluation_has_a_number_for_each_step(case):
    (learner, *_), num_steps, evaluate = case
    metrics = evaluate(KEY, learner.init(KEY), SAMPLE(KEY))
    assert metrics.keys() == {"loss", "absolute", "mean_output"}
    for values in metrics.values():
        assert values.shape == (num_steps + 1,)
        assert jnp.isfinite(values).all()
    if num_steps:
        assert metrics["loss"][-1] != metrics["loss"][0]


def test_evaluation_before_adaptation_is_that_of_the_network(case):
    (learner, *_), _, evaluate = case
    state, task = learner.init(KEY), SAMPLE(KEY)
    params = next((state.params[name] for name in ("theta", "mean") if name in state.params), state.params)
    outputs = MODEL.apply(params, task.query.x)
    metrics = evaluate(KEY, state, task)
    np.testing.assert_allclose(metrics["loss"][0], mse(outputs, task.query.y), rtol=1e-5)
    np.testing.assert_allclose(metrics["absolute"][0], jnp.abs(outputs - task.query.y).mean(), rtol=1e-5)


def test_adaptation_sees_the_support_labels_and_not_those_of_the_query_set(case):
    (learner, *_), num_steps, evaluate = case
    state, task = learner.init(KEY), SAMPLE(KEY)
    outputs = evaluate(KEY, state, task)["mean_output"]
    other_query = evaluate(KEY, state, task._replace(query=task.query._replace(y=task.query.y + 1.0)))
    np.testing.assert_array_equal(outputs, other_query["mean_output"])
    other_support = evaluate(KEY, state, task._replace(support=task.support._replace(y=task.support.y + 1.0)))
    assert outputs[0] == other_support["mean_output"][0]
    assert num_steps == 0 or (outputs[1:] != other_support["mean_output"][1:]).any()


def test_survives_a_checkpoint(case, tmp_path):
    learner, update, _ = case[0]
    state, _ = update(KEY, learner.init(KEY), tasks_from(0))
    Checkpoints(tmp_path, {}).save(1, state)
    step, restored = Checkpoints(tmp_path, {}).restore(jax.eval_shape(learner.init, KEY))
    assert step == 1
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert equal(restored, state)
    assert equal(update(KEY, restored, tasks_from(1)), update(KEY, state, tasks_from(1)))


def test_every_loss_of_a_learner_is_checked_for_malformed_tasks(case):
    """In training and in evaluation."""
    learner = case[0].learner
    tasks = tasks_from(0)
    broken = tasks._replace(support=tasks.support._replace(y=tasks.support.y[:, :-1]))
    with pytest.raises(ValueError, match="x and y of the support set must have one length"):
        learner.update(KEY, learner.init(KEY), broken)
    with pytest.raises(ValueError, match="x and y of the support set must have one length"):
        learner.evaluate(KEY, learner.init(KEY), jax.tree.map(lambda leaf: leaf[0], broken))


@pytest.mark.parametrize(("builder", "classifies"), BUILDERS.values(), ids=BUILDERS)
def test_tasks_are_taken_by_chunks(builder, classifies):
    """Of 39 tasks three at once, for which the program has a loop of 13; all at once it has none of that length."""
    tasks = tasks_from(0, num_tasks=39)
    if classifies:
        tasks = Task(*(examples._replace(y=jnp.zeros(examples.y.shape[:2], int)) for examples in tasks))
    for chunk_size in (3, None):
        learner = builder(chunk_size=chunk_size)
        program = jax.make_jaxpr(learner.update)(KEY, jax.eval_shape(learner.init, KEY), tasks)
        assert (re.search(r"\blength=13\b", str(program)) is not None) == (chunk_size == 3)


@pytest.mark.parametrize("builder", [builder for builder, _ in BUILDERS.values()], ids=BUILDERS)
def test_no_metric_takes_the_name_of_the_loss(builder):
    with pytest.raises(ValueError, match='metric_fns must not have "loss"'):
        builder(metric_fns={"loss": mse})


@pytest.mark.parametrize(
    ("name", "count", "least"),
    [
        ("maml", "inner_steps", 1),
        ("maml", "eval_steps", 1),
        ("imaml", "inner_steps", 1),
        ("imaml", "cg_steps", 1),
        ("imaml", "eval_steps", 1),
        ("proto-maml", "inner_steps", 1),
        ("proto-maml", "eval_steps", 1),
        ("proto-maml", "ways", 2),
        ("reptile", "batch_size", 1),
        ("reptile", "eval_steps", 1),
        ("fine-tuning", "eval_steps", 1),
        ("siamese", "ways", 2),
    ],
)
def test_counts_are_checked_by_the_builder(name, count, least):
    with pytest.raises(ValueError, match=f"{count} must be a whole number of at least {least}, got {least - 1}"):
        BUILDERS[name][0](**{count: least - 1})


def test_metrics_have_names():
    with pytest.raises(ValueError, match="metric_fns must be a dict of functions by name"):
        MAML(rule=0.01, metric_fns=[mse])


def test_differentiation_is_checked_by_the_builder():
    with pytest.raises(ValueError, match=r"differentiation must be one of \('mixed', 'reverse', 'first_order'\), got 'second'"):
        MAML(rule=0.01, differentiation="second")
