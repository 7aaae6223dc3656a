"""What the benchmarks share: measuring in turns, and a command line that writes results.

A benchmark is a dataclass of options, among them `repeats` and `out`, and a function that makes rows of them.
"""

import contextlib
import dataclasses
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import tyro

from mamljax import report
from mamljax.checks import check_count
from mamljax.figures import new_figure
from mamljax.files import write_atomically
from mamljax.run_directory import CheckpointError, make_directory

UNTRAINED = {"ci95": float("nan"), "seeds": 0, "meta_updates": 0}  # the fields of a row that a benchmark leaves empty
NO_ROOM = "does not fit in memory"  # the note of a row without a number


def medians(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time of a call in milliseconds, by name. All take turns, after one call each that is not timed."""
    times = {name: [] for name in runs}
    for run in runs.values():  # compile
        jax.block_until_ready(run())
    # In turns: if the machine is slow for a while, it is so for all of them.
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(milliseconds(run))
    return {name: statistics.median(values) for name, values in times.items()}


def milliseconds(run: Callable[[], object], at_least: float = 0.02) -> float:
    """Time of one call, over as many calls as fill `at_least` seconds."""
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < at_least:
        jax.block_until_ready(run())
        calls += 1
    return 1e3 * (time.perf_counter() - started) / calls


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` after so many seconds, if any; where the system has no timer there is no limit."""
    if seconds in (0, float("inf")) or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:g} s to compile")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@cache
def cores() -> int:
    """Cores that this process might use when it was first asked, and therefore threads of JAX."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def free_megabytes() -> float:
    """Memory that JAX's device has left; infinity where nothing tells. A container may allow less."""
    of_device = jax.devices()[0].memory_stats()
    if of_device and "bytes_limit" in of_device:
        return (of_device["bytes_limit"] - of_device["bytes_in_use"]) / 1e6
    try:
        available = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:  # not Linux
        available = None
    return int(available[1]) * 1024 / 1e6 if available else float("inf")


def planned_megabytes(compiled: Any) -> float:
    """Temporary memory of a compiled program, as the compiler has planned it."""
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def has_room(run: Callable[[], object], megabytes: float, limit: float) -> bool:
    """Whether a program that takes so many megabytes fits; if its size does not tell, by running it once."""
    if megabytes > limit:  # on a CPU the system would kill the process
        return False
    try:
        jax.block_until_ready(run())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return False
    return True


def bars(results: Mapping[str, Any], path: Path) -> None:
    """Draw the rows of a results file as bars: metrics across, settings down, a bar for each method."""
    rows = [row for row in results["rows"] if row.mean is not None]
    if not rows:
        return
    settings, metrics = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("setting", "metric"))
    most = max(sum((row.setting, row.metric) == (setting, metrics[0]) for row in rows) for setting in settings)
    figure = new_figure(1 + 5 * len(metrics), (1.2 + 0.3 * most) * len(settings))
    panels = figure.subplots(len(settings), len(metrics), squeeze=False)
    for setting, line in zip(settings, panels, strict=True):
        for metric, axes in zip(metrics, line, strict=True):
            shown = [row for row in rows if (row.setting, row.metric) == (setting, metric)]
            drawn = axes.barh([row.method for row in shown], [row.mean for row in shown], color="C0")
            axes.bar_label(drawn, fmt=lambda value: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}", padding=3)
            axes.set_title(f"{setting}\n{metric}", fontsize="medium")
            axes.invert_yaxis()
            axes.margins(x=0.4)
    figure.savefig(path, dpi=100)


def main(
    benchmark: str,
    options_type: type,
    measure: Callable[[Any], list[report.Row]],
    argv: Sequence[str] | None = None,
    *,
    drawn: Callable[[report.Row], bool] = lambda row: True,
) -> int:
    """Read the command line, measure, write `results.json`, `report.md` and a figure, print the tables.

    The figure has curves where the number of adaptation steps varies, and else bars.

    Args:
        benchmark: name for the results file.
        options_type: dataclass of the options; every whole number among them must be at least 1.
        measure: options -> rows.
        argv: command line; by default that of the process.
        drawn: whether a row is in the figure; by default all are.

    Returns:
        The exit code: 0 for success, 2 for an error, 130 after Ctrl-C.
    """
    options = tyro.cli(options_type, args=argv)
    config = dataclasses.asdict(options) | {"out": str(options.out)}
    path, started = options.out / "results.json", time.monotonic()
    try:
        for name, value in config.items():
            if value == ():
                raise ValueError(f"--{name.replace('_', '-')} must have at least one value.")
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, int) and not isinstance(item, bool):
                    check_count("--" + name.replace("_", "-"), item)
        make_directory(options.out)
        rows = measure(options)
    except (ValueError, OSError, ImportError, CheckpointError) as error:  # ImportError: of MuJoCo, with the extra that has it
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped. Nothing was written: results are there when all is measured.", file=sys.stderr)
        return 130
    measured = {"experiment": benchmark, "config": config, "rows": rows, "seconds": time.monotonic() - started}
    try:
        report.write_results(path, **measured)
        results = report.read_results(path)
        write_atomically(path.with_name("report.md"), report.markdown(results))
        draw = report.learning_curves if len({row.step for row in rows}) > 1 else bars
        draw(results | {"rows": [row for row in results["rows"] if drawn(row)]}, path.with_name(f"{benchmark}.png"))
    except OSError as error:
        print(report.markdown(measured | {"environment": report.environment()}))  # or all that was measured would be lost
        print(f"error: cannot write to {options.out}: {error.strerror}. Make room there.", file=sys.stderr)
        return 2
    print(report.markdown(results))
    return 0
