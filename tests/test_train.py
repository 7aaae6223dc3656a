"""Meta-training: exact resumption, seeds, validation, logging, interruption, divergence."""

import dataclasses
import errno
import functools
import gc
import itertools
import os
import re
import signal
import threading
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamljax import evaluate as evaluate_module
from mamljax import loop, programs
from mamljax.divergence import DivergenceError
from mamljax.evaluate import evaluate
from mamljax.losses import mse
from mamljax.maml import maml
from mamljax.models import mlp
from mamljax.outer import meta_learner
from mamljax.record import Record, read_metrics
from mamljax.run_directory import CheckpointError
from mamljax.tasks.sinusoid import sinusoid
from mamljax.train import fit, read_best
from mamljax.types import MetaLearner, State

KEY = jax.random.key(0)
KEYS = jax.vmap(jax.random.key)(jnp.arange(3))
MODEL = mlp(1, (4,), 1)
LEARNER = maml(MODEL, mse, rule=0.01, inner_steps=1, eval_steps=1, tx=optax.adam(1e-2))
SAMPLE = sinusoid(shots=3, queries=3)


def scalar_learner(loss_fn=lambda params, task: 0.5 * (params - task) ** 2, tx=None, **arguments):
    """One parameter, which begins at zero; a task is a number."""
    arguments["tx"] = tx or optax.sgd(0.1)
    return meta_learner(lambda key: jnp.float32(0.0), loss_fn, lambda key, state, task: {}, **arguments)


def train(learner=LEARNER, sample=SAMPLE, **arguments):
    arguments = {"key": KEY, "num_updates": 20, "num_tasks": 2, "log_every": 5, "progress": False} | arguments
    return fit(learner, sample, **arguments)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("ahead", [1, 2, 3, 100])
def test_meta_update_t_draws_its_tasks_and_its_noise_from_key_t(monkeypatch, ahead):
    """The whole of training against a plain loop: theta <- theta + (mean of the tasks and their noise - theta) / 10."""
    monkeypatch.setattr(loop, "DRAWN_AHEAD", ahead * 16)  # bytes of the tasks of `ahead` meta-updates
    theta = np.float32(0)
    for t in range(7):
        tasks, noise = (
            jax.vmap(jax.random.normal)(jax.random.split(key, 4)) for key in jax.random.split(jax.random.fold_in(KEY, t))
        )
        theta += np.float32(0.1) * np.mean(tasks + noise - theta)
    learner = scalar_learner(gather=lambda key, params, task: task + jax.random.normal(key))
    result = train(learner, jax.random.normal, num_updates=7, num_tasks=4)
    np.testing.assert_allclose(result.state.params, theta, rtol=1e-5)
    assert result.num_updates == 7


def test_is_compiled_once_however_it_is_cut():
    traces = []

    def update(key, state, tasks):
        traces.append(None)
        return LEARNER.update(key, state, tasks)

    train(
        LEARNER._replace(update=update), num_updates=23, log_every=4, validate_fn=lambda state: jnp.float32(0), validate_every=6
    )
    # Never again for the shapes of the metrics, for shorter chunks, a remainder or an updated state.
    assert len(traces) == 1


def test_a_second_training_of_a_learner_compiles_nothing():
    traces = []

    def update(key, state, tasks):
        traces.append(None)
        return LEARNER.update(key, state, tasks)

    learner = LEARNER._replace(update=update)
    first, second, again = (train(learner, key=key) for key in (KEY, KEYS[1], KEY))
    assert len(traces) == 1
    assert_equal(first.state, again.state)
    assert not np.array_equal(*(result.state.params["Dense_0"]["kernel"] for result in (first, second)))


def test_without_a_directory_nothing_is_copied_to_be_saved(monkeypatch):
    saved = []
    monkeypatch.setattr(Record, "save", lambda self, update, tree: saved.append(update))
    train(checkpoint_seconds=0.0)
    assert saved == [20]  # the call at the end, which writes nothing either


