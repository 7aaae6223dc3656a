"""What do second derivatives cost? Time and memory of a meta-gradient against the number of inner steps.

`python benchmarks/inner_steps.py` compares three ways to differentiate through the inner loop, on sinusoid regression with
the paper's network: reverse mode and mixed mode, both exact, and first order. The support sets are of two sizes: where they
are small the parameters fill the memory, where they are large the activations do.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import optax
import tyro

from mamljax import report
from mamljax.checks import check_count
from mamljax.files import write_atomically
from mamljax.inner import Differentiation
from mamljax.losses import mse
from mamljax.maml import maml
from mamljax.models import mlp
from mamljax.tasks.sinusoid import sinusoid
from mamljax.types import Task

MODES: tuple[Differentiation, ...] = ("first_order", "mixed", "reverse")


@dataclasses.dataclass(frozen=True)
class Options:
    """Time and memory of a meta-gradient against the number of inner steps."""

    inner_steps: tuple[int, ...] = (1, 5, 20, 50)
    """Numbers of inner steps to measure."""
    shots: tuple[int, ...] = (10, 1000)
    """Support points of a task; one set of tables each."""
    num_tasks: int = 25
    """Tasks in a meta-batch."""
    hidden_sizes: tuple[int, ...] = (40, 40)
    """Units of each hidden layer."""
    repeats: int = 7
    """Measurements, of which the median counts; the three ways take turns."""
    out: Path = Path("out/inner_steps")
    """Directory for results.json, report.md and the figure."""


def compiled_update(mode: Differentiation, options: Options, shots: int, steps: int) -> tuple[Callable[[], object], float]:
    """One meta-update with its tasks drawn beforehand, ready to run; and the MB of temporary memory it takes."""
    model = mlp(1, options.hidden_sizes, 1, kernel_init=jax.nn.initializers.lecun_normal())
    learner = maml(model, mse, rule=0.001, inner_steps=steps, eval_steps=1, tx=optax.identity(), differentiation=mode)
    key = jax.random.key(0)
    tasks: Task = jax.vmap(sinusoid(shots=shots, queries=10))(jax.random.split(key, options.num_tasks))
    state = learner.init(key)
    compiled = jax.jit(learner.update).lower(key, state, tasks).compile()
    return lambda: compiled(key, state, tasks), compiled.memory_analysis().temp_size_in_bytes / 1e6


def milliseconds(run: Callable[[], object], at_least: float = 0.02) -> float:
    """Time of one call, over as many calls as fill `at_least` seconds."""
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < at_least:
        jax.block_until_ready(run())
        calls += 1
    return 1e3 * (time.perf_counter() - started) / calls


def measure(options: Options, shots: int, steps: int) -> list[report.Row]:
    """Rows of one number of inner steps: time and memory of each mode, and both relative to first order."""
    runs, megabytes, times = {}, {}, {mode: [] for mode in MODES}
    for mode in MODES:
        runs[mode], megabytes[mode] = compiled_update(mode, options, shots, steps)
        jax.block_until_ready(runs[mode]())
    for _ in range(options.repeats):
        for mode in MODES:
            times[mode].append(milliseconds(runs[mode]))
    medians = {mode: statistics.median(values) for mode, values in times.items()}
    shared = {"setting": f"{shots} support points", "step": steps, "tasks": options.num_tasks, "seeds": 0, "meta_updates": 0}
    rows = []
    for mode in MODES:
        figures = {
            "milliseconds per meta-gradient": (medians[mode], f"median of {options.repeats}, {options.num_tasks} tasks"),
            "time relative to first order": (medians[mode] / medians["first_order"], "ratio of medians"),
            "MB of temporary memory": (megabytes[mode], "as the compiler planned"),
            "memory relative to first order": (megabytes[mode] / megabytes["first_order"], "as the compiler planned"),
        }
        for metric, (value, protocol) in figures.items():
            rows.append(report.Row(method=mode, protocol=protocol, metric=metric, mean=value, ci95=float("nan"), **shared))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure, write results.json and report.md, print the tables; returns 2 if an option is out of range."""
    options = tyro.cli(Options, args=argv)
    try:
        for name in ("inner_steps", "shots", "hidden_sizes"):
            for value in getattr(options, name):
                check_count("--" + name.replace("_", "-"), value)
        check_count("--num-tasks", options.num_tasks)
        check_count("--repeats", options.repeats)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    started, rows = time.monotonic(), []
    for shots in options.shots:
        for steps in options.inner_steps:
            rows += measure(options, shots, steps)
            print(f"{shots} support points, {steps} inner steps: done", file=sys.stderr)
    path = options.out / "results.json"
    config = dataclasses.asdict(options) | {"out": str(options.out)}
    report.write_results(path, experiment="inner_steps", config=config, rows=rows, seconds=time.monotonic() - started)
    results = report.read_results(path)
    write_atomically(options.out / "report.md", report.markdown(results))
    report.learning_curves(results, options.out / "inner_steps.png")
    print(report.markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
