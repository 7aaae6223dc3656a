"""What the benchmarks share: measuring in turns, and a command line that writes results.

A benchmark is a dataclass of options, among them `repeats` and `out`, and a function that makes rows of them.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import tyro

from mamljax import report
from mamljax.checks import check_count
from mamljax.files import write_atomically

UNTRAINED = {"ci95": float("nan"), "seeds": 0, "meta_updates": 0}  # the fields of a row that a benchmark leaves empty


def medians(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time of a call in milliseconds, by name. All take turns, after one call each that is not timed."""
    times = {name: [] for name in runs}
    for run in runs.values():  # compile
        jax.block_until_ready(run())
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


def main(
    benchmark: str, options_type: type, measure: Callable[[Any], list[report.Row]], argv: Sequence[str] | None = None
) -> int:
    """Read the command line, measure, write `results.json` and `report.md`, print the tables.

    Where the number of adaptation steps varies there is a figure as well.

    Args:
        benchmark: name for the results file.
        options_type: dataclass of the options; every whole number among them must be at least 1.
        measure: options -> rows.
        argv: command line; by default that of the process.

    Returns:
        The exit code: 0 for success, 2 for an error.
    """
    options = tyro.cli(options_type, args=argv)
    config = dataclasses.asdict(options) | {"out": str(options.out)}
    path, started = options.out / "results.json", time.monotonic()
    try:
        for name, value in config.items():
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, int):
                    check_count("--" + name.replace("_", "-"), item)
        options.out.mkdir(parents=True, exist_ok=True)
        rows = measure(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report.write_results(path, experiment=benchmark, config=config, rows=rows, seconds=time.monotonic() - started)
    results = report.read_results(path)
    write_atomically(path.with_name("report.md"), report.markdown(results))
    if len({row.step for row in rows}) > 1:
        report.learning_curves(results, path.with_name(f"{benchmark}.png"))
    print(report.markdown(results))
    return 0