@pytest.mark.parametrize("log_every", [1, 7, 100])
def test_how_it_is_cut_changes_nothing(log_every):
    """But rounding, of programs of another length."""
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, train(log_every=log_every).state, train().state)


def test_goes_on_bit_for_bit(tmp_path):
    straight = train(num_updates=20)
    for num_updates in (3, 3, 11, 20):
        result = train(num_updates=num_updates, directory=tmp_path)
        assert result.num_updates == num_updates
    assert_equal(result.state, straight.state)


def test_goes_on_from_the_checkpoint_before_a_kill(tmp_path):
    """A kill loses what came after the last checkpoint, its lines in the log included."""
    train(num_updates=10, directory=tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 15, "loss": 0.0, "seconds": 1.0}\n{"update": 20, "lo')  # cut short by the kill
    result = train(num_updates=20, directory=tmp_path)
    assert_equal(result.state, train(num_updates=20).state)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["update"] for line in lines] == [5, 10, 15, 20]
    assert lines[2]["loss"] > 0


def test_the_log(tmp_path, monkeypatch):
    """Its seconds are those of all sessions."""
    monkeypatch.setattr("mamljax.record.time", SimpleNamespace(monotonic=itertools.count().__next__))  # a second a reading
    for num_updates in (10, 12):
        train(directory=tmp_path, num_updates=num_updates)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["update"] for line in lines] == [5, 10, 12]
    assert all(line.keys() == {"update", "loss", "grad_norm", "seconds"} for line in lines)
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert lines[0]["seconds"] < lines[1]["seconds"] < lines[2]["seconds"]


def test_logged_loss_is_the_mean_since_the_last_line(tmp_path):
    learner = meta_learner(
        lambda key: jnp.float32(0.0), lambda params, task: params, lambda key, state, task: {}, tx=optax.sgd(1.0)
    )  # the loss falls by one a meta-update
    train(learner, jax.random.normal, directory=tmp_path, num_updates=7)
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [-2.0, -5.5]


def test_several_seeds_are_the_single_ones():
    together = train(key=KEYS)
    for i, key in enumerate(KEYS):
        alone = train(key=key).state
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-6), together.state, alone)
    assert (together.state.params["Dense_0"]["kernel"][0] != together.state.params["Dense_0"]["kernel"][1]).any()


def test_a_lone_seed_of_several_has_an_axis_too():
    alone = train().state
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[None]), train(key=KEYS[:1]).state, alone)


def test_the_best_state_is_read_back(tmp_path):
    for name, key in (("one", KEY), ("three", KEYS), ("other random bits", jax.random.key(0, impl="rbg"))):
        best = train(key=key, directory=tmp_path / name).best
        assert_equal(read_best(LEARNER, tmp_path / name), best)


