"""What do more devices bring? The same meta-updates on 1 device, on several, and on two processes.

`python benchmarks/scaling.py` trains the Omniglot network on random images with the tasks of a meta-batch divided among
devices, and reports the time of a meta-update, the collective operations in the compiled program, and how far the parameters
are from those of one device. On a CPU the devices are simulated.

Programs for other numbers of devices round differently, and training enlarges that, probably by ReLUs whose input is zero but
for rounding. So `--dtype float64` is what shows after many meta-updates that nothing else differs.
"""

import dataclasses
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mamljax import image_models, models, report
from mamljax.devices import on, place, take_back, task_mesh
from mamljax.loop import meta_updates
from mamljax.losses import cross_entropy
from mamljax.maml import maml
from mamljax.rules import all_but
from mamljax.tasks.images import episodes
from mamljax.types import Model

COLLECTIVE = re.compile(r" (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
CALLS = 5  # compiled calls that the meta-updates are divided among


@dataclasses.dataclass(frozen=True)
class Options:
    """Time, collective operations and parameters of the same meta-updates on different numbers of devices."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices; on a CPU they are simulated. The first is what the others are compared with."""
    processes: int = 2
    """Processes joined by jax.distributed on this machine, with one CPU device each; 1 leaves them out."""
    updates: int = 100
    """Meta-updates, a multiple of 5."""
    num_tasks: int = 32
    """Tasks in a meta-batch."""
    chunk_size: int = 1
    """Tasks that a device differentiates at a time."""
    filters: int = 64
    """Channels of each convolution."""
    dtype: Literal["float32", "float64"] = "float32"
    """Numbers to calculate with."""
    timeout_seconds: int = 600
    """How long to wait for the processes."""
    out: Path = Path("out/scaling")
    """Directory for results.json, report.md and the figure."""


class Training(NamedTuple):
    """What came of a training."""

    params: np.ndarray  # all of them, in a row
    milliseconds: float  # per meta-update
    collectives: int  # operations in the compiled meta-update


def train(mesh: Mesh | None, options: Options) -> Training:
    """Train on random images from a fixed seed."""
    images = np.random.default_rng(0).integers(0, 256, (100, 2, 28, 28, 1), np.uint8)
    network = models.from_linen(image_models.StridedConvNet(5, options.filters), jnp.zeros((1, 28, 28, 1)))
    network = with_dtype(network, options.dtype)
    rule, modes = all_but(("shift",), 0.1), {"differentiation": "reverse", "chunk_size": options.chunk_size}
    # Not Adam: it would make whole steps of the rounding of gradients that are zero, those of biases before normalisation.
    tx = optax.sgd(0.001, momentum=0.9)
    learner = maml(network, cross_entropy, rule=rule, inner_steps=1, eval_steps=1, tx=tx, **modes)
    key, length = jax.random.key(0), options.updates // CALLS
    state, sample, key = place((learner.init(key), episodes(images, ways=5, shots=1, queries=1), key), mesh)
    seconds = []
    with on(mesh):
        # Compiled beforehand: no call takes longer for it, and the program's text is there to be searched.
        run = jax.jit(meta_updates(learner, options.num_tasks, length)).lower(state, key, 0, length, sample).compile()
        for start in range(0, options.updates, length):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(run(state, key, start, start + length, sample))
            seconds.append(time.perf_counter() - began)
    params = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(take_back(state.params, mesh))])
    return Training(params, 1e3 * statistics.median(seconds) / length, len(COLLECTIVE.findall(run.as_text())))


def with_dtype(network: Model, dtype: str) -> Model:
    """The same network, calculating with other numbers."""
    return Model(
        init=lambda key: optax.tree.cast(network.init(key), dtype),
        apply=lambda params, x: network.apply(params, x.astype(dtype)),
    )


def train_on_processes(options: Options) -> Training:
    """Train in several processes at once; returns what the first of them finds.

    Raises:
        ValueError: one of them failed, or they took too long.
    """
    # A port that is free now, where the processes will meet.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "training.npz"
        plain = json.dumps(dataclasses.asdict(options) | {"out": str(path)})
        command = [sys.executable, __file__, "--process", plain]
        shared = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address}
        started = [subprocess.Popen(command, env=shared | {"JAX_PROCESS_ID": str(n)}) for n in range(options.processes)]
        try:
            codes = [process.wait(options.timeout_seconds) for process in started]
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"{options.processes} processes did not end within {options.timeout_seconds} s.") from error
        finally:
            # Also where only one has failed: the others would wait for it.
            for process in started:
                process.kill()
        if any(codes):
            raise ValueError(f"of {options.processes} processes some failed, with exit codes {codes}; see above.")
        return Training(**{name: value[()] for name, value in np.load(path).items()})


def process(plain: str) -> None:
    """Be one of several processes."""
    options = Options(**json.loads(plain))
    number = int(os.environ["JAX_PROCESS_ID"])
    jax.distributed.initialize(num_processes=options.processes, process_id=number)
    with jax.enable_x64(options.dtype == "float64"):
        training = train(task_mesh(), options)
    if number == 0:
        np.savez(options.out, **training._asdict())


def measure(options: Options) -> list[report.Row]:
    """Rows of every number of devices, and of the processes.

    Raises:
        ValueError: more devices than there are, a meta-batch that they do not divide, or processes that fail.
    """
    if options.updates % CALLS:
        raise ValueError(f"--updates must be a multiple of {CALLS}, got {options.updates}.")
    for number in (*options.devices, options.processes):
        if options.num_tasks % number:
            raise ValueError(f"--num-tasks must be a multiple of the number of devices, {number}, got {options.num_tasks}.")
    trainings = {}
    for number in options.devices:
        with jax.enable_x64(options.dtype == "float64"):
            trainings[f"{number} device{'s' * (number > 1)}"] = train(task_mesh(number), options)
        print(f"{number} devices: done", file=sys.stderr)
    if options.processes > 1:
        trainings[f"{options.processes} processes"] = train_on_processes(options)
    first = next(iter(trainings.values()))
    rows = []
    for name, training in trainings.items():
        distance = np.linalg.norm(training.params - first.params) / np.linalg.norm(first.params)
        figures = {
            "milliseconds per meta-update": (training.milliseconds, f"median of {CALLS}"),
            "time relative to the first": (training.milliseconds / first.milliseconds, "ratio of medians"),
            "collective operations in a meta-update": (training.collectives, "in the compiled program"),
            "relative distance of the parameters": (distance, f"after {options.updates} meta-updates"),
        }
        fields = {"setting": f"devices, {options.dtype}", "step": 1, "tasks": options.num_tasks, **harness.UNTRAINED}
        for metric, (value, protocol) in figures.items():
            rows.append(report.Row(name, mean=float(value), metric=metric, protocol=protocol, **fields))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.main("scaling", Options, measure, argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        sys.exit(process(sys.argv[2]))
    jax.config.update("jax_num_cpu_devices", 8)
    sys.exit(main())
