"""What do second derivatives cost? Time and memory of a meta-gradient against the number of inner steps.

`python benchmarks/inner_steps.py` compares three ways to differentiate through the inner loop, on sinusoid regression with
the paper's network: reverse mode and mixed mode, both exact, and first order. The support sets are of two sizes: where they
are small the parameters fill the memory, where they are large the activations do.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import harness
import jax
import optax

from mamljax import report
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


def measure(options: Options) -> list[report.Row]:
    """Rows of every setting."""
    rows = []
    for shots in options.shots:
        for steps in options.inner_steps:
            rows += compare(options, shots, steps)
            print(f"{shots} support points, {steps} inner steps: done", file=sys.stderr)
    return rows


def compare(options: Options, shots: int, steps: int) -> list[report.Row]:
    """Rows of one number of inner steps: time and memory of each mode, and both relative to first order."""
    updates = {mode: compiled_update(mode, options, shots, steps) for mode in MODES}
    times = harness.medians({mode: run for mode, (run, _) in updates.items()}, options.repeats)
    memory = {mode: megabytes for mode, (_, megabytes) in updates.items()}
    shared = {"setting": f"{shots} support points", "step": steps, "tasks": options.num_tasks, **harness.UNTRAINED}
    rows = []
    for mode in MODES:
        figures = {
            "milliseconds per meta-gradient": (times[mode], f"median of {options.repeats}, {options.num_tasks} tasks"),
            "time relative to first order": (times[mode] / times["first_order"], "ratio of medians"),
            "MB of temporary memory": (memory[mode], "as the compiler planned"),
            "memory relative to first order": (memory[mode] / memory["first_order"], "as the compiler planned"),
        }
        for metric, (value, protocol) in figures.items():
            rows.append(report.Row(method=mode, protocol=protocol, metric=metric, mean=value, **shared))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.main("inner_steps", Options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
