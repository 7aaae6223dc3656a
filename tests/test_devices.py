"""Several devices, all of them simulated on the CPU (conftest.py), and several processes."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from mamljax.closures import as_partial
from mamljax.devices import divide, on, place, take_back, task_mesh
from mamljax.evaluate import evaluate
from mamljax.loop import meta_updates
from mamljax.losses import mse
from mamljax.maml import maml
from mamljax.models import mlp
from mamljax.outer import meta_learner
from mamljax.tasks.images import HostEpisodes
from mamljax.tasks.sinusoid import sinusoid
from mamljax.train import fit

KEY = jax.random.key(0)
KEYS = jax.vmap(jax.random.key)(jnp.arange(2))
MODEL = mlp(1, (4,), 1)
LEARNER = maml(MODEL, mse, rule=0.01, inner_steps=1, eval_steps=2, tx=optax.adam(1e-2))
SAMPLE = sinusoid(shots=3, queries=3)


def train(learner=LEARNER, sample=SAMPLE, **arguments):
    arguments = {"key": KEY, "num_updates": 10, "num_tasks": 8, "log_every": 5, "progress": False} | arguments
    return fit(learner, sample, **arguments)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def squared_error_learner(chunk_size=None):
    return meta_learner(
        lambda key: jnp.zeros((2, 3)),
        lambda params, task: jnp.sin(params * task).sum(),
        lambda key, state, task: {},
        tx=optax.sgd(0.1),
        chunk_size=chunk_size,
    )


def validation_error(state):
    return evaluate(LEARNER, state, SAMPLE, key=jax.random.key(7), num_tasks=5)["loss"][:, -1].mean()


@pytest.mark.parametrize(("devices", "key"), [(4, KEY), (2, KEYS)], ids=["one seed", "two seeds"])
def test_devices_change_nothing_but_rounding(devices, key):
    arguments = {"key": key, "validate_fn": validation_error, "validate_every": 4}
    alone, shared = train(**arguments), train(mesh=task_mesh(devices), **arguments)
    assert_close(shared.state, alone.state)
    assert_close(shared.best, alone.best)
    assert not any(leaf.committed for leaf in jax.tree.leaves(shared.state))  # as it is without devices


@pytest.mark.parametrize("chunk_size", [2, 3, 8])
def test_chunks_on_devices(chunk_size):
    sample, arguments = jax.random.normal, {"num_updates": 3, "num_tasks": 8}
    alone = train(squared_error_learner(), sample, **arguments)
    assert_close(train(squared_error_learner(chunk_size), sample, mesh=task_mesh(2), **arguments).state, alone.state)


def test_one_all_reduce_a_meta_update():
    mesh = task_mesh(4)
    arguments = place((LEARNER.init(KEY), KEY, 0, 5, as_partial(SAMPLE)), mesh)
    with on(mesh):
        program = jax.jit(meta_updates(LEARNER, 8, 5)).lower(*arguments).compile().as_text()
    collectives = ("all-reduce(", "all-gather(", "all-to-all(", "collective-permute(", "reduce-scatter(")
    assert [program.count(f" {name}") for name in collectives] == [1, 0, 0, 0, 0]


def test_each_device_draws_its_own_tasks():
    def shapes(common, tasks):
        seen.append((common.shape, tasks.shape))
        return tasks + common

    seen, mesh = [], task_mesh(4)
    with on(mesh):
        result = jax.jit(lambda *args: divide(shapes, *args))(*place((jnp.float32(1.0), jnp.arange(8.0)), mesh))
    assert seen == [((), (2,))]
    np.testing.assert_array_equal(result, 1 + np.arange(8))


def test_goes_on_with_another_number_of_devices(tmp_path):
    straight = train()
    for devices, num_updates in ((4, 3), (1, 5), (2, 10)):
        result = train(mesh=task_mesh(devices), directory=tmp_path, num_updates=num_updates)
    assert_close(result.state, straight.state)


def test_episodes_from_the_host():
    """Each device is given those of its own tasks, of every seed."""
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 2, 2, 1), np.uint8)
    sample = HostEpisodes(images, ways=2, shots=1, queries=1)
    learner = meta_learner(
        lambda key: jnp.zeros((2, 2, 2, 1)),
        lambda params, task: ((params - task.query.x) ** 2).sum(),
        lambda key, state, task: {},
        tx=optax.sgd(0.1),
    )
    for key in (KEY, KEYS):
        assert_close(train(learner, sample, mesh=task_mesh(4), key=key).state, train(learner, sample, key=key).state)


@pytest.mark.parametrize("num_tasks", [8, 7, 1])
def test_evaluation_on_devices(num_tasks):
    state = LEARNER.init(KEY)
    arguments = {"key": KEY, "num_tasks": num_tasks, "chunk_size": 2}
    with on(task_mesh(4)):
        shared = evaluate(LEARNER, state, SAMPLE, **arguments)
    alone = evaluate(LEARNER, state, SAMPLE, **arguments)
    assert shared["loss"].shape == (num_tasks, 3)
    assert_close(shared, alone)


def test_any_mesh_serves():
    grid = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    assert task_mesh(grid).shape == task_mesh().shape == {"tasks": 4}  # by default of all devices
    assert_close(train(mesh=grid).state, train().state)


def test_a_mesh_whose_axes_are_explicit_is_refused_where_it_is_not_converted():
    explicit = jax.make_mesh((2,), ("tasks",))
    with jax.set_mesh(explicit), pytest.raises(ValueError, match=r"jax.set_mesh has explicit axes. Use .*task_mesh\(mesh\)"):
        evaluate(LEARNER, LEARNER.init(KEY), SAMPLE, key=KEY, num_tasks=4)
    with pytest.raises(ValueError, match=r"a mesh must be a jax.sharding.Mesh, got list. Build one by jax.make_mesh"):
        train(mesh=jax.devices())


def test_random_keys_go_there_and_back():
    mesh = task_mesh(2)
    key = take_back(place({"key": KEY}, mesh), mesh)["key"]
    assert (jax.random.key_data(key) == jax.random.key_data(KEY)).all()


@pytest.mark.parametrize("devices", [0, 5, -1])
def test_no_more_devices_than_there_are(devices):
    with pytest.raises(ValueError, match=f"{devices} devices were asked for, but there are 4"):
        task_mesh(devices)


def test_devices_divide_the_meta_batch():
    with pytest.raises(ValueError, match="num_tasks must be a multiple of the number of devices, 4, got 6"):
        train(mesh=task_mesh(4), num_tasks=6)


def test_tasks_that_the_devices_do_not_divide_where_the_mesh_is_set_outside():
    with (
        jax.set_mesh(task_mesh(4)),
        pytest.raises(ValueError, match="num_tasks must be a multiple of the number of devices, 4"),
    ):
        fit(LEARNER, SAMPLE, key=KEY, num_updates=1, num_tasks=6, progress=False)


PROCESS = """
    import sys
    import jax, numpy as np
    jax.config.update("jax_num_cpu_devices", 2)
    address, process, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.distributed.initialize(address, num_processes=2, process_id=process, initialization_timeout=60)
    from test_devices import train
    from mamljax.devices import task_mesh
    for num_updates in (5, 10):
        result = train(mesh=task_mesh(), directory=directory, num_updates=num_updates)
    np.save(f"{directory}/{process}.npy", result.state.params["Dense_0"]["kernel"])
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Joined on loopback, with two devices each; stopped and resumed; only the first writes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), address]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    processes = [
        subprocess.Popen([*command, str(number), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    kernel = train().state.params["Dense_0"]["kernel"]
    for number in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"{number}.npy"), kernel, rtol=1e-4, atol=1e-6)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
