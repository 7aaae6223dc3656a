"""Meta-training: many meta-updates per compiled call, logged, validated, checkpointed and resumed."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from tqdm import tqdm

from mamljax.checkpoint import read_newest
from mamljax.checks import check_callable, check_count, check_counts, check_key, check_learner, check_seconds
from mamljax.devices import any_host, check_shares, from_first_host, is_first_host, place, take_back, task_mesh
from mamljax.divergence import finite_means
from mamljax.interruption import interruptions
from mamljax.loop import vmap_over_seeds
from mamljax.programs import best_program, best_state, first_snapshot, start_program, updates_and_sampler, validation_and_check
from mamljax.record import Record
from mamljax.run_directory import CheckpointError, read_config
from mamljax.types import MetaLearner, SampleFn, State

LEAST_ROOM = 10_000  # meta-updates that a compiled call may have room for, however few a run has


class Result(NamedTuple):
    """What `fit` returns. Trained from several keys, every leaf of the states has a leading axis [seeds]."""

    state: State  # after the last meta-update
    best: State  # that of the lowest validation error, or `state` if none was validated
    num_updates: int  # meta-updates done, over all sessions of the run
    seconds: float  # spent in training, over all sessions of the run


def fit(
    learner: MetaLearner,
    sample: SampleFn,
    *,
    key: Array,
    num_updates: int,
    num_tasks: int,
    log_every: int = 100,
    validate_fn: Callable[[State], Array] | None = None,
    validate_every: int = 1000,
    mesh: Mesh | None = None,
    directory: str | Path | None = None,
    config: Mapping[str, Any] = {},
    checkpoint_seconds: float = 30.0,
    max_seconds: float = float("inf"),
    on_log: Callable[[int, Mapping[str, float]], bool | None] | None = None,
    label: str = "training",
    progress: bool = True,
    tensorboard: bool = False,
) -> Result:
    """Meta-train a learner.

    Meta-update t draws its tasks from `fold_in(key, t)`, so that a resumed run goes on exactly as it would have; the first
    state is drawn from `fold_in(key, INIT)`. With a `directory` the run is saved there and goes on from there if it was
    stopped: by a time limit, a kill, Ctrl-C or SIGTERM (the last two save first).

    Args:
        learner: the method. What its functions close over is compiled as it is at the first call.
        sample: key -> one task; drawn inside the compiled loop. A `jax.tree_util.Partial` carries arrays, such as images,
            which are then passed to the compiled program instead of copied into it; `validate_fn` alike. `tasks.host.HostTasks`
            makes one of any Python function; with a method `prepare`, as it has, a sampler draws ahead on the host. Programs
            are kept for the next call with the same function; not for an object, whose attributes may have changed by then.
        key: a JAX random key; or an array of N keys, to train N seeds in one compiled program. Where it is of the kind "rbg",
            what is drawn depends on `log_every` too.
        num_updates: meta-updates in all.
        num_tasks: B, tasks in a meta-batch.
        log_every: meta-updates per compiled call, and per line of the log.
        validate_fn: state -> error [], the lower the better, such as the mean loss over fixed validation tasks; compiled.
        validate_every: meta-updates between validations; there is one more after the last.
        mesh: devices, of this host or of several joined by `jax.distributed.initialize()`, among which the tasks of a
            meta-batch are divided; by default one. Results are equal up to rounding, and a run goes on with any other number
            of devices. Of several hosts the first writes the files.
        directory: where to keep checkpoints and `metrics.jsonl`, a line for each compiled call; None keeps nothing.
        config: JSON values that decide how the run goes. A directory that holds a run of another configuration is refused.
            `fit` cannot see what else changed in the learner or the sampler: put in here what you vary.
        checkpoint_seconds: time between checkpoints; there is always one at the end.
        max_seconds: stop after this time, saved.
        on_log: called with the number of meta-updates done and each line of the log, to show or send it elsewhere; of several
            hosts by the first. The training ends, saved, where it returns True, and where it raises an error.
        label: what to call the run in the progress line.
        progress: whether to show one, on standard error.
        tensorboard: whether to write TensorBoard event files too, to `directory/tensorboard`.

    Returns:
        The last and the best state, the number of meta-updates done and the time they took.

    Raises:
        ValueError: no learner, no function as sampler, no typed key; a count out of range, TensorBoard without a directory, a
            name in `config` that is `fit`'s own or a value that JSON has not, metrics or a validation error that are not
            scalars, or tasks that the devices do not divide.
        CheckpointError: the directory cannot be used; see `Checkpoints`.
        DivergenceError: a metric or a parameter is not finite, even if the optimiser would skip it, as
            `optax.apply_if_finite` does. The last good checkpoint is kept.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after saving to `directory`, if there is one.
    """
    check_count("num_updates", num_updates, minimum=0)
    check_counts(num_tasks=num_tasks, log_every=log_every, validate_every=validate_every)
    check_seconds(checkpoint_seconds=checkpoint_seconds, max_seconds=max_seconds)
    check_learner(learner)
    check_callable("sample", sample)
    check_key(key, several=True)
    _check_directory(directory, tensorboard=tensorboard)
    mesh = _checked_mesh(mesh, num_tasks)
    # A compiled call ends at each multiple of either, so that every line of the log is of the same meta-updates after a resume.
    validated = validate_fn is not None
    every = [log_every, validate_every] if validated else [log_every]
    length = min(*every, max(num_updates, LEAST_ROOM))
    run, sampler_from = updates_and_sampler(learner, sample, key, num_tasks, length, mesh)
    validate, check_validation = validation_and_check(validate_fn, key.shape, mesh)
    # Only with the same key and as many tasks does a checkpoint go on as it would have.
    config = _whole_config(config, key=jax.random.key_data(key).tolist(), num_tasks=int(num_tasks))
    with contextlib.ExitStack() as stack:
        record = stack.enter_context(Record(directory if is_first_host() else None, config, tensorboard=tensorboard))
        interrupted = stack.enter_context(interruptions())
        # The first host alone has files. All go on from what it has read there, or else from its first state.
        done, snapshot = from_first_host(record.restore(start_program(learner, key.shape)(key)))
        done, snapshot, key = int(done), place(snapshot, mesh), place(key, mesh)
        _check_done(done, num_updates, directory)
        progress = progress and is_first_host()
        if done and progress:
            print(f"{label}: goes on from meta-update {done} in {directory}", file=sys.stderr)
        bar = stack.enter_context(_progress_bar(label, done, num_updates, shown=progress))

        def save() -> None:
            record.save(done, take_back(snapshot, mesh))

        started, enough = time.monotonic(), False
        sampler = sampler_from(done, _end_of_call(done, num_updates, every)) if done < num_updates else None
        # Hosts end the loop together: one that went on alone would wait for the gradients of the others for ever.
        while done < num_updates and not any_host(enough or interrupted.is_set() or time.monotonic() - started >= max_seconds):
            stop = _end_of_call(done, num_updates, every)
            state, metrics, finite = run(snapshot.state, key, done, stop, sampler)
            # While the device computes:
            if stop < num_updates:
                sampler = sampler_from(stop, _end_of_call(stop, num_updates, every))
            # By shapes alone, as the memory of this state is already in use for the next one.
            if validated:  # what is wrong with `validate_fn` should not show hours later
                check_validation(snapshot)
            # This waits for the device, and raises before a state that is not finite can be validated or saved.
            line = finite_means(metrics, finite, done, stop, record.kept)
            snapshot = snapshot._replace(state=state)
            if validated and (stop % validate_every == 0 or stop == num_updates):
                snapshot, error = validate(snapshot)
                line["validation_error"] = float(np.mean(error))
            bar.set_postfix({name: f"{value:.3g}" for name, value in line.items() if name != "grad_norm"}, refresh=False)
            bar.update(stop - done)
            done = stop
            record.log(done, line)
            if on_log and is_first_host():
                enough = _asks_to_stop(on_log, done, line, save)
            if record.is_due(checkpoint_seconds):
                save()
        save()
    if any_host(interrupted.is_set()):
        raise KeyboardInterrupt(f"stopped after meta-update {done} of {num_updates}{record.kept or '; nothing is kept'}")
    snapshot = take_back(snapshot, mesh)
    return Result(snapshot.state, best_program(key.shape)(snapshot), done, record.seconds)


def _end_of_call(done: int, num_updates: int, every: Sequence[int]) -> int:
    """After which meta-update the next compiled call ends: the next multiple of any of these, or the last."""
    return min(num_updates, *(done + n - done % n for n in every))


def _asks_to_stop(
    on_log: Callable[[int, Mapping[str, float]], bool | None], done: int, line: Mapping[str, float], save: Callable[[], None]
) -> bool:
    try:
        answer: Any = on_log(done, line)
    except BaseException:
        save()
        raise
    if isinstance(answer, bool):
        return answer
    is_flag = isinstance(answer, np.generic | np.ndarray | Array) and answer.ndim == 0 and answer.dtype.kind == "b"
    return is_flag and bool(answer)  # loggers return all kinds of things


def _progress_bar(label: str, done: int, total: int, *, shown: bool) -> tqdm:
    seldom = 0.2 if sys.stderr.isatty() else 5.0  # seconds; a log file gets few lines
    bar = {"total": total, "initial": done, "desc": label, "unit": "update", "postfix": "compiling" if done < total else None}
    return tqdm(**bar, disable=not shown, mininterval=seldom)


def read_best(learner: MetaLearner, directory: str | Path, *, seed: int | None = None) -> State:
    """Read the best state of a run that `fit` has saved, of one that is still training too.

    Args:
        learner: as it was trained.
        directory: that of the run; the scripts in `experiments/` keep one for each method, `OUT/checkpoints/METHOD`.
        seed: of a run from a vector of keys, the number of the one whose state is wanted. Scripts give a vector, of one key
            with `--seeds 1`.

    Returns:
        The state; of a run from a vector of keys, without `seed`, every leaf with a leading axis [keys].

    Raises:
        CheckpointError: there is no run, or it is one of another model or method; the first difference is named.
        ValueError: there is no such seed.
    """
    config = read_config(Path(directory))
    if "key" not in config:
        raise CheckpointError(f"{directory} is none that `fit` was given. A script's are OUT/checkpoints/METHOD.")
    # The last axis of a key's data are the words of one key.
    seeds = np.shape(config["key"])[:-1]
    # To read what was saved, shapes are enough: no state is drawn here.
    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), seeds))
    by_seed = functools.partial(vmap_over_seeds, seeds)
    saved = read_newest(directory, jax.eval_shape(by_seed(functools.partial(first_snapshot, learner)), key))
    if saved is None:
        raise CheckpointError(f"{directory} holds no checkpoint yet. Train for longer.")
    best = by_seed(best_state)(saved[1])
    if seed is None:
        return best
    if seeds == () or not 0 <= seed < seeds[0]:
        raise ValueError(
            f"{directory} is a run from {seeds[0] if seeds else 'no vector of'} keys, and has no seed number {seed}."
        )
    return jax.tree.map(lambda leaf: leaf[seed], best)


def _checked_mesh(mesh: Mesh | None, num_tasks: int) -> Mesh | None:
    """The mesh over which tasks are divided, all devices of the one that was given."""
    mesh = None if mesh is None else task_mesh(mesh)
    if mesh is not None:
        check_shares(num_tasks, mesh.size)
    return mesh


def _whole_config(config: Mapping[str, Any], **own: Any) -> dict[str, Any]:
    """All that decides how a run goes: what the caller says does, and what `fit` knows itself."""
    if not isinstance(config, Mapping) or not all(isinstance(name, str) for name in config):
        raise ValueError(f"config must be a dict of JSON values by name, got {config!r}.")
    if taken := sorted(own.keys() & config.keys()):
        raise ValueError(f"config must not have {taken}: these are fit's own. Choose other names.")
    return {**own, **config}


def _check_directory(directory: str | Path | None, *, tensorboard: bool) -> None:
    if directory == "":
        raise ValueError("directory must name one, got an empty string. None keeps nothing.")
    if tensorboard and directory is None:
        raise ValueError("TensorBoard event files need a directory to lie in. Pass directory=...")


def _check_done(done: int, num_updates: int, directory: str | Path | None) -> None:
    if done > num_updates:
        raise CheckpointError(
            f"{directory} holds {done} meta-updates, more than the {num_updates} asked for. Choose another directory."
        )