def test_reading_back_changes_nothing_and_warns_of_nothing(tmp_path, caplog):
    train(directory=tmp_path)
    unfinished = tmp_path / "steps" / "9.orbax-checkpoint-tmp"  # of a process that is writing now
    unfinished.mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    caplog.clear()
    with caplog.at_level("WARNING"):
        read_best(LEARNER, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert caplog.messages == []


def test_the_best_state_is_read_from_a_directory_of_fit(tmp_path):
    (tmp_path / "config.json").write_text('{"experiment": "sinusoid"}')
    with pytest.raises(CheckpointError, match=r"is none that `fit` was given. A script's are OUT/checkpoints/METHOD"):
        read_best(LEARNER, tmp_path)


def test_names_that_are_its_own_are_refused_in_the_configuration(tmp_path):
    with pytest.raises(ValueError, match=r"config must not have \['key'\]: these are fit's own"):
        train(directory=tmp_path, config={"key": 0})


@pytest.mark.parametrize("config", [{1: "a"}, None, [("lr", 0.1)]])
def test_a_configuration_is_a_dict_of_names(tmp_path, config):
    with pytest.raises(ValueError, match="config must be a dict of JSON values by name, got"):
        train(directory=tmp_path, config=config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learner": maml}, "learner must be a MetaLearner, as maml(...) returns it, got function."),
        ({"sample": [1.0]}, "sample must be a function, got list."),
        ({"directory": ""}, "directory must name one, got an empty string. None keeps nothing."),
        ({"max_seconds": "3"}, "max_seconds must be a number of seconds, got '3'."),
        ({"checkpoint_seconds": float("nan")}, "checkpoint_seconds must be a number of seconds, got nan."),
        ({"validate_fn": lambda state: {"loss": 1.0}}, "the validation error must be a scalar, got dict."),
    ],
)
def test_slips_are_one_error(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        train(**arguments)
    assert not list(tmp_path.iterdir())


def test_values_that_json_has_not_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\['lr'\] must be made of numbers, strings, lists and dicts, got np.float32"):
        train(directory=tmp_path, config={"steps": 1, "lr": np.float32(0.5)})


@pytest.mark.parametrize("key", [KEY, KEYS])
def test_a_validation_error_is_one_number(tmp_path, key):
    """Said at the first call, not when it is time to validate."""
    errors = {"validate_fn": lambda state: jnp.ones(3), "validate_every": 1_000}
    with pytest.raises(ValueError, match=r"the validation error must be a scalar, got shape \(3,\). Take its mean"):
        train(key=key, directory=tmp_path, **errors)
    assert train(validate_fn=lambda state: 1.0, validate_every=10).num_updates == 20


def test_several_seeds_go_on(tmp_path):
    train(key=KEYS, num_updates=7, directory=tmp_path)
    assert_equal(train(key=KEYS, directory=tmp_path).state, train(key=KEYS).state)


def test_best_state_is_that_of_the_lowest_validation_error(tmp_path):
    """The parameter counts meta-updates; its validation error is lowest at 8 and at 12 of 20, of which the first is taken."""
    learner = scalar_learner(lambda params, task: -params, optax.sgd(1.0))
    arguments = {"validate_fn": lambda state: (state.params - 10.0) ** 2, "validate_every": 4, "directory": tmp_path}
    result = train(learner, jax.random.normal, num_updates=16, **arguments)
    assert result.best.params == 8
    result = train(learner, jax.random.normal, **arguments)  # the best one comes along
    assert (result.best.params, result.state.params) == (8, 20)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert {line["update"]: line["validation_error"] for line in lines if "validation_error" in line} == {
        4: 36, 8: 4, 12: 4, 16: 36, 20: 100,
    }  # fmt: skip


def test_best_state_of_each_seed():
    """And the mean of their validation errors in the log."""
    learner = MetaLearner(
        init=lambda key: State({"goal": 4.0 * jax.random.randint(key, (), 1, 5), "at": jnp.float32(0)}, ()),
        update=lambda key, state, tasks: (
            state._replace(params=state.params | {"at": state.params["at"] + 1}),
            {"loss": tasks[0]},
        ),
        evaluate=None,
    )
    errors = {}
    result = train(
        learner,
        jax.random.normal,
        key=KEYS,
        log_every=4,
        validate_fn=lambda s: (s.params["at"] - s.params["goal"]) ** 2,
        validate_every=4,
        on_log=lambda done, line: errors.update({done: line["validation_error"]}),
    )
    goals = np.asarray(result.best.params["goal"])
    np.testing.assert_array_equal(result.best.params["at"], goals)
    assert len(np.unique(goals)) > 1
    assert {done: float(np.mean((done - goals) ** 2)) for done in (4, 8, 12, 16, 20)} == pytest.approx(errors)


def test_a_log_that_is_never_due_takes_no_room():
    """One of so many lines would take eight gigabytes for each metric."""
    assert train(num_updates=3, log_every=2**31 - 1).num_updates == 3


def test_under_debug_infs_it_is_trained_and_validated():
    with jax.debug_infs(True):
        result = train(num_updates=4, validate_fn=lambda state: optax.tree.norm(state.params), validate_every=2)
    assert result.num_updates == 4


@pytest.mark.parametrize(("error", "best"), [(jnp.inf, 1), (1e38, 2)])
def test_an_infinite_error_is_none(error, best):
    """As all begin with in checkpoints of earlier versions."""
    snapshot = programs.Snapshot(State(jnp.float32(1), ()), State(jnp.float32(2), ()), jnp.float32(error))
    assert programs.best_state(snapshot).params == best


def test_without_validation_the_best_state_is_the_last():
    result = train()
    assert_equal(result.best, result.state)


def test_before_the_first_validation_the_best_state_is_the_last():
    result = train(num_updates=6, validate_fn=lambda state: jnp.float32(1.0), validate_every=1000, max_seconds=0)
    assert_equal(result.best, result.state)
    assert result.num_updates == 0


@pytest.mark.parametrize("validate_every", [8, 1000])
def test_the_last_state_is_validated_too(validate_every):
    """The parameter counts meta-updates; the error falls all the time."""
    learner = scalar_learner(lambda params, task: -params, optax.sgd(1.0))
    result = train(learner, jax.random.normal, validate_fn=lambda state: -state.params, validate_every=validate_every)
    assert (result.best.params, result.num_updates) == (20, 20)


@pytest.mark.parametrize("sample", [lambda key: np.random.default_rng(0).normal(), lambda key: jnp.float32(1.0)])
def test_a_sampler_that_ignores_its_key_is_warned_of(sample):
    with pytest.warns(UserWarning, match="the sampler does not use its key, so that all tasks are the same.*jax.random"):
        train(scalar_learner(), sample)


def test_a_sampler_returns_a_task():
    with pytest.raises(ValueError, match=r"a task must have an array, as Task\(support, query\) has"):
        train(scalar_learner(), lambda key: None)


def test_the_best_state_of_one_seed_is_read_back(tmp_path):
    result = train(key=KEYS, directory=tmp_path)
    assert_equal(read_best(LEARNER, tmp_path, seed=1), jax.tree.map(lambda leaf: leaf[1], result.best))
    for seed in (3, -1):
        with pytest.raises(ValueError, match=f"is a run from 3 keys, and has no seed number {seed}"):
            read_best(LEARNER, tmp_path, seed=seed)
    train(directory=tmp_path / "single")
    with pytest.raises(ValueError, match="is a run from no vector of keys, and has no seed number 0"):
        read_best(LEARNER, tmp_path / "single", seed=0)


def test_tasks_are_drawn_for_no_more_updates_than_a_call_has(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "mamljax.programs.meta_updates", lambda *args, **how: asked.append(args[2]) or loop.meta_updates(*args, **how)
    )
    train(log_every=50)
    train(log_every=50, validate_fn=lambda state: jnp.float32(0.0), validate_every=4)
    assert asked == [50, 4]


def test_lines_of_the_log_are_passed_on(tmp_path):
    heard = []
    train(directory=tmp_path, on_log=lambda done, line: heard.append({"update": done, **line}))
    logged = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["update"] for line in heard] == [5, 10, 15, 20]
    assert heard == [{name: value for name, value in line.items() if name != "seconds"} for line in logged]


