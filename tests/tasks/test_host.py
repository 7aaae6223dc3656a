"""Tasks drawn by Python code: the same by every way, in training drawn ahead, in evaluation by callback."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamljax.devices import task_mesh
from mamljax.evaluate import evaluate
from mamljax.losses import mse
from mamljax.maml import maml
from mamljax.models import mlp
from mamljax.tasks.host import HostTasks
from mamljax.train import fit
from mamljax.types import Examples, Task

KEY = jax.random.key(0)
LEARNER = maml(mlp(1, (4,), 1), mse, rule=0.1, inner_steps=1, eval_steps=2, tx=optax.sgd(0.1))


def line(rng):
    x = rng.normal(size=(5, 1))
    y = rng.uniform(-2, 2) * x
    return Task(Examples(x[:2], y[:2]), Examples(x[2:], y[2:]))


def test_a_key_gives_one_task_by_every_way():
    keys = jax.random.split(KEY, (2, 3))
    sample = HostTasks(line)
    called_back = jax.jit(jax.vmap(jax.vmap(sample)))(keys)
    ahead = sample.prepare(keys.ravel())
    for row, column in np.ndindex(2, 3):
        key = keys[row, column]
        expected = line(np.random.default_rng(np.asarray(jax.random.key_data(key))))
        expected = jax.tree.map(lambda leaf: leaf.astype(np.float32), expected)
        of_batch = jax.tree.map(lambda leaf, row=row, column=column: leaf[row, column], called_back)
        for drawn in (sample(key), jax.jit(ahead)(key), of_batch):
            jax.tree.map(np.testing.assert_array_equal, drawn, expected)


def test_training_draws_ahead_the_tasks_of_each_meta_update():
    drawn = []

    def recorded(rng):
        drawn.append(threading.get_ident())
        return line(rng)

    host = HostTasks(recorded)
    drawn.clear()
    run = functools.partial(fit, LEARNER, key=KEY, num_updates=5, num_tasks=2, log_every=2, progress=False)
    ahead = run(host)
    assert drawn == [threading.get_ident()] * 5 * 2  # of five updates of two tasks, once each; none by callback
    called_back = run(lambda key: host(key))  # which hides `prepare`
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, ahead.state, called_back.state)
    drawn.clear()
    divided = run(host, mesh=task_mesh(2), log_every=3, key=jax.random.split(KEY))
    assert len(drawn) == 2 * 5 * 2  # of two seeds
    jax.tree.map(close, divided.state, run(lambda key: host(key), key=jax.random.split(KEY)).state)


def test_no_more_is_drawn_than_needed(tmp_path):
    """Neither for a trial that is shorter than a compiled call, nor where there is nothing to do."""
    drawn = []
    host = HostTasks(lambda rng: drawn.append(None) or line(rng))
    for num_updates, count in ((3, 6), (3, 0), (4, 2)):
        drawn.clear()
        fit(LEARNER, host, key=KEY, num_updates=num_updates, num_tasks=2, directory=tmp_path, progress=False)
        assert len(drawn) == count


def test_evaluation_is_compiled_once_and_follows_what_draws():
    traces, scale = [], [1.0]

    def scaled(rng):
        task = line(rng)
        return task._replace(query=task.query._replace(y=scale[0] * task.query.y))

    def evaluate_task(key, state, task):
        traces.append(None)
        return {"loss": jnp.abs(task.query.y).mean()[None]}

    learner, sample = LEARNER._replace(evaluate=evaluate_task), HostTasks(scaled)
    losses = []
    for scale[0] in (1.0, 3.0):
        losses.append(evaluate(learner, LEARNER.init(KEY), sample, key=KEY, num_tasks=3)["loss"])
    assert len(traces) == 1
    np.testing.assert_allclose(losses[1], 3 * losses[0], rtol=1e-6)


def test_devices_may_ask_at_once():
    at_once = []

    def alone(rng):
        at_once.append("in")
        assert at_once == ["in"]
        task = line(rng)
        at_once.clear()
        return task

    state = LEARNER.init(KEY)
    with jax.set_mesh(task_mesh(2)):
        errors = evaluate(LEARNER, state, HostTasks(alone), key=KEY, num_tasks=20)["loss"]
    assert errors.shape == (20, 3)
    assert len(np.unique(errors[:, 0])) == 20  # each a task of its own
    assert (errors[:, 1] != errors[:, 0]).all()


def test_a_task_keeps_its_structure_and_its_integers():
    sample = HostTasks(lambda rng: {"class": rng.integers(7), "x": [rng.normal(size=3), 1.5]})
    task = sample(KEY)
    assert jnp.issubdtype(task["class"].dtype, jnp.integer)
    assert task["x"][0].shape == (3,)
    assert task["x"][1] == 1.5
    with jax.enable_x64(True):
        assert HostTasks(line)(KEY).query.y.dtype == np.float64


def test_fractions_after_whole_numbers_are_an_error():
    """They would be cut to whole ones."""
    values = iter((1, 2, 0.5))
    sample = HostTasks(lambda rng: next(values))
    with pytest.raises(ValueError, match="all tasks must have the same kinds of number, got float64 after int32"):
        sample.prepare(jax.random.split(KEY, 2))


def test_a_task_of_another_shape_is_an_error():
    sizes = iter((3, 3, 4))
    sample = HostTasks(lambda rng: rng.normal(size=next(sizes)))
    with pytest.raises(ValueError, match=r"all tasks must have the same shapes, got \(4,\) after \(3,\)"):
        sample.prepare(jax.random.split(KEY, 2))
