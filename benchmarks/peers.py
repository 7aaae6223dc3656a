"""How fast is the library? Its meta-update against the same one in PyTorch and the packages for it.

`python benchmarks/peers.py` times MAML on the CPU or on one GPU: meta-gradient and Adam, second and first order, on Omniglot
5-way 1-shot, on miniImageNet 5-way 1-shot and on sinusoids, with the paper's networks and the settings of the experiments. The
peers are a loop over tasks, `torch.func`, `torch.compile` of that, `higher` and TorchOpt. First it checks that all compute the
same from the same weights and tasks. The images are noise: neither depends on them. The library runs its meta-updates in a
compiled loop, as `fit` does; the tasks are fixed on both sides.

On a CPU each uses as many threads as this process may use cores: `taskset -c 0 python benchmarks/peers.py` measures on one. Of
several cores XLA makes little use within one small product, so the library divides the tasks among as many simulated devices.
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from problems import META_LR, PROBLEMS, Name, Problem, build_learner, problem_here, weights_and_tasks

from mamljax import report
from mamljax.devices import BY_TASK, on, place, task_mesh
from mamljax.inner import Differentiation
from mamljax.types import PyTree, State, Task

PEERS = {  # name -> package that it needs
    "torch.func": "torch",
    "torch.compile": "torch",
    "loop over tasks": "torch",
    "higher": "higher",
    "TorchOpt": "torchopt",
}

TIME = "milliseconds per meta-update"


@dataclasses.dataclass(frozen=True)
class Options:
    """The library's meta-update against the same one in PyTorch and the packages for it."""

    problem: tuple[Name, ...] = tuple(PROBLEMS)
    """What to learn."""
    num_tasks: int | None = None
    """Tasks in a meta-batch; this and the next three are as in the experiment if not given."""
    width: int | None = None
    """Channels of each convolution, or units of each hidden layer."""
    chunk_size: int | None = None
    """Tasks that the library differentiates at a time."""
    differentiation: Literal["mixed", "reverse"] | None = None
    """How the library differentiates through adaptation; both are exact."""
    precision: Literal["float32", "tensorfloat32"] = "float32"
    """Arithmetic of products on a GPU, on both sides. That they compute the same is checked in float32 and float64."""
    devices: int | None = None
    """Devices among which the library divides the tasks, if it is given images; by default one GPU, or of those that a CPU
    simulates as many as there are cores and divide --num-tasks."""
    compile_seconds: float = 300.0
    """Time that `torch.compile` may take for each program, before it is left out; 0 leaves it out at once."""
    repeats: int = 7
    """Measurements, of which the median counts; all take turns."""
    out: Path = Path("out/peers")
    """Directory for results.json, report.md and the figure."""


class DisagreementError(Exception):
    """Two methods that should compute the same do not."""


class Method(NamedTuple):
    """One way to do the meta-update."""

    update: Callable[[int], object]  # do so many, return the loss before the last
    moments: Callable[[], Mapping[str, np.ndarray]]  # Adam's mean of the meta-gradients; after the first, a tenth of it
    together: int = 1  # meta-updates that are timed as one


def problems_of(options: Options) -> list[Problem]:
    """The problems, with what the options change of them."""
    names = ("num_tasks", "width", "chunk_size", "differentiation")
    changes = {name: value for name in names if (value := getattr(options, name)) is not None}
    problems = (problem_here(name)._replace(**changes) for name in options.problem)
    return [problem._replace(devices=_devices(problem, options.devices)) for problem in problems]


def _devices(problem: Problem, wanted: int | None) -> int:
    """Among how many devices to divide the tasks of a problem; sinusoids are too little work to divide."""
    if not problem.image or (wanted is None and jax.default_backend() != "cpu"):
        return 1
    if wanted is None:
        return max(number for number in range(1, harness.cores() + 1) if problem.num_tasks % number == 0)
    if wanted < 1 or problem.num_tasks % wanted:
        raise ValueError(f"--devices must divide the {problem.num_tasks} tasks of {problem.name}, got {wanted}.")
    return wanted