@pytest.mark.parametrize("yes", [True, np.True_, jnp.array(True)], ids=["bool", "numpy", "jax"])
def test_a_training_ends_where_the_callback_says_so(tmp_path, yes):
    result = train(directory=tmp_path, on_log=lambda done, line: yes if done == 10 else None)
    assert result.num_updates == 10
    assert_equal(result.state, train(num_updates=10).state)
    assert train(directory=tmp_path, on_log=lambda done, line: 1).num_updates == 20  # it goes on; loggers return anything


def test_an_error_of_the_callback_ends_the_training_saved(tmp_path):
    def fail(done, line):
        if done == 10:
            raise ConnectionError("the logger is not to be had")

    with pytest.raises(ConnectionError):
        train(directory=tmp_path, on_log=fail, checkpoint_seconds=1e9)
    heard = []
    assert_equal(train(directory=tmp_path, on_log=lambda done, line: heard.append(done)).state, train().state)
    assert heard == [15, 20]


def test_a_validation_error_that_is_not_finite_is_null_in_the_log(tmp_path):
    result = train(num_updates=10, validate_fn=lambda state: jnp.float32(jnp.nan), validate_every=5, directory=tmp_path)
    assert [line["validation_error"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [None, None]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert_equal(result.best, result.state)


def test_a_spoilt_log_does_not_stop_a_run(tmp_path):
    train(directory=tmp_path, num_updates=10)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 20 + b"\n")
    assert_equal(train(directory=tmp_path).state, train().state)
    assert [line["update"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [5, 10, 15, 20]


def test_random_keys_in_the_state_are_saved(tmp_path):
    """Gradient noise carries its key in the optimiser's state."""
    learner = scalar_learner(tx=optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(0.1)))
    straight = train(learner, jax.random.normal)
    train(learner, jax.random.normal, num_updates=10, directory=tmp_path)
    resumed = train(learner, jax.random.normal, directory=tmp_path)
    assert resumed.state.params == straight.state.params


def test_says_that_it_goes_on(tmp_path, capfd):
    train(directory=tmp_path, num_updates=10)
    train(directory=tmp_path, progress=True, label="maml")
    assert f"maml: goes on from meta-update 10 in {tmp_path}" in capfd.readouterr().err


def test_validation_by_evaluation():
    def error(state):
        return evaluate(LEARNER, state, SAMPLE, key=KEY, num_tasks=5)["loss"][:, -1].mean()

    result = train(validate_fn=error, validate_every=10)
    np.testing.assert_allclose(error(result.best), min(error(train(num_updates=n).state) for n in (10, 20)), rtol=1e-6)


def test_time_limit_saves_and_returns(tmp_path):
    result = train(num_updates=10**9, max_seconds=2.0, directory=tmp_path)
    assert 0 < result.num_updates < 10**9
    again = train(num_updates=result.num_updates, directory=tmp_path)  # all of it was saved
    assert_equal(again.state, result.state)
    assert again.seconds >= read_metrics(tmp_path / "metrics.jsonl")[-1]["seconds"] > 0


@pytest.fixture
def handler():
    """That of Ctrl-C, which a job in the background of a script ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_saves_first(tmp_path, number, capfd, handler):
    timer = threading.Timer(2.5, os.kill, (os.getpid(), number))
    timer.start()
    with pytest.raises(KeyboardInterrupt, match=r"stopped after meta-update \d+ of 1000000000; .* keeps the checkpoint of"):
        train(num_updates=10**9, log_every=50, directory=tmp_path, checkpoint_seconds=1000)
    assert "Stopping after the updates under way" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    done = read_metrics(tmp_path / "metrics.jsonl")[-1]["update"]
    result = train(num_updates=done + 3, log_every=50, directory=tmp_path)
    assert_equal(result.state, train(num_updates=done + 3, log_every=50).state)


def signals_at(update):
    """A callback that sends SIGINT after the meta-update of that number."""
    return lambda done, line: os.kill(os.getpid(), signal.SIGINT) if done == update else None


@pytest.mark.usefixtures("handler")
def test_an_interruption_without_a_directory_says_that_nothing_is_kept():
    for update in (10, 20):  # the last one too: the program must not go on
        with pytest.raises(KeyboardInterrupt, match=rf"^stopped after meta-update {update} of 20; nothing is kept$"):
            train(on_log=signals_at(update))


def test_an_ignored_signal_stays_ignored():
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert train(on_log=signals_at(10)).num_updates == 20
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_handler_from_outside_of_python_is_left_alone(monkeypatch):
    """As in a program that embeds Python: it could not be put back."""
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: None)
        assert train().num_updates == 20
    assert signal.getsignal(signal.SIGTERM) is handler


class Data:
    """What a closure may hold."""


def test_what_samplers_close_over_is_not_kept_for_good():
    def closing_over():
        data = Data()
        sample = lambda key, data=data: SAMPLE(key)  # noqa: E731
        validate_fn = lambda state, data=data: jnp.float32(0)  # noqa: E731
        train(sample=sample, validate_fn=validate_fn, num_updates=1, log_every=1)
        evaluate(LEARNER, LEARNER.init(KEY), sample, key=KEY, num_tasks=1)
        return weakref.ref(data)

    references = [closing_over() for _ in range(3)]
    for cached in (programs.update_program, programs.validation_programs, evaluate_module._compile):
        cached.cache_clear()
    gc.collect()
    assert all(reference() is None for reference in references)


class Sampler:
    """Of tasks that are what its attribute says."""

    def __init__(self):
        self.value = 1.0

    def __call__(self, key):
        return self.value + 0 * jax.random.uniform(key)


@dataclasses.dataclass
class WithoutHash(Sampler):
    value: float = 1.0
    __call__ = Sampler.__call__


@dataclasses.dataclass(frozen=True)
class OfArrays:
    """A sampler whose hash would be that of an array, which has none."""

    values: np.ndarray

    def __call__(self, key):
        return jnp.asarray(self.values)[0] + 0 * jax.random.uniform(key)


@pytest.mark.parametrize("build", [Sampler, WithoutHash])
@pytest.mark.parametrize("as_given", [lambda sampler: sampler, lambda sampler: sampler.__call__])
def test_objects_do_what_they_do_by_then(build, as_given):
    """Samplers and validation, whose attributes have changed since an earlier call."""
    sampler = build()
    learner = scalar_learner(lambda params, task: task + 0 * params)
    learner = learner._replace(evaluate=lambda key, state, task: {"loss": task[None]})
    lines, evaluated = [], []
    for value in (1.0, 5.0):
        sampler.value = value
        validate_fn = as_given(sampler)
        settings = {"num_updates": 5, "on_log": lambda done, line: lines.append(line)}
        train(learner, as_given(sampler), validate_fn=lambda state, of=validate_fn: of(KEY), **settings)
        evaluated.append(evaluate(learner, learner.init(KEY), as_given(sampler), key=KEY, num_tasks=2)["loss"].mean())
    assert [line["loss"] for line in lines] == evaluated == [1.0, 5.0]


def test_what_validates_may_be_an_object_that_changes():
    class Validation:
        error = 1.0

        def __call__(self, state):
            return self.error + 0 * state.params

    validation, errors = Validation(), []
    for error in (1.0, 5.0):
        validation.error = error
        settings = {"num_updates": 5, "on_log": lambda done, line: errors.append(line["validation_error"])}
        train(scalar_learner(), jax.random.uniform, validate_fn=validation, **settings)
    assert errors == [1.0, 5.0]


def test_an_object_need_not_have_a_hash():
    sample = OfArrays(np.ones(3))
    result = train(scalar_learner(), sample, validate_fn=lambda state: state.params)
    assert result.state.params == train(scalar_learner(), lambda key: 1 + 0 * jax.random.uniform(key)).state.params


def test_metrics_of_half_precision_are_averaged_in_double():
    lines = []
    still = scalar_learner(lambda params, task: 2 * params + 1 + 0 * task, optax.sgd(0.0))
    still = still._replace(init=lambda key: State(jnp.bfloat16(0), optax.sgd(0.0).init(jnp.bfloat16(0))))
    train(still, jax.random.normal, num_updates=1000, log_every=1000, on_log=lambda done, line: lines.append(line))
    assert lines[0]["grad_norm"] == 2


def diverging(at):
    """The loss becomes NaN at the meta-update of that number, counted from one."""
    return scalar_learner(lambda params, task: jnp.where(params >= at - 1, jnp.nan, -params), optax.sgd(1.0))


@pytest.mark.parametrize("at", [1, 13])
def test_divergence_says_when_and_keeps_the_last_good_checkpoint(tmp_path, at):
    kept = "no checkpoint yet" if at == 1 else "the checkpoint of meta-update 10"
    first = "Look for values that are not finite in the data .*, and for labels .* " if at == 1 else ""
    with pytest.raises(DivergenceError, match=rf"loss became nan at meta-update {at}; .* keeps {kept}\. {first}Lower the"):
        train(diverging(at), jax.random.normal, directory=tmp_path, checkpoint_seconds=0)
    if at > 10:
        assert train(diverging(at), jax.random.normal, num_updates=10, directory=tmp_path).state.params == 10


def test_divergence_of_one_seed_names_it():
    starts = [float(jax.random.uniform(jax.random.fold_in(key, loop.INIT))) for key in KEYS]
    worst = int(np.argmax(starts))
    learner = meta_learner(
        jax.random.uniform,
        lambda params, task: jnp.where(params >= max(starts), jnp.nan, params**2),
        lambda key, state, task: {},
        tx=optax.sgd(0.0),
    )
    with pytest.raises(DivergenceError, match=rf"loss of seed number {worst} became nan at meta-update 1\. Look"):
        train(learner, jax.random.normal, key=KEYS)


def test_an_infinite_meta_gradient_is_divergence():
    with pytest.raises(DivergenceError, match="grad_norm became inf at meta-update 1"):
        train(scalar_learner(lambda params, task: jnp.sqrt(params)), jax.random.normal)


def test_parameters_that_overflow_are_not_saved(tmp_path):
    """The gradient of -params is finite whatever the parameters are."""
    learner = scalar_learner(lambda params, task: -params * 0.5, optax.sgd(3e38))
    learner = learner._replace(update=lambda *args, update=learner.update: (update(*args)[0], {"loss": jnp.float32(0)}))
    with pytest.raises(DivergenceError, match=r"params is no longer finite after meta-update 5; .* keeps no checkpoint yet"):
        train(learner, jax.random.normal, directory=tmp_path, num_updates=5)


def test_another_seed_is_refused(tmp_path):
    train(directory=tmp_path)
    with pytest.raises(CheckpointError, match=r"another configuration: it has {'key': \[0, 0\]}, this one {'key': \[0, 1\]}"):
        train(directory=tmp_path, key=jax.random.key(1))


def test_another_configuration_is_refused(tmp_path):
    train(directory=tmp_path, config={"inner_lr": 0.1})
    with pytest.raises(CheckpointError, match="another configuration: it has {'inner_lr': 0.1}, this one {'inner_lr': 0.2}"):
        train(directory=tmp_path, config={"inner_lr": 0.2})
    with pytest.raises(CheckpointError, match="another configuration: it has {'num_tasks': 2}, this one {'num_tasks': 3}"):
        train(directory=tmp_path, config={"inner_lr": 0.1}, num_tasks=3)


def test_a_configuration_is_its_values(tmp_path):
    """Not their order, nor how whole numbers are written."""
    train(directory=tmp_path, config={"a": {"x": 1, "y": float("nan")}}, num_tasks=np.int64(2))
    train(directory=tmp_path, config={"a": {"y": float("nan"), "x": 1.0}})
    with pytest.raises(CheckpointError, match="another configuration"):
        train(directory=tmp_path, config={"a": {"y": float("nan"), "x": True}})
    train(directory=tmp_path / "hash", config={"hash": 2**62})
    with pytest.raises(CheckpointError, match="another configuration"):
        train(directory=tmp_path / "hash", config={"hash": 2**62 + 1})


def test_a_log_that_cannot_be_written_is_one_error(tmp_path, monkeypatch):
    def fail(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "lock").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write to .*: Is a directory\. Make room there, or choose another"):
        train(directory=tmp_path)
    (tmp_path / "lock").rmdir()
    train(directory=tmp_path, num_updates=10)
    with pytest.raises(CheckpointError, match=r"cannot write to .*: No space left on device; .* meta-update 10\. Make room"):
        train(directory=tmp_path, on_log=lambda done, line: monkeypatch.setattr("json.dumps", fail))


def test_a_refused_directory_is_free_for_others(tmp_path):
    train(directory=tmp_path)
    with pytest.raises(CheckpointError) as refused:  # which keeps the frames alive, and what they hold
        train(directory=tmp_path, num_tasks=3)
    assert train(directory=tmp_path).num_updates == 20
    assert "another configuration" in str(refused.value)


def test_validated_in_double_precision_it_goes_on(tmp_path):
    with jax.enable_x64(True):
        learner = scalar_learner()._replace(init=lambda key: State(jnp.float64(1.0), optax.sgd(0.1).init(jnp.float64(1.0))))
        arguments = {"directory": tmp_path, "validate_fn": lambda state: state.params**2, "validate_every": 5}
        for updates in (10, 20):
            result = train(
                learner, lambda key: 0 * jax.random.uniform(key, dtype=jnp.float64), num_updates=updates, **arguments
            )
        np.testing.assert_allclose(result.best.params, 0.9**20, rtol=1e-12)


def test_a_longer_run_is_not_cut(tmp_path):
    train(directory=tmp_path, num_updates=20)
    with pytest.raises(CheckpointError, match="holds 20 meta-updates, more than the 10 asked for. Choose another directory"):
        train(directory=tmp_path, num_updates=10)


def test_no_updates_give_the_first_state():
    assert_equal(train(num_updates=0).state, LEARNER.init(jax.random.fold_in(KEY, loop.INIT)))


def test_weak_types_do_not_recompile():
    traces = []
    learner = scalar_learner()

    def update(key, state, tasks):
        traces.append(None)
        return learner.update(key, state, tasks)

    train(
        learner._replace(init=lambda key: State(jnp.asarray(0.0), optax.sgd(0.1).init(0.0)), update=update), jax.random.normal
    )
    assert len(traces) == 1


def test_tensorboard_files_lie_in_the_directory(tmp_path):
    pytest.importorskip("tensorboardX")
    train(directory=tmp_path, tensorboard=True)
    assert len([*(tmp_path / "tensorboard").iterdir()]) == 1


def test_tensorboard_needs_a_directory():
    with pytest.raises(ValueError, match="TensorBoard event files need a directory"):
        train(tensorboard=True)


@pytest.mark.parametrize("name", ["num_tasks", "log_every", "validate_every"])
def test_counts_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
        train(**{name: 0})


@pytest.mark.parametrize("name", ["update", "seconds", "validation_error"])
def test_metrics_have_names_of_their_own(name):
    learner = LEARNER._replace(update=lambda key, state, tasks: (state, {name: jnp.float32(0.0)}))
    with pytest.raises(ValueError, match=f"already, got a metric called '{name}'"):
        train(learner)


def test_metrics_are_scalars():
    learner = LEARNER._replace(update=lambda key, state, tasks: (state, {"loss": jnp.zeros(3)}))
    with pytest.raises(ValueError, match=r"must be scalars, got loss of shape \(3,\)"):
        train(learner)


@pytest.mark.parametrize("key", [jax.random.split(KEY, 4).reshape(2, 2), KEYS[:0], jnp.zeros(2, jnp.uint32), 0])
def test_key_is_one_key_or_a_vector_of_them(key):
    with pytest.raises(ValueError, match=r"key must be jax.random.key\(seed\) or a vector of such keys"):
        train(key=key)


def test_progress_line(capfd):
    train(progress=True, label="maml")
    err = capfd.readouterr().err
    assert "maml: 100%" in err
    assert "compiling" in err
    assert "loss=" in err
    assert "update/s" in err


@pytest.mark.slow
def test_maml_learns_to_adapt():
    """2,000 meta-updates on sinusoids: one step helps much, ten steps more; the untrained network gains less."""
    model = mlp(1, (40, 40), 1)
    learner = maml(model, mse, rule=0.001, inner_steps=1, eval_steps=10, tx=optax.adam(1e-3))
    sample = sinusoid(shots=10, queries=10)
    state = train(learner, sample, num_updates=2000, num_tasks=25, log_every=500).state
    before, after = (
        evaluate(learner, s, sample, key=jax.random.key(1), num_tasks=300)["loss"].mean(0) for s in (learner.init(KEY), state)
    )
    assert after[1] < 0.7 * after[0]
    assert after[10] < 0.8 * after[1]
    assert after[1] < 0.6 * before[10]
