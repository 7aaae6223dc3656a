"""How many tasks a second does training take in, and does it ever wait for its input?

`python benchmarks/throughput.py` trains with the library's own `fit`, against the meta-batch, on sinusoids and on banks of
random images as large as the data sets. The tasks are drawn inside the compiled program, or read ahead on the host; or they
are always the same few. The time of the first two over that of the third, less one, is what training waits for its input.
Beside it is the rate of arithmetic, as a share of what `jnp.matmul` reaches in the same run on the sizes of products that the
network has.
"""

import dataclasses
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import arithmetic
import harness
import jax
import numpy as np
import optax
from jax import Array
from jax.tree_util import Partial
from problems import META_LR, PROBLEMS, Name, Problem, build_learner, problem_here, weights_and_tasks

from mamljax import report
from mamljax.record import read_metrics
from mamljax.tasks.images import HostEpisodes, episodes
from mamljax.tasks.sinusoid import sinusoid
from mamljax.train import fit
from mamljax.types import MetaLearner, SampleFn, State, Task

CLASSES = {"omniglot-5w1s": (1100, 20), "miniimagenet-5w1s": (64, 600)}  # training classes, and images of each
FIXED = "fixed tasks"
SHORTEST = 0.05  # seconds of a measurement: the log of a training, which they are read from, counts milliseconds


@dataclasses.dataclass(frozen=True)
class Options:
    """Tasks per second of the library's own training, input included."""

    problem: tuple[Name, ...] = tuple(PROBLEMS)
    """What to learn."""
    num_tasks: tuple[int, ...] = (4, 32)
    """Tasks in a meta-batch."""
    chunk_size: int | None = None
    """Tasks differentiated at a time; as in the experiment if not given."""
    width: int | None = None
    """Channels of each convolution, or units of each hidden layer; as in the experiment if not given."""
    images: int | None = None
    """Images of each class in the bank; as many as the data set has if not given."""
    seconds: float = 1.0
    """Time of a measurement, about: meta-updates in one compiled call."""
    measurements: int = 3
    """Measurements in a row of one training, which are after those that compile."""
    repeats: int = 3
    """Trainings with each input; all take turns. The median of all measurements counts."""
    out: Path = Path("out/throughput")
    """Directory for results.json, report.md and the figure."""


def inputs(problem: Problem, options: Options) -> dict[str, SampleFn]:
    """The samplers of a problem, by name; the fixed tasks first."""
    fixed = {FIXED: Partial(_one_of, jax.device_put(weights_and_tasks(problem)[1]))}
    shared = {"shots": problem.shots, "queries": problem.queries}
    if not problem.image:
        return fixed | {"drawn on the device": sinusoid(**shared)}
    classes, number = CLASSES[problem.name]
    bank = _bank(classes, options.images or number, problem.image)
    shared |= {"ways": problem.ways, "rotations": problem.name.startswith("omniglot")}
    return fixed | {"images on the device": episodes(bank, **shared), "images on the host": HostEpisodes(bank, **shared)}


def _bank(classes: int, images: int, shape: tuple[int, ...]) -> np.ndarray:
    """Random images [classes, images, H, W, C] uint8."""
    return np.random.default_rng(0).integers(0, 256, (classes, images, *shape), np.uint8)


def _one_of(tasks: Task, key: Array) -> Task:
    """One of some tasks [B]: which one depends on the key, or the compiler would take work on it out of the training loop."""
    number = jax.random.key_data(key)[-1] % len(tasks.query.y)
    return jax.tree.map(lambda leaf: leaf[number], tasks)


def seconds_per_update(learner: MetaLearner, sample: SampleFn, problem: Problem, *, updates: int, count: int) -> list[float]:
    """Time of a meta-update in a training by `fit`: `count` values, each a mean over the `updates` of a compiled call."""
    with tempfile.TemporaryDirectory() as directory:
        fit(
            learner,
            sample,
            key=jax.random.key(0),
            num_updates=updates * (count + 1),
            num_tasks=problem.num_tasks,
            log_every=updates,
            directory=directory,
            checkpoint_seconds=float("inf"),
            progress=False,
        )
        times = [line["seconds"] for line in read_metrics(Path(directory) / "metrics.jsonl")]
    return [(after - before) / updates for before, after in itertools.pairwise(times)]


def measure(options: Options) -> list[report.Row]:
    """Rows of every problem and meta-batch."""
    if not options.seconds >= SHORTEST:
        raise ValueError(f"--seconds must be {SHORTEST:g} or more, got {options.seconds}.")
    changes = {name: value for name in ("width", "chunk_size") if (value := getattr(options, name)) is not None}
    rows = []
    for name in options.problem:
        for num_tasks in options.num_tasks:
            rows += compare(problem_here(name)._replace(num_tasks=num_tasks, **changes), options)
            print(f"{name}, {num_tasks} tasks: done", file=sys.stderr)
    return rows


def compare(problem: Problem, options: Options) -> list[report.Row]:
    """Rows of one meta-batch: tasks per second with each input, the wait for it, and the share of the product rate."""
    learner = build_learner(problem, problem.differentiation)
    update, *arguments = one_update(problem, learner)
    # As many meta-updates as take about --seconds, by the time of one.
    updates = 1 + int(1e3 * options.seconds / harness.medians({"": lambda: update(*arguments)}, 1)[""])
    samplers = inputs(problem, options)
    times = {name: [] for name in samplers}
    for _ in range(options.repeats):
        for name, sample in samplers.items():
            run = {"updates": updates, "count": options.measurements}
            times[name] += seconds_per_update(learner, sample, problem, **run)
    medians = {name: statistics.median(values) for name, values in times.items()}
    counted = arithmetic.products(learner.update, *arguments)
    # What a meta-update would take if it were nothing but its products, at full rate.
    shortest = arithmetic.flops(counted) / arithmetic.product_rate(counted, options.repeats)
    protocol = f"median of {options.repeats} trainings, {options.measurements} times about {options.seconds:g} s each"
    rows = []
    for name, seconds in medians.items():
        metrics = {"tasks per second": problem.num_tasks / seconds, "share of the product rate in %": 100 * shortest / seconds}
        if name != FIXED:
            metrics["waiting for input in %"] = 100 * (seconds / medians[FIXED] - 1)
        shared = {"method": f"meta-batch {problem.num_tasks}, {name}", "setting": problem.name, "protocol": protocol}
        shared |= {"step": problem.inner_steps, "tasks": problem.num_tasks, **harness.UNTRAINED}
        rows += [report.Row(metric=metric, mean=value, **shared) for metric, value in metrics.items()]
    return rows


def one_update(problem: Problem, learner: MetaLearner) -> tuple[Callable, Array, State, Task]:
    """A compiled meta-update on the fixed tasks, and its arguments."""
    params, tasks = jax.device_put(weights_and_tasks(problem))
    return jax.jit(learner.update), jax.random.key(0), State(params, optax.adam(META_LR).init(params)), tasks


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.main("throughput", Options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
