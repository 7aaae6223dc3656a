"""How long from the command to the first meta-update?

`python benchmarks/startup.py` runs the experiments as a user does, each in a process of its own, until the log of the training
has its first line, of one meta-update: cold, with an empty directory for compiled programs, and warm, with what the cold run
left there. Image banks are random images in the size of the data sets. What the process leaves on the way tells the parts: its
configuration, when all is imported and the command line is read; the directory of the training, when the data and the first
weights are there. JAX itself logs what it traces and compiles.
"""

import dataclasses
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import harness
import numpy as np

from mamljax import report
from mamljax.data.bank import Source, prepared_bank

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
COMMANDS = {
    "sinusoid": ("sinusoid.py",),
    "omniglot-5w1s": ("few_shot.py", "--preset", "omniglot-5w1s"),
    "omniglot-20w1s": ("few_shot.py", "--preset", "omniglot-20w1s"),
    "miniimagenet-5w1s": ("few_shot.py", "--preset", "miniimagenet-5w1s"),
    "navigation": ("navigation.py", "--preset", "paper"),
    "half_cheetah_velocity": ("locomotion.py", "--preset", "half_cheetah_velocity"),
}
Experiment = Literal["sinusoid", "omniglot-5w1s", "omniglot-20w1s", "miniimagenet-5w1s", "navigation", "half_cheetah_velocity"]
ONE_UPDATE = ("--method", "maml", "--steps", "2", "--log-every", "1")  # the first of two: the last one is validated
LOGGED = {  # what JAX_LOG_COMPILES=1 has it write, and what to call it
    "of which tracing": r"Finished (?:tracing|jaxpr to MLIR module conversion) .* in ([\d.e-]+) sec",
    "of which compiling": r"Finished XLA compilation of .* in ([\d.e-]+) sec",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Time from the command to the first meta-update, cold and with compiled programs kept from before."""

    experiment: tuple[Experiment, ...] = tuple(COMMANDS)
    """Which to start. One that cannot start, for want of MuJoCo for example, is left out by name."""
    images: int = 600
    """Images of each class in the bank of miniImageNet's size; the data set has 600."""
    repeats: int = 3
    """Starts, cold and warm each, of which the median counts."""
    timeout: float = 600.0
    """Seconds to wait for a first meta-update."""
    out: Path = Path("out/startup")
    """Directory for results.json, report.md and the figure."""


class Start(NamedTuple):
    """Seconds from the command."""

    configured: float  # all is imported, the command line is read
    loaded: float  # the data is open, the first weights are drawn
    updated: float  # the first meta-update is done
    processor: float  # of processor time of all threads until then, which other work on the machine does not lengthen
    parts: dict[str, float]  # seconds of what JAX logs


def start(command: Sequence[str], directory: Path, environment: dict[str, str], timeout: float) -> Start:
    """Run an experiment until its first meta-update, and end it.

    Args:
        command: what to run, without `--out`.
        directory: an empty one, for the run and what it prints.
        environment: variables of the process.
        timeout: seconds to wait.

    Raises:
        ValueError: it ended before, or took too long; with the last that it printed.
    """
    out, printed = directory / "run", directory / "printed"
    training = out / "checkpoints" / "maml"
    before, began = _processor_seconds(), time.monotonic()
    with printed.open("w") as file:
        process = subprocess.Popen([*command, "--out", str(out)], env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        # The files that it writes tell how far it is, so that the scripts are timed as they are.
        reached = [_wait(process, place, began, timeout) for place in (out / "config.json", training / "config.json")]
        reached.append(_wait(process, training / "metrics.jsonl", began, timeout))
    except TimeoutError as error:
        raise ValueError(f"{' '.join(command)} {error}: {printed.read_text().strip()[-500:]}") from error
    finally:
        process.kill()
        process.wait()
    text = printed.read_text()
    parts = {name: sum(map(float, re.findall(pattern, text))) for name, pattern in LOGGED.items()}
    return Start(*reached, _processor_seconds() - before, parts)


def _processor_seconds() -> float:
    """Processor time of the processes that this one has started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _wait(process: subprocess.Popen, path: Path, began: float, timeout: float) -> float:
    """Seconds since `began` when a file is there and not empty."""
    while not (path.exists() and path.stat().st_size):
        if process.poll() is not None:
            raise TimeoutError(f"ended with code {process.returncode} before it wrote {path.name}")
        if time.monotonic() - began > timeout:
            raise TimeoutError(f"has not written {path.name} after {timeout:g} s")
        time.sleep(0.002)
    return time.monotonic() - began


def measure(options: Options) -> list[report.Row]:
    """Rows of every experiment, cold and warm."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        banks = Path(directory) / "banks"
        for name in options.experiment:
            make_bank(name, banks, images=options.images)
            try:
                starts = starts_of(name, banks, options)
            except ValueError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            for kind, found in starts.items():
                rows += rows_of(name, kind, found)
    if not rows:
        raise ValueError("no experiment has started; see above.")
    return rows


def starts_of(name: str, banks: Path, options: Options) -> dict[str, list[Start]]:
    """Start an experiment several times, "cold" and "warm" in turn."""
    starts = {"cold": [], "warm": []}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as compiled:
            for kind, found in starts.items():
                found.append(_start_once(name, Path(compiled), banks, options.timeout))
                print(f"{name}, {kind}: {found[-1].updated:.1f} s", file=sys.stderr)
    return starts


def _start_once(name: str, compiled: Path, banks: Path, timeout: float) -> Start:
    script, *arguments = COMMANDS[name]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_LOG_COMPILES": "1",
        "MAMLJAX_CACHE_DIR": str(banks),
    }
    with tempfile.TemporaryDirectory() as directory:
        command = (sys.executable, str(EXPERIMENTS / script), *arguments, *ONE_UPDATE)
        return start(command, Path(directory), environment, timeout)


def rows_of(name: str, kind: str, starts: Sequence[Start]) -> list[report.Row]:
    """Rows of one experiment, cold or warm: the whole, and its parts as far as they can be told."""
    of: dict[str, Callable[[Start], float]] = {
        "command to first meta-update": lambda start: start.updated,
        "imports and command line": lambda start: start.configured,
        "data and first weights": lambda start: start.loaded - start.configured,
        "first meta-update": lambda start: start.updated - start.loaded,
        **{part: lambda start, part=part: start.parts[part] for part in LOGGED},
        "processor time": lambda start: start.processor,
    }
    protocol = f"median of {len(starts)} starts; cold: no compiled programs kept; warm: those of the cold start"
    shared = {"setting": name, "metric": "seconds", "protocol": protocol, "step": 1, "tasks": 1, **harness.UNTRAINED}
    return [
        report.Row(method=f"{kind}: {part}", mean=statistics.median(map(seconds, starts)), **shared)
        for part, seconds in of.items()
    ]


def make_bank(name: str, banks: Path, *, images: int) -> None:
    """Make the bank that an experiment opens, of random images, unless it is there or needs none."""

    def random_source(names: Sequence[str], count: int, shape: tuple[int, int, int]) -> Source:
        def read(index: int) -> np.ndarray:
            return np.random.default_rng(index).integers(0, 256, (count, *shape), np.uint8)

        return Source(tuple(names), (count,) * len(names), shape, read)

    if name.startswith("omniglot"):
        characters = [f"Alphabet/character{number:04d}" for number in range(1623)]
        prepared_bank("omniglot-28", lambda: random_source(characters, 20, (28, 28, 1)), banks)
    elif name.startswith("miniimagenet"):
        parts = {"test": 20, "train": 64, "val": 16}
        classes = [f"{part}/n{number:02d}" for part, count in parts.items() for number in range(count)]
        prepared_bank("miniimagenet-84", lambda: random_source(classes, images, (84, 84, 3)), banks)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.main("startup", Options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