def by_library(problem: Problem, params: PyTree, tasks: Task, differentiation: Differentiation) -> Method:
    """With the library."""
    learner, key = build_learner(problem, differentiation), jax.random.key(0)
    mesh = task_mesh(problem.devices) if problem.devices > 1 else None
    params, tasks = jax.device_put((params, tasks))
    state = place(State(params, optax.adam(META_LR).init(params)), mesh)
    tasks = place(tasks, mesh, BY_TASK)

    @jax.jit
    def run(state: State, tasks: Task, count: int) -> tuple[State, Array]:
        def body(t: Array, carry: tuple) -> tuple:
            state, metrics = learner.update(jax.random.fold_in(key, t), carry[0], tasks)
            return state, metrics["loss"]

        return lax.fori_loop(0, count, body, (state, jnp.zeros((), tasks.query.x.dtype)))

    def update(count: int) -> Array:
        nonlocal state
        with on(mesh):
            state, loss = jax.block_until_ready(run(state, tasks, count))
        return loss

    return Method(update, lambda: _named(optax.tree.get(state.opt, "mu")), problem.updates)


def by_peer(name: str, problem: Problem, params: PyTree, tasks: Task, *, second_order: bool) -> Method:
    """With PyTorch."""
    import torch
    import torch_maml
    import torch_packages

    torch.set_num_threads(harness.cores())
    tf32 = jax.config.jax_default_matmul_precision == "tensorfloat32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    style = (torch_maml.STYLES | {"higher": torch_packages.by_higher, "TorchOpt": torch_packages.by_torchopt})[name]
    arithmetic = torch_maml.Arithmetic(
        torch_maml.NETWORKS[problem.network],
        torch.nn.functional.cross_entropy if problem.image else torch.nn.functional.mse_loss,
        problem.inner_lr,
        problem.inner_steps,
        second_order,
    )
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    tensors = _named(params), (*tasks.support, *tasks.query)
    return Method(*torch_maml.build(style, arithmetic, *tensors, meta_lr=META_LR, device=device))


def available(compile_seconds: float) -> list[str]:
    """The peers that are installed; says which are not."""
    found = []
    for name, package in PEERS.items():
        if name == "torch.compile" and compile_seconds == 0:
            continue
        try:
            importlib.import_module(package)
            found.append(name)
        except ImportError as error:
            print(f'skipped {name}: {package} cannot be imported ({error}). pip install "mamljax[bench]"', file=sys.stderr)
    return found


def methods(
    problem: Problem, params: PyTree, tasks: Task, peers: Sequence[str], *, second_order: bool, compile_seconds: float
) -> dict[str, Method]:
    """The library and the peers, all with the same weights and tasks."""
    mode = problem.differentiation if second_order else "first_order"
    found = {f"mamljax, {mode}": by_library(problem, params, tasks, mode)}
    for name in peers:
        try:
            with harness.time_limit(compile_seconds if name == "torch.compile" else 0):
                found[name] = by_peer(name, problem, params, tasks, second_order=second_order)
        except Exception as error:
            if name != "torch.compile":  # which may fail by what it finds on the machine, or take too long
                raise
            print(f"skipped {name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}", file=sys.stderr)
    return found


def check_both_precisions(problem: Problem, peers: Sequence[str], *, second_order: bool, compile_seconds: float) -> list[str]:
    """Check that all methods compute the same: in float64, and in float32 at a small size. Returns the peers that ran.

    In float32 a full-size meta-batch has ReLUs whose input is zero but for rounding: on which side they fall depends on the
    order of summation. PyTorch's meta-gradient of Omniglot in float32 is 4.5 % from its own in float64, by 4 of the 32 tasks.
    `torch.compile`, which takes a minute or so for each program, is checked in float32 alone.
    """
    settings = {"second_order": second_order, "compile_seconds": compile_seconds}
    double = jax.tree.map(
        lambda leaf: leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf, weights_and_tasks(problem)
    )
    with jax.enable_x64(True):
        eager = [name for name in peers if name != "torch.compile"]
        ran = check_agreement(methods(problem, *double, eager, **settings), tolerance=1e-9)
    size = {"num_tasks": 2, "chunk_size": problem.chunk_size and 1, "devices": min(problem.devices, 2)}
    size |= {"image": problem.image and (28, 28, problem.image[2]), "queries": min(problem.queries, 2)}
    size |= {"inner_steps": min(problem.inner_steps, 2)}
    small = problem._replace(width=min(problem.width, 4), **size)
    left = [name for name in peers if name in ran or name == "torch.compile"]
    return check_agreement(methods(small, *weights_and_tasks(small), left, **settings), tolerance=1e-4)


