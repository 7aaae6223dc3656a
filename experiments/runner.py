"""What every experiment script shares: its options, the training of its methods in turn, its results.

An experiment is a dataclass of options, which tyro turns into a command line, and a function that trains and evaluates
its methods through a `Run`.
"""

import argparse
import contextlib
import dataclasses
import errno
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
import tyro
from processes import join_devices

from mamljax import report
from mamljax.checks import check_count
from mamljax.data.bank import DataError
from mamljax.devices import is_first_host, on, task_mesh
from mamljax.divergence import DivergenceError
from mamljax.files import user_cache, write_atomically
from mamljax.record import best_update
from mamljax.run_directory import CheckpointError, alone_in, claim_directory
from mamljax.train import Result, fit
from mamljax.types import MetaLearner


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every experiment."""

    steps: int
    """Meta-updates of each method. The same command with more steps goes on from where fewer ended."""
    out: Path
    """Directory for results, figures and checkpoints. The same command goes on where it stopped."""
    num_tasks: int
    """Tasks in a meta-batch."""
    seeds: int = 1
    """Number of trainings from different seeds, all in one compiled program; intervals are then over seeds."""
    seed: int = 0
    """The first seed."""
    eval_tasks: int = 600
    """Test tasks for each number in the results."""
    max_minutes: float = float("inf")
    """Minutes after which to stop, save and report what there is, counted from the start, for all methods together."""
    log_every: int = 500
    """Meta-updates between lines of metrics.jsonl; also those of one compiled call."""
    validate_every: int = 5_000
    """Meta-updates between validations; there is one more after the last."""
    checkpoint_seconds: float = 10.0
    """Seconds between checkpoints."""
    tensorboard: bool = False
    """Write TensorBoard event files as well, to OUT/checkpoints/METHOD/tensorboard."""
    devices: int | None = None
    """Devices of each host among which the tasks of a meta-batch are divided; by default one, or with --distributed all. On a
    CPU they are simulated: take one for each core, or fewer."""
    distributed: bool = False
    """Join the other hosts or processes that were started with the same command, by jax.distributed. Slurm, Open MPI,
    Kubernetes and TPU pods are recognised; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."""
    join_seconds: int = 300
    """How long to wait for the other processes, to join at the start and to be heard of later."""

    # Options that do not decide how a training goes, so that they may change when it is resumed.
    may_change = (
        *("preset", "method", "steps", "out", "max_minutes", "log_every", "checkpoint_seconds", "tensorboard"),
        *("devices", "distributed", "join_seconds"),
    )
    may_be_zero = ("seed",)
    only_for = {}  # options for which some methods alone have a use, with these methods

    def check(self) -> None:
        """Raise `ValueError` unless counts are 1 or more and sizes positive, or zero where they may, and all go together."""
        for name, value in vars(self).items():
            flag = "--" + name.replace("_", "-")
            for item in value if isinstance(value, tuple) else (value,):
                if item == 0 and name in self.may_be_zero:
                    continue
                if isinstance(item, float) and not (item > 0 and (math.isfinite(item) or name == "max_minutes")):
                    least = "at least 0" if name in self.may_be_zero else "positive"
                    raise ValueError(f"{flag} must be {least}{' and finite' * (name != 'max_minutes')}, got {item}.")
                if isinstance(item, int) and not isinstance(item, bool):
                    check_count(flag, item, minimum=int(name not in self.may_be_zero))
                    # Sizes and counts are numbers of 32 bits in JAX; of these two it sees no more than what is reached.
                    if item >= 2**31 and name not in ("steps", "validate_every"):
                        raise ValueError(f"{flag} must be below 2**31, got {item}.")
            if value == ():
                raise ValueError(f"{flag} must have at least one value.")
            if name in DISTINCT and len({*value}) < len(value):
                raise ValueError(f"{flag} must not have the same value twice, got {' '.join(map(str, value))}.")

    def without_effect(self, preset: "Options") -> list[str]:
        """Options that differ from those of the preset, and for which none of the methods has a use."""
        changed = [name for name in self.only_for if getattr(self, name) != getattr(preset, name)]
        return ["--" + name.replace("_", "-") for name in changed if {*self.only_for[name]}.isdisjoint(self.method)]


VALIDATION_SEED, TEST_SEED = 1_000_001, 1_000_002  # no training has the tasks of these
AnyOptions = TypeVar("AnyOptions", bound=Options)
STATUS = re.compile("[A-Z_]+: ")  # what errors of XLA begin with, which may be a JaxRuntimeError or a ValueError
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
DISTINCT = ("method", "eval_shots")  # options whose values each have rows of their own in the results
OURS = {Path(file).resolve().parent for file in (__file__, report.__file__)}


class Run:
    """One execution of an experiment: trains its methods in turn in one directory, and writes what came of it."""

    def __init__(self, experiment: str, options: Options) -> None:
        """Claim the output directory and start the clock.

        Raises:
            ValueError: the devices cannot divide the tasks.
            CheckpointError: the directory holds another run, or cannot be written.
        """
        self.experiment, self.options, self.results, self.report = experiment, options, {}, ""
        self.config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        # What decides how the trainings go; an option that came later counts as its default in an earlier run.
        fixed = {name: value for name, value in self.config.items() if name not in options.may_change}
        defaults = {field.name: field.default for field in dataclasses.fields(options) if field.name in fixed}
        claim_directory(options.out, {"experiment": experiment, **fixed}, defaults=defaults, ignored=options.may_change)
        self.mesh = task_mesh(options.devices) if options.distributed or (options.devices or 1) > 1 else None
        if self.mesh and options.num_tasks % self.mesh.size:
            raise ValueError(f"--num-tasks must be a multiple of the {self.mesh.size} devices, got {options.num_tasks}.")
        self.keys = jax.vmap(jax.random.key)(np.uint32(options.seed) + np.arange(options.seeds, dtype=np.uint32))
        self._started = time.monotonic()

    def train(self, method: str, learner: MetaLearner, sample: Callable, **arguments: Any) -> Result:
        """Train a method from every seed: `fit` with the options of this run, on what is left of its time."""
        options = self.options
        self.results[method] = fit(
            learner,
            sample,
            key=self.keys,
            num_updates=options.steps,
            num_tasks=options.num_tasks,
            log_every=options.log_every,
            validate_every=options.validate_every,
            directory=self.directory(method),
            checkpoint_seconds=options.checkpoint_seconds,
            max_seconds=60 * options.max_minutes - (time.monotonic() - self._started),
            label=method,
            tensorboard=options.tensorboard,
            mesh=self.mesh,
            **arguments,
        )
        return self.results[method]

    def evaluating(self, method: str, num_tasks: int) -> contextlib.AbstractContextManager:
        """Announce an evaluation, which may take minutes; `evaluate` then divides it among the devices of this process."""
        if is_first_host():
            print(f"{method}: evaluation on {num_tasks:,} test tasks", file=sys.stderr)
        return on(self.mesh if jax.process_count() == 1 else None)

    def directory(self, method: str) -> Path:
        """Where the checkpoints and the log of a method lie."""
        return self.options.out / "checkpoints" / method

    def effort(self, method: str, *, best: bool = False) -> dict[str, Any]:
        """What went into a method, of which the last or the best state was measured, as fields of `report.Row`."""
        result = self.results.get(method)
        updates, seconds = (result.num_updates, round(result.seconds, 1)) if result else (0, None)
        chosen = best_update(self.directory(method)) if best and self.options.seeds == 1 else None  # others differ by seed
        return {"seeds": self.options.seeds, "meta_updates": updates, "seconds": seconds, "best_update": chosen}

    def write(self, rows: Sequence[report.Row]) -> Mapping[str, Any]:
        """Write `results.json` and `report.md`."""
        out = self.options.out
        seconds = sum(result.seconds for result in self.results.values())
        effort = {"seconds": seconds, "num_devices": self.mesh.size if self.mesh else 1}
        report.write_results(out / "results.json", experiment=self.experiment, config=self.config, rows=rows, **effort)
        results = report.read_results(out / "results.json")
        self.report = report.markdown(results)
        write_atomically(out / "report.md", self.report)
        return results

    def show(self) -> None:
        """Show the tables, and say how to go on if time ran out."""
        print("\n" + self.report)
        steps = self.options.steps
        for method, done in ((method, result.num_updates) for method, result in self.results.items()):
            if done < steps:
                print(f"{method}: time ran out after {done:,} of {steps:,} meta-updates. The same command goes on from there.")


def tasks_at_a_time(options: AnyOptions, *, at_least: int = 1) -> int:
    """`--chunk-size`, or what is best by default: one task on a CPU, whose cache holds it; elsewhere a whole meta-batch.

    Where it is a whole meta-batch, it is `at_least` so many: evaluation, which has no second derivatives, has room for more.
    """
    return options.chunk_size or (1 if jax.default_backend() == "cpu" else max(options.num_tasks, at_least))


def main(
    experiment: str,
    presets: Mapping[str, AnyOptions],
    execute: Callable[[AnyOptions, Run], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Read the command line, run the experiment, and turn what is wrong with either into one message.

    Args:
        experiment: name for the results file.
        presets: the options of each `--preset`; the first is the default.
        execute: does the work.
        argv: command line; by default that of the process.

    Returns:
        The exit code: 0 for success, 2 for an error, 130 after Ctrl-C.
    """
    options = parse(presets, sys.argv[1:] if argv is None else argv)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "mamljax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs take long as well
    jax.config.update("jax_default_matmul_precision", "float32")  # not what accelerators take for it by default
    # Orbax logs a traceback for each part of a failed save; what is wrong is said below, once.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with join_devices(options) as options:
            options.check()
            with alone_in(options.out) if is_first_host() else contextlib.nullcontext():
                begins = not (options.out / "config.json").exists()  # what goes on needs the options with which it began
                run = Run(experiment, options)
                for flag in options.without_effect(presets[options.preset]) if begins and is_first_host() else ():
                    print(f"note: {flag} has no effect on --method {' '.join(options.method)}", file=sys.stderr)
                execute(options, run)
            if is_first_host():
                run.show()  # last, as nobody may be there to read it
    except KeyboardInterrupt as stop:
        print(f"{str(stop) or 'stopped'}. The same command goes on from there.", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        message = f"cannot write to {error.filename or options.out}: {error.strerror}"
        print(f"error: {message}. Make room, or choose another --out; what was saved before is kept.", file=sys.stderr)
        return 2
    except (jax.errors.JaxRuntimeError, ValueError, CheckpointError, DataError, DivergenceError, report.ResultsError) as error:
        if (message := _message(error, options)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        if options.distributed and STATUS.match(str(error)):
            sys.stderr.flush()
            os._exit(2)  # by the usual way JAX would wait for the lost one, and then abort with a trace of its own
        return 2
    return 0


def _message(error: Exception, options: Options) -> str | None:
    """What is wrong, and what to do about it; None if only a traceback can tell."""
    if not STATUS.match(str(error)):
        return str(error) if not isinstance(error, ValueError) or _was_raised_here(error) else None
    status = str(error).splitlines()[0]
    if status.startswith("RESOURCE_EXHAUSTED"):
        return f"out of memory ({status}). Lower --chunk-size, where there is one, or --num-tasks."
    if options.distributed:
        remedy = "Start all of them again: the same command goes on from the last checkpoint."
        return f"another process was lost ({status}). {remedy}"
    return None


def _was_raised_here(error: ValueError) -> bool:
    """Whether it comes from a `raise` of the library or of a script, and is no slip in one, by the text of the line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (last.line or "").startswith("raise ") and not OURS.isdisjoint(Path(last.filename).resolve().parents)


def run_script(experiment: str, presets: Mapping[str, AnyOptions], execute: Callable[[AnyOptions, Run], None]) -> NoReturn:
    """Run `main` on the command line of this process, and end the process with its exit code."""
    try:
        code = main(experiment, presets, execute)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on: --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its exit
        code = 141  # as of others that a closed pipe ends
    if code == 130:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what Ctrl-C has left of a program under way may make an orderly exit crash
    sys.exit(code)


def parse(presets: Mapping[str, AnyOptions], argv: Sequence[str]) -> AnyOptions:
    """Read options from a command line, on top of those of its `--preset`; exits with code 2 if it is malformed."""
    # Read twice, as the preset decides on the defaults that the command line changes, and --help shows.
    beforehand = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    beforehand.add_argument("--preset", nargs="?")
    default = presets.get(beforehand.parse_known_args(argv)[0].preset) or next(iter(presets.values()))
    return tyro.cli(type(default), default=default, args=argv)  # which says what is wrong with an unknown preset
