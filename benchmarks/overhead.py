"""What does the library cost? Its meta-update against the same one written out by hand in plain JAX.

`python benchmarks/overhead.py` times second-order MAML on sinusoids (meta-batch 25, 10 + 10 points, one inner step, the paper's
network): drawing the tasks, meta-gradient and Adam, 1,000 meta-updates in one compiled call, taking turns.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.tree_util import Partial

from mamljax import report
from mamljax.loop import meta_updates
from mamljax.losses import mse
from mamljax.maml import maml
from mamljax.models import mlp
from mamljax.tasks.sinusoid import sinusoid
from mamljax.types import MetaLearner, PyTree

NUM_TASKS, SHOTS, INNER_LR = 25, 10, 0.001


@dataclasses.dataclass(frozen=True)
class Options:
    """The library's meta-update against one written by hand."""

    updates: int = 1_000
    """Meta-updates per measurement."""
    repeats: int = 11
    """Measurements, of which the median counts; all take turns."""
    out: Path = Path("out/overhead")
    """Directory for results.json, report.md and the figure."""


def by_hand(params: PyTree, updates: int) -> Callable[[], Array]:
    """MAML in plain JAX and Optax, as one would write it for this problem alone; returns what runs it."""
    tx = optax.adam(1e-3)

    def network(params: PyTree, x: Array) -> Array:
        *hidden, last = params.values()
        for layer in hidden:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
        return x @ last["kernel"] + last["bias"][None]

    def loss(params: PyTree, x: Array, y: Array) -> Array:
        return jnp.mean((network(params, x) - y) ** 2)

    def sample(key: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key, 3)
        amplitude = jax.random.uniform(keys[0], minval=0.1, maxval=5.0)
        phase = jax.random.uniform(keys[1], maxval=jnp.pi)
        x = jax.random.uniform(keys[2], (2 * SHOTS, 1), minval=-5.0, maxval=5.0)
        return x, amplitude * jnp.sin(x - phase)

    def task_loss(params: PyTree, x: Array, y: Array) -> Array:
        gradient = jax.grad(loss)(params, x[:SHOTS], y[:SHOTS])
        adapted = jax.tree.map(lambda leaf, slope: leaf - INNER_LR * slope, params, gradient)
        return loss(adapted, x[SHOTS:], y[SHOTS:])

    def update(carry: tuple, t: Array) -> tuple[tuple, Array]:
        params, opt = carry
        x, y = jax.vmap(sample)(jax.random.split(jax.random.fold_in(jax.random.key(0), t), NUM_TASKS))
        value, gradient = jax.value_and_grad(lambda params: jax.vmap(task_loss, (None, 0, 0))(params, x, y).mean())(params)
        step, opt = tx.update(gradient, opt, params)
        return (optax.apply_updates(params, step), opt), value

    run = jax.jit(lambda carry: lax.scan(update, carry, jnp.arange(updates)))
    return lambda: run((params, tx.init(params)))[1]


def by_library(learner: MetaLearner, updates: int) -> Callable[[], Array]:
    """The same with the library, compiled as `fit` compiles it; returns what runs it."""
    run = jax.jit(meta_updates(learner, NUM_TASKS, updates))
    sample = Partial(sinusoid(shots=SHOTS, queries=SHOTS))
    key, init_key = jax.random.split(jax.random.key(0))
    state = learner.init(init_key)
    return lambda: run(state, key, 0, updates, sample)[1]["loss"]


def measure(options: Options) -> list[report.Row]:
    """Rows of each method: time of a meta-update, and that relative to the one written by hand."""
    model = mlp(1, (40, 40), 1)
    settings = {"rule": INNER_LR, "inner_steps": 1, "eval_steps": 1, "tx": optax.adam(1e-3)}
    learners = {mode: maml(model, mse, differentiation=mode, **settings) for mode in ("reverse", "mixed", "first_order")}
    runs = {"written by hand, second order": by_hand(model.init(jax.random.key(0)), options.updates)}
    runs |= {f"mamljax, {mode}": by_library(learner, options.updates) for mode, learner in learners.items()}
    times = harness.medians(runs, options.repeats)
    rows = []
    for name, median in times.items():
        shared = {"method": name, "setting": "sinusoid, 1 inner step", "step": 1, "tasks": NUM_TASKS}
        shared |= {"protocol": f"median of {options.repeats}", **harness.UNTRAINED}
        rows.append(report.Row(metric="milliseconds per meta-update", mean=median / options.updates, **shared))
        rows.append(report.Row(metric="relative to by hand", mean=median / next(iter(times.values())), **shared))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.main("overhead", Options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