def check_agreement(methods: Mapping[str, Method], tolerance: float) -> list[str]:
    """Do a first meta-update with each; returns the names of the peers, without those that cannot run here, and says which.

    Raises:
        DisagreementError: losses or meta-gradients differ by more than `tolerance`, relative to their size.
    """
    (first, reference), *others = methods.items()
    loss, moments = float(reference.update(1)), reference.moments()
    ran = []
    for name, method in others:
        try:
            its_loss = float(method.update(1))
        except RuntimeError as error:  # PyTorch's, of what one device can do and another cannot
            print(f"skipped {name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}", file=sys.stderr)
            continue
        loss_error = abs(its_loss / loss - 1)
        gradient_error = _distance(method.moments(), moments) / _distance(moments)
        print(f"{name}: loss and meta-gradient differ by {loss_error:.1e} and {gradient_error:.1e}", file=sys.stderr)
        if not (loss_error < tolerance and gradient_error < tolerance):  # NaN is no agreement
            raise DisagreementError(
                f"{name} and {first} do not compute the same within {tolerance}, so their times say nothing."
            )
        ran.append(name)
    return ran


def measure(options: Options) -> list[report.Row]:
    """Rows of every method that is installed: time of a meta-update, and speed relative to the fastest peer."""
    if (backend := jax.default_backend()) not in ("cpu", "gpu"):
        raise ValueError(f"PyTorch is compared on a CPU or a GPU, but JAX runs on the {backend}. Set JAX_PLATFORMS=cpu.")
    if not options.compile_seconds >= 0:
        raise ValueError(f"--compile-seconds must be at least 0, got {options.compile_seconds}.")
    harness.cores()  # now, before anything can change it
    rows, peers = [], available(options.compile_seconds)
    for problem in problems_of(options):
        for order in ("second", "first"):
            settings = {"second_order": order == "second", "compile_seconds": options.compile_seconds}
            setting = f"{problem.name}, {order} order"
            try:
                with jax.default_matmul_precision("float32"):
                    ran = check_both_precisions(problem, peers, **settings) if peers else []
                with jax.default_matmul_precision(options.precision):
                    found = methods(problem, *weights_and_tasks(problem), ran, **settings)
                    rows += compare(problem, setting, found, options.repeats)
            except DisagreementError as error:
                print(f"{setting}: not timed. {error}", file=sys.stderr)
                names = ("mamljax", *peers)
                rows += [row_of(problem, setting, name, TIME, float("nan"), "not timed", note=str(error)) for name in names]
    return rows


def compare(problem: Problem, setting: str, methods: Mapping[str, Method], repeats: int) -> list[report.Row]:
    """Rows of one setting."""
    runs = {name: partial(method.update, method.together) for name, method in methods.items()}
    times = {name: time / methods[name].together for name, time in harness.medians(runs, repeats).items()}
    fastest = min((times[name] for name in PEERS if name in times), default=None)
    conditions = (
        f"median of {repeats}, {problem.num_tasks} tasks, threads: {harness.cores()}, devices of the library: {problem.devices}"
    )
    meaning = "time of the fastest peer divided by that of the method: above 1 is faster than all peers"
    rows = []
    for name, time in times.items():
        rows.append(row_of(problem, setting, name, TIME, time, conditions))
        if fastest is not None:
            metric = "speed relative to the fastest peer"
            rows.append(row_of(problem, setting, name, metric, fastest / time, meaning))
    return rows


def row_of(
    problem: Problem, setting: str, method: str, metric: str, mean: float, protocol: str, *, note: str = ""
) -> report.Row:
    """One row of the results."""
    fields = {"step": problem.inner_steps, "tasks": problem.num_tasks, "note": note, **harness.UNTRAINED}
    return report.Row(method=method, setting=setting, metric=metric, mean=mean, protocol=protocol, **fields)


def _named(params: PyTree) -> dict[str, np.ndarray]:
    """Parameters by path: "Conv3x3_0/kernel"."""
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def _distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray] | None = None) -> float:
    """Euclidean distance of parameters, by default from zero."""
    return float(np.sqrt(sum(np.sum((value - (b[name] if b else 0)) ** 2) for name, value in a.items())))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.main("peers", Options, measure, argv)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", harness.cores())
    sys.exit(main())
