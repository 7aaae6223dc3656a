"""Evaluation over tasks, and confidence intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from spying import spy

from mamljax.evaluate import evaluate, mean_and_ci95
from mamljax.losses import mse
from mamljax.maml import maml
from mamljax.models import mlp
from mamljax.tasks.sinusoid import sinusoid
from mamljax.types import MetaLearner, State

KEY = jax.random.key(0)
LEARNER = MetaLearner(
    init=lambda key: State(jnp.float32(2.0), ()),
    update=None,
    evaluate=lambda key, state, task: {"loss": jnp.stack([state.params * task, jax.random.uniform(key)])},
)


def values_of(num_tasks=10, params=2.0, **arguments):
    arguments = {"key": KEY, "num_tasks": num_tasks} | arguments
    return evaluate(LEARNER, State(jnp.float32(params), ()), jax.random.uniform, **arguments)["loss"]


def test_every_task_is_a_row():
    values = values_of()
    assert values.shape == (10, 2)
    assert len(np.unique(values)) == 20  # tasks, and the keys of their evaluations, all differ
    assert (values[:, 0] != 2 * values[:, 1]).all()  # from each other too: a task is not drawn from the key of its evaluation
    np.testing.assert_array_equal(values, values_of())
    np.testing.assert_allclose(values_of(params=4.0)[:, 0], 2 * values[:, 0], rtol=1e-6)


def test_is_compiled_once():
    traces = []

    def evaluate_task(key, state, task):
        traces.append(None)
        return {"loss": task[None]}

    learner = LEARNER._replace(evaluate=evaluate_task)
    for seed in range(3):
        evaluate(learner, State(jnp.float32(seed), ()), jax.random.uniform, key=jax.random.key(seed), num_tasks=4)
    assert len(traces) == 1


def test_a_state_is_evaluated():
    with pytest.raises(ValueError, match="state must be a State, such as the result of fit has, got dict"):
        evaluate(LEARNER, {"params": 2.0}, jax.random.uniform, key=KEY, num_tasks=4)


def test_a_state_of_several_seeds_is_to_be_mapped_over():
    def evaluate_task(key, state, task):
        return {"loss": (jnp.ones((1, 2)) @ state.params["w"])[0]}

    learner = LEARNER._replace(init=lambda key: State({"w": jnp.ones((2, 3))}, ()), evaluate=evaluate_task)
    seeds = jax.vmap(learner.init)(jax.random.split(KEY, 4))
    with pytest.raises(ValueError, match=r"state is one of several seeds.*jax.vmap\(lambda state: evaluate\("):
        evaluate(learner, seeds._replace(params={"w": jnp.ones((4, 2, 3))}), jax.random.uniform, key=KEY, num_tasks=4)
    losses = jax.vmap(lambda state: evaluate(learner, state, jax.random.uniform, key=KEY, num_tasks=4)["loss"])(seeds)
    assert losses.shape == (4, 4, 3)
    with pytest.raises(TypeError, match="dot_general"):  # an error of another kind stays what it is
        evaluate(learner, State({"w": jnp.ones((5, 3))}, ()), jax.random.uniform, key=KEY, num_tasks=4)


def test_a_sampler_that_ignores_its_key_is_warned_of():
    with pytest.warns(UserWarning, match="all tasks are the same"):
        evaluate(LEARNER, State(jnp.float32(2.0), ()), lambda key: np.random.default_rng(0).normal(), key=KEY, num_tasks=4)


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 50])
def test_chunks_change_nothing(chunk_size):
    np.testing.assert_allclose(values_of(chunk_size=chunk_size), values_of(), rtol=1e-6)


def test_no_more_tasks_are_computed_at_a_time_than_a_chunk_has():
    spied_on, sizes = spy()
    learner = LEARNER._replace(evaluate=lambda key, state, task: {"loss": spied_on(task)[None]})
    evaluate(learner, State(jnp.float32(2.0), ()), jax.random.uniform, key=KEY, num_tasks=6, chunk_size=3)
    assert set(sizes) == {3}


def test_several_states_at_once():
    states = State(jnp.array([2.0, 3.0]), ())
    many = jax.vmap(lambda state: evaluate(LEARNER, state, jax.random.uniform, key=KEY, num_tasks=5)["loss"])(states)
    np.testing.assert_allclose(many[0], values_of(5), rtol=1e-6)
    np.testing.assert_allclose(many[1], values_of(5, params=3.0), rtol=1e-6)


@pytest.mark.parametrize("key", [0, jax.random.PRNGKey(0), jax.random.split(KEY)])
def test_the_key_is_one_typed_key(key):
    with pytest.raises(ValueError, match=r"key must be jax.random.key\(seed\), got "):
        values_of(key=key)


def test_a_metric_is_a_scalar():
    shared = {"rule": 0.1, "inner_steps": 1, "eval_steps": 1, "tx": optax.sgd(0.1)}
    learner = maml(mlp(1, (2,), 1), mse, metric_fns={"squares": lambda outputs, y: (outputs - y) ** 2}, **shared)
    with pytest.raises(ValueError, match=r"the squares must be a scalar, got shape \(3, 1\). Take its mean over the examples"):
        evaluate(learner, learner.init(KEY), sinusoid(shots=2, queries=3), key=KEY, num_tasks=2)
    with pytest.raises(ValueError, match="metric_fns must be a dict of functions by name"):
        maml(mlp(1, (2,), 1), mse, metric_fns={"three": 3}, **shared)


@pytest.mark.parametrize("bad", [{"num_tasks": 0}, {"chunk_size": 0}])
def test_counts_are_positive(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be a whole number of at least 1, got 0"):
        values_of(**bad)


def test_interval_of_one_seed_is_over_tasks():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(1, 400, 2))
    mean, ci95 = mean_and_ci95(values)
    np.testing.assert_allclose(mean, values[0].mean(0))
    np.testing.assert_allclose(ci95, 1.96 * values[0].std(0, ddof=1) / 20)


def test_interval_of_several_seeds_is_over_their_means():
    values = np.arange(3.0)[:, None, None] + np.array([-1.0, 1.0])[None, :, None]  # seed means 0, 1, 2
    mean, ci95 = mean_and_ci95(values)
    np.testing.assert_allclose(mean, [1.0])
    np.testing.assert_allclose(ci95, [4.302653 * 1.0 / np.sqrt(3)], rtol=1e-6)  # t of two degrees of freedom


def test_interval_covers_the_truth_19_times_in_20():
    rng = np.random.default_rng(1)
    for shape in ((1, 100, 2000), (4, 3, 2000)):
        mean, ci95 = mean_and_ci95(rng.normal(size=shape))
        coverage = (np.abs(mean) < ci95).mean()
        assert abs(coverage - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000)


def test_values_have_an_axis_of_seeds_and_one_of_tasks():
    with pytest.raises(ValueError, match=r"values must be \[seeds, tasks, ...\], got shape \(3,\). For one seed"):
        mean_and_ci95(np.ones(3))


def test_one_value_has_no_interval():
    mean, ci95 = mean_and_ci95([[[5.0]]])
    assert mean == [5.0]
    assert np.isnan(ci95).all()
