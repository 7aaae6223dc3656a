"""How fast is the library? Its meta-update against the same one in PyTorch.

`python benchmarks/peers.py` times MAML on Omniglot 5-way 1-shot with the paper's convolutional network, on the CPU: the
meta-gradient on 32 tasks and Adam, second and first order, by this library, by `torch.func` and by a loop over tasks. Before
that it checks that all compute the same from the same weights and tasks. The images are noise: neither depends on them.

Each uses as many threads as this process may use cores: `taskset -c 0 python benchmarks/peers.py` measures on one.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from mamljax import report
from mamljax.inner import Differentiation
from mamljax.losses import cross_entropy
from mamljax.maml import maml
from mamljax.models import StridedConvNet, from_linen
from mamljax.rules import all_but
from mamljax.tasks.images import as_task
from mamljax.types import Model, PyTree, State, Task

WAYS, INNER_LR, META_LR = 5, 2.0, 1e-3
STYLES = {"torch.func": "PyTorch, torch.func", "loop": "PyTorch, loop over tasks"}


@dataclasses.dataclass(frozen=True)
class Options:
    """The library's meta-update against the same one in PyTorch."""

    num_tasks: int = 32
    """Tasks in a meta-batch."""
    filters: int = 64
    """Channels of each convolution."""
    chunk_size: int = 4
    """Tasks that the library differentiates at a time, a divisor of --num-tasks."""
    differentiation: Literal["mixed", "reverse"] = "reverse"
    """How the library differentiates through adaptation; both are exact."""
    repeats: int = 7
    """Measurements, of which the median counts; all take turns."""
    out: Path = Path("out/peers")
    """Directory for results.json and report.md."""


class Method(NamedTuple):
    """One way to do the meta-update."""

    update: Callable[[], object]  # do one, return the loss before it
    moments: Callable[[], Mapping[str, np.ndarray]]  # Adam's mean of the meta-gradients; after the first, a tenth of it


def by_library(options: Options, params: PyTree, tasks: Task, differentiation: Differentiation) -> Method:
    """With the library, as the experiment does it."""
    learner = maml(
        _model(options),
        cross_entropy,
        rule=all_but(("shift",), INNER_LR),
        inner_steps=1,
        eval_steps=1,
        tx=(tx := optax.adam(META_LR)),
        differentiation=differentiation,
        chunk_size=options.chunk_size,
    )
    params, tasks = jax.device_put((params, tasks))
    key, run, state = jax.random.key(0), jax.jit(learner.update), State(params, tx.init(params))

    def update() -> Array:
        nonlocal state
        state, metrics = run(key, state, tasks)
        jax.block_until_ready(state)
        return metrics["loss"]

    return Method(update, lambda: _named(optax.tree.get(state.opt, "mu")))


@cache
def problem(options: Options) -> tuple[PyTree, Task]:
    """Weights and tasks for all methods, float32 NumPy arrays."""
    images = np.random.default_rng(0).integers(0, 256, (options.num_tasks, WAYS, 2, 28, 28, 1), np.uint8)
    tasks = jax.vmap(partial(as_task, shots=1))(images)
    return jax.tree.map(np.asarray, (jax.jit(_model(options).init)(jax.random.key(0)), tasks))


def methods(options: Options, params: PyTree, tasks: Task, *, second_order: bool) -> dict[str, Method]:
    """Every method that is installed, all with the same weights and tasks."""
    mode = options.differentiation if second_order else "first_order"
    found = {f"mamljax, {mode}": by_library(options, params, tasks, mode)}
    try:
        import torch
        import torch_maml
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return found
    torch.set_num_threads(_threads())
    x, y = (np.stack(pair, axis=1) for pair in zip(*tasks, strict=True))
    settings = {"inner_lr": INNER_LR, "meta_lr": META_LR, "second_order": second_order}
    for style, name in STYLES.items():
        found[name] = Method(*torch_maml.build(_named(params), x, y, style=style, **settings))
    return found


