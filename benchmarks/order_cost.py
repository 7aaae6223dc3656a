"""What do second derivatives cost? Time, arithmetic and memory of a meta-gradient, second order against first order.

`python benchmarks/order_cost.py` compares four ways to differentiate through the inner loop: first order; and, all exact, mixed
mode, reverse mode, and reverse mode that keeps nothing of a forward pass but computes it again (rematerialised, which is
`jax.checkpoint`, twice, around the network). On sinusoids with the paper's network, and on small images; against the number of
inner steps, and, one at a time, the width of the network, the ways and the shots. And on miniImageNet as its experiment has it.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import arithmetic
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems

from mamljax import report
from mamljax.image_models import StridedConvNet
from mamljax.losses import cross_entropy, mse
from mamljax.maml import maml
from mamljax.models import from_linen, mixed_precision, mlp
from mamljax.rules import all_but
from mamljax.tasks.images import as_task
from mamljax.tasks.sinusoid import sinusoid
from mamljax.types import LossFn, Model, State, Task

MODES = ("first_order", "mixed", "reverse", "rematerialised")
INNER_LR = 0.001  # so small that 50 steps do not diverge


@dataclasses.dataclass(frozen=True)
class Options:
    """Time, arithmetic and memory of a meta-gradient, second order against first order."""

    problem: tuple[Literal["sinusoid", "images", "miniimagenet-5w1s"], ...] = ("sinusoid", "images", "miniimagenet-5w1s")
    """Sinusoid regression, few-shot images with the Omniglot network, or miniImageNet with the sizes and the inner steps of
    its experiment. The sizes below are those of the first two."""
    inner_steps: tuple[int, ...] = (1, 5, 20, 50)
    """Numbers of inner steps to measure."""
    widths: tuple[int, ...] = (40, 160)
    """Units of each of the two hidden layers for sinusoids. Of this and the next four the first value is the base, and each
    further one replaces it with all else as in the base."""
    points: tuple[int, ...] = (10, 1000)
    """Support points of a sinusoid task."""
    filters: tuple[int, ...] = (16, 32)
    """Channels of each convolution for images."""
    ways: tuple[int, ...] = (5, 20)
    """N, classes of an episode of images."""
    shots: tuple[int, ...] = (1, 5)
    """K, support images of each class, and as many query images."""
    num_tasks: int = 25
    """Sinusoid tasks in a meta-batch."""
    num_episodes: int = 4
    """Episodes of images in a meta-batch."""
    image_size: int = 28
    """Height and width of an image in pixels."""
    precision: Literal["float32", "tensorfloat32", "bfloat16"] | None = None
    """Arithmetic of products, by default JAX's choice for the device; with bfloat16 that of the whole network
    (`models.mixed_precision`)."""
    memory_mb: int | None = None
    """Temporary memory that a program may take; by default what the device has left. A setting that takes more gets a row
    that says so."""
    repeats: int = 7
    """Measurements, of which the median counts; the four ways take turns."""
    out: Path = Path("out/order_cost")
    """Directory for results.json, report.md and the figure."""


class Setting(NamedTuple):
    """One problem at one size."""

    name: str
    model: Model
    loss_fn: LossFn
    tasks: Task  # [B]
    inner_steps: tuple[int, ...]
    chunk_size: int | None = None


class Program(NamedTuple):
    """A compiled meta-update."""

    run: Callable[[], object] | None  # None if it does not fit in memory
    megabytes: float  # of temporary memory
    gigaflops: float  # 10^9 floating-point operations in products


def settings(options: Options) -> Iterator[Setting]:
    """The base of each problem, and from there one thing changed at a time."""
    if "sinusoid" in options.problem:
        for width, points in _one_at_a_time(options.widths, options.points):
            yield _sinusoids(options, width, points)
    if "images" in options.problem:
        for filters, ways, shots in _one_at_a_time(options.filters, options.ways, options.shots):
            yield _images(options, filters, ways, shots)
    if "miniimagenet-5w1s" in options.problem:
        yield _experiment("miniimagenet-5w1s")


def _one_at_a_time(*choices: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    base = tuple(values[0] for values in choices)
    yield base
    for place, values in enumerate(choices):
        for value in values[1:]:
            yield (*base[:place], value, *base[place + 1 :])


def _sinusoids(options: Options, width: int, points: int) -> Setting:
    model = mlp(1, (width, width), 1)
    tasks = jax.vmap(sinusoid(shots=points, queries=10))(jax.random.split(jax.random.key(0), options.num_tasks))
    return Setting(f"sinusoid, {points} support points, width {width}", model, mse, tasks, options.inner_steps)


def _images(options: Options, filters: int, ways: int, shots: int) -> Setting:
    size = options.image_size
    model = from_linen(StridedConvNet(ways, filters), jnp.zeros((1, size, size, 1)))
    shape = (options.num_episodes, ways, 2 * shots, size, size, 1)
    tasks = jax.vmap(lambda images: as_task(images, shots=shots))(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    name = f"images, {ways}-way {shots}-shot, {filters} filters"
    return Setting(name, model, cross_entropy, tasks, options.inner_steps)


def _experiment(name: problems.Name) -> Setting:
    problem = problems.problem_here(name)
    model, (_, tasks) = problems.build_model(problem), problems.weights_and_tasks(problem)
    return Setting(name, model, problems.loss_of(problem), tasks, (problem.inner_steps,), problem.chunk_size)


def compile_update(mode: str, setting: Setting, steps: int, limit: float) -> Program:
    """Compile a meta-update on fixed tasks, whose outer optimiser leaves the meta-gradient as it is.

    Args:
        mode: one of `MODES`.
        setting: the problem.
        steps: inner steps.
        limit: MB of temporary memory that it may take.
    """
    model, differentiation = setting.model, mode
    if mode == "rematerialised":
        # Once for each derivative: a single one leaves the activations of the forward pass to the outer one.
        model, differentiation = Model(model.init, jax.checkpoint(jax.checkpoint(model.apply))), "reverse"
    learner = maml(
        model,
        setting.loss_fn,
        rule=INNER_LR if setting.loss_fn is mse else all_but(("shift",), INNER_LR),
        inner_steps=steps,
        eval_steps=1,
        tx=optax.identity(),
        differentiation=differentiation,
        chunk_size=setting.chunk_size,
    )
    key = jax.random.key(0)
    state = State(jax.jit(setting.model.init)(key), optax.EmptyState())
    compiled = jax.jit(learner.update).lower(key, state, setting.tasks).compile()
    gigaflops = arithmetic.flops(arithmetic.products(learner.update, key, state, setting.tasks)) / 1e9
    megabytes = harness.planned_megabytes(compiled)

    def run() -> object:
        return compiled(key, state, setting.tasks)

    return Program(run if harness.has_room(run, megabytes, limit) else None, megabytes, gigaflops)


def measure(options: Options) -> list[report.Row]:
    """Rows of every setting."""
    rows = []
    for setting in settings(options):
        if options.precision == "bfloat16":
            setting = setting._replace(model=mixed_precision(setting.model))
        for steps in setting.inner_steps:
            with jax.default_matmul_precision(options.precision):
                rows += compare(options, setting, steps)
            print(f"{setting.name}, {steps} inner steps: done", file=sys.stderr)
    return rows


def compare(options: Options, setting: Setting, steps: int) -> list[report.Row]:
    """Rows of one number of inner steps: time, arithmetic and memory of each mode, and all relative to first order."""
    limit = options.memory_mb or harness.free_megabytes()
    programs = {mode: compile_update(mode, setting, steps, limit) for mode in MODES}
    runs = {mode: program.run for mode, program in programs.items() if program.run}
    times = harness.medians(runs, options.repeats)
    num_tasks = len(setting.tasks.query.y)
    timing, counting = f"median of {options.repeats}, {num_tasks} tasks", "products as the program states them"
    quantities = {
        ("milliseconds per meta-gradient", timing): times,
        ("GFLOP per meta-gradient", counting): {mode: program.gigaflops for mode, program in programs.items()},
        ("MB of temporary memory", "as the compiler planned"): {mode: p.megabytes for mode, p in programs.items()},
    }
    ratios = ("time relative to first order", "FLOPs relative to first order", "memory relative to first order")
    shared = {"setting": setting.name, "step": steps, "tasks": num_tasks, **harness.UNTRAINED}
    rows = []
    for ((metric, protocol), values), ratio in zip(quantities.items(), ratios, strict=True):
        for mode in MODES:
            value, base = values.get(mode, float("nan")), values.get("first_order", float("nan"))
            shared |= {"method": mode, "protocol": protocol, "note": "" if mode in values else harness.NO_ROOM}
            rows.append(report.Row(metric=metric, mean=value, **shared))
            rows.append(report.Row(metric=ratio, mean=value / base, **shared))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.main("order_cost", Options, measure, argv, drawn=lambda row: "relative" in row.metric)


if __name__ == "__main__":
    sys.exit(main())