def check_both_precisions(options: Options, *, second_order: bool) -> None:
    """Check that all methods compute the same: in float64 at full size, in float32 at a small one.

    In float32 a full-size meta-batch has ReLUs whose input is zero but for rounding: on which side they fall depends on the
    order of summation. PyTorch's meta-gradient in float32 is 4.5 % from its own in float64, by 4 of the 32 tasks.
    """
    double = jax.tree.map(lambda leaf: leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf, problem(options))
    with jax.enable_x64(True):
        check_agreement(methods(options, *double, second_order=second_order), tolerance=1e-9)
    small = dataclasses.replace(options, filters=min(options.filters, 4), num_tasks=2, chunk_size=1)
    check_agreement(methods(small, *problem(small), second_order=second_order), tolerance=1e-4)


def check_agreement(methods: Mapping[str, Method], tolerance: float) -> None:
    """Do a first meta-update with each.

    Raises:
        ValueError: losses or meta-gradients differ by more than `tolerance`, relative to their size.
    """
    (first, reference), *others = methods.items()
    loss, moments = float(reference.update()), reference.moments()
    for name, method in others:
        loss_error = abs(float(method.update()) / loss - 1)
        gradient_error = _distance(method.moments(), moments) / _distance(moments)
        print(f"{name}: loss and meta-gradient differ by {loss_error:.1e} and {gradient_error:.1e}", file=sys.stderr)
        if not (loss_error < tolerance and gradient_error < tolerance):  # NaN is no agreement
            raise ValueError(f"{name} and {first} do not compute the same within {tolerance}, so their times say nothing.")


def measure(options: Options) -> list[report.Row]:
    """Rows of every method that is installed: time of a meta-update, and speed relative to `torch.func`."""
    if (backend := jax.default_backend()) != "cpu":
        raise ValueError(f"this benchmark is for the CPU, but JAX runs on the {backend}. Set JAX_PLATFORMS=cpu.")
    rows = []
    for order in ("second", "first"):
        found = methods(options, *problem(options), second_order=order == "second")
        if len(found) > 1:
            check_both_precisions(options, second_order=order == "second")
        rows += compare(options, f"Omniglot {WAYS}-way 1-shot, {order} order", found)
    missing = [name for name in STYLES.values() if name not in found]
    if missing:
        print(f'skipped {" and ".join(missing)}: PyTorch is not installed. pip install "mamljax[bench]"', file=sys.stderr)
    return rows


def compare(options: Options, setting: str, methods: Mapping[str, Method]) -> list[report.Row]:
    """Rows of one setting."""
    times = harness.medians({name: method.update for name, method in methods.items()}, options.repeats)
    conditions = f"median of {options.repeats}, {options.num_tasks} tasks, threads: {_threads()}"
    peer = STYLES["torch.func"]
    meaning = f"time of {peer} divided by that of the method: above 1 is faster"
    rows = []
    for name, median in times.items():
        shared = {"method": name, "setting": setting, "step": 1, "tasks": options.num_tasks, **harness.UNTRAINED}
        rows.append(report.Row(metric="milliseconds per meta-update", mean=median, protocol=conditions, **shared))
        if peer in times:
            speed = times[peer] / median
            rows.append(report.Row(metric="speed relative to torch.func", mean=speed, protocol=meaning, **shared))
    return rows


def _model(options: Options) -> Model:
    return from_linen(StridedConvNet(WAYS, options.filters), jnp.zeros((1, 28, 28, 1)))


def _named(params: PyTree) -> dict[str, np.ndarray]:
    """Parameters by path: "PatchConv_0/kernel"."""
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def _distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray] | None = None) -> float:
    """Euclidean distance of parameters, by default from zero."""
    return float(np.sqrt(sum(np.sum((value - (b[name] if b else 0)) ** 2) for name, value in a.items())))


def _threads() -> int:
    """Cores that this process may use, and therefore threads of JAX."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.main("peers", Options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
