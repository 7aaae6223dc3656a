"""Results files, and what people look at: tables beside the published numbers, learning curves.

`python -m mamljax.report OUT/results.json` makes the report again.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mamljax import __version__
from mamljax.figures import legend_below, new_figure
from mamljax.files import write_atomically
from mamljax.record import read_metrics

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Row(NamedTuple):
    """One number of a results file; one line of a table."""

    method: str
    setting: str  # "5-shot"
    protocol: str  # the rules under which it was measured
    metric: str
    step: int  # adaptation steps taken
    mean: float
    ci95: float  # half-width; over seeds, or over tasks if there is but one seed
    tasks: int
    seeds: int  # trainings; 0 in a benchmark, which trains nothing
    meta_updates: int
    published: float | None = None
    source: str = ""
    note: str = ""
    seconds: float | None = None  # of training, validation included, all seeds together
    best_update: int | None = None  # where it is the state of the best validation that was measured, and not the last


class ResultsError(Exception):
    """A results file cannot be used; the message says why and what to do."""


def rows_over_steps(
    mean: Sequence[float], ci95: Sequence[float], *, published: Mapping[int, float] = {}, source: str = "", **fields: Any
) -> list[Row]:
    """Make one row for each adaptation step.

    Args:
        mean, ci95: [S + 1].
        published: the published number by step.
        source: where it is from.
        fields: the remaining fields of `Row`.
    """
    rows = []
    for step, (value, half_width) in enumerate(zip(mean, ci95, strict=True)):
        row = Row(step=step, mean=float(value), ci95=float(half_width), **fields)
        rows.append(row._replace(published=published[step], source=source) if step in published else row)
    return rows


def environment(num_devices: int = 1) -> dict[str, Any]:
    """The devices, the versions and the commit that a results file was made with."""
    device = jax.devices()[0]
    name = f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else f"{num_devices} x {device.device_kind}"
    versions = {"python": platform.python_version(), "mamljax": __version__}
    versions |= {package: metadata.version(package) for package in PACKAGES}
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        # The commit of the script that runs, whatever directory it was started from.
        place = Path(sys.argv[0]).resolve().parent
        git = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False).stdout
    except OSError:  # no git here
        git = ""
    return {"device": name, "versions": versions, "git": git.strip()}


def write_results(
    path: Path, *, experiment: str, config: Mapping[str, Any], rows: Sequence[Row], seconds: float, num_devices: int = 1
) -> dict[str, Any]:
    """Write a results file, atomically, and return what it holds.

    Args:
        path: usually OUT/results.json.
        experiment: the script's name.
        config: its options, as JSON values.
        rows: the numbers; here as in the options one that is not finite becomes null.
        seconds: time spent in training.
        num_devices: how many were used.
    """

    results = {
        "experiment": experiment,
        "config": dict(config),
        "environment": environment(num_devices),
        "seconds": round(seconds, 1),
        "rows": [row._asdict() for row in rows],
    }
    results = json.loads(json.dumps(results), parse_constant=lambda name: None)  # NaN and Infinity are not JSON
    write_atomically(path, json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file; its rows are `Row`s.

    Raises:
        ResultsError: there is none, it is not JSON, or of another schema.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}. Run the experiment first.") from error
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON ({error}). Run the experiment again.") from error
    keys = {"experiment", "config", "environment", "seconds", "rows"}
    found = set(results) if isinstance(results, dict) else set()
    if found != keys or not isinstance(results["rows"], list):
        raise ResultsError(
            f"{path} is no results file of this version: expected the keys {sorted(keys)}, found {sorted(found)}. "
            "Run the experiment again."
        )
    needed = set(Row._fields) - set(Row._field_defaults)  # files of earlier versions lack some of the others
    for row in results["rows"]:
        if not isinstance(row, dict) or not needed <= set(row) <= set(Row._fields):
            raise ResultsError(
                f"{path} has a row of another schema: expected the fields {list(Row._fields)}, found {list(row)}. "
                "Run the experiment again."
            )
    return results | {"rows": [Row(**row) for row in results["rows"]]}


def markdown(results: Mapping[str, Any]) -> str:
    """Tables of a results file in Markdown: one for each setting and metric, methods down, adaptation steps across."""
    env = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    of_what = "training" if any(row.seeds for row in results["rows"]) else "measuring"
    effort = f"commit {env['git'] or 'unknown'}; {results['seconds']:,.0f} s of {of_what}."
    lines = [f"# {results['experiment']}", "", f"{env['device']}; {versions}; {effort}"]
    for setting, metric in dict.fromkeys((row.setting, row.metric) for row in results["rows"]):
        rows = [row for row in results["rows"] if (row.setting, row.metric) == (setting, metric)]
        by_step = " by number of adaptation steps" if _takes_steps(rows) else ""
        lines += ["", f"## {setting}: {metric}{by_step}", "", *_table(rows)]
    return "\n".join(lines) + "\n"


def cell(row: Row) -> str:
    """A number with its interval, as tables have it; or why there is none."""
    interval = "" if row.ci95 is None else f" ± {_number(row.ci95, like=row.mean)}"
    missing = "diverged" if row.seeds else row.note  # a benchmark says why it has no number
    return missing if row.mean is None else _number(row.mean) + interval


def trained_for(row: Row) -> str:
    """How long the method behind a number was trained, as tables say it."""
    seconds = "" if row.seconds is None else f", {row.seconds:,.0f} s"
    best = "" if row.best_update in (None, row.meta_updates) else f" (best at {row.best_update:,})"
    return f"{row.meta_updates:,} meta-updates{best}, {_plural(row.seeds, 'seed')}{seconds}"


def learning_curves(results: Mapping[str, Any], path: Path) -> None:
    """Draw metrics against adaptation steps, settings across and metrics down, with bands of 95 % confidence.

    The axis of a metric is logarithmic where positive values span more than two orders of magnitude.

    Args:
        results: as `read_results` returns them; nothing is drawn if no method takes steps.
        path: where to write the figure.
    """
    rows = results["rows"]
    if not _takes_steps(rows):
        return
    settings, metrics, methods = (list(dict.fromkeys(names)) for names in zip(*map(_group, rows), strict=True))
    figure = new_figure(1 + 4 * len(settings), 1 + 3 * len(metrics))
    panels = figure.subplots(len(metrics), len(settings), sharex=True, sharey="row", squeeze=False)
    for metric, line in zip(metrics, panels, strict=True):
        means = [row.mean for row in rows if row.metric == metric and row.mean is not None]
        scale = "log" if means and 0 < 100 * min(means) < max(means) else "linear"
        line[0].set(ylabel=metric, yscale=scale)
        for setting, axes in zip(settings, line, strict=True):
            for colour, method in enumerate(methods):
                _draw_curve(axes, [row for row in rows if _group(row) == (setting, metric, method)], f"C{colour}")
            axes.grid(alpha=0.3)
    for setting, top, bottom in zip(settings, panels[0], panels[-1], strict=True):
        top.set_title(setting)
        bottom.set_xlabel("adaptation steps")
        bottom.xaxis.get_major_locator().set_params(integer=True)
    legend_below(figure, panels[0, 0])
    figure.savefig(path, dpi=100)


def training_curves(directories: Mapping[str, Path], path: Path) -> None:
    """Draw the loss and the validation error of each method over its meta-updates.

    Args:
        directories: where the `metrics.jsonl` of each method lies, in the order that the methods have in other figures.
        path: where to write the figure; none is drawn if there is nothing to draw.
    """
    logs = {method: read_metrics(directory / "metrics.jsonl") for method, directory in directories.items()}
    names = [name for name in ("loss", "validation_error") if any(name in line for log in logs.values() for line in log)]
    if not names:
        return
    figure = new_figure(1 + 5 * len(names), 4)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for colour, (method, log) in enumerate(logs.items()):  # one without a log has its colour in other figures
            if points := [(line["update"], line[name]) for line in log if line.get(name) is not None]:
                marker = "." if len(points) == 1 else ""  # no line has one point
                axes.plot(*np.array(points).T, color=f"C{colour}", label=method, marker=marker)
        positive = any((line.get(name) or 0) > 0 for log in logs.values() for line in log)  # a validation error may be 0
        axes.set(xlabel="meta-updates", ylabel=name.replace("_", " "), yscale="log" if positive else "linear")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
    legend_below(figure, axes)
    figure.savefig(path, dpi=100)


def _group(row: Row) -> tuple[str, str, str]:
    return row.setting, row.metric, row.method


def _draw_curve(axes: Any, curve: Sequence[Row], colour: str) -> None:
    if len(curve) == 1 and curve[0].mean is not None:  # a method that does not adapt
        axes.axhline(curve[0].mean, color=colour, linestyle="--", label=curve[0].method)
    elif curve:  # a null becomes NaN, which is not drawn
        steps, mean, ci95 = (np.array([getattr(row, name) for row in curve], float) for name in ("step", "mean", "ci95"))
        axes.plot(steps, mean, color=colour, marker=".", label=curve[0].method)
        axes.fill_between(steps, mean - ci95, mean + ci95, color=colour, alpha=0.2)


def _takes_steps(rows: Sequence[Row]) -> bool:
    """Whether rows are of several numbers of adaptation steps; those of methods without, and of most benchmarks, are not."""
    return len({row.step for row in rows}) > 1


def _table(rows: Sequence[Row]) -> list[str]:
    steps = sorted({row.step for row in rows})
    if len(steps) > 6:  # the ends, and whatever was published
        steps = sorted({steps[0], steps[1], steps[-1]} | {row.step for row in rows if row.published is not None})
    trained = any(row.seeds for row in rows)  # a benchmark trains nothing
    columns = map(str, steps) if _takes_steps(rows) else [rows[0].metric]
    head = ["method", *columns, *(["trained for", "evaluated on"] if trained else [])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for key in dict.fromkeys((row.method, row.protocol) for row in rows):
        mine = {row.step: row for row in rows if (row.method, row.protocol) == key}
        first = next(iter(mine.values()))
        name = f"{first.method} ({first.note})" if first.note and (trained or first.mean is not None) else first.method
        cells = [_beside_published(mine[step]) if step in mine else "" for step in steps]
        scope = [trained_for(first), f"{first.tasks} tasks, {first.protocol} protocol"]
        lines.append("| " + " | ".join([name, *cells, *(scope if trained else [])]) + " |")
    if not trained:
        return [*lines, "", "; ".join(sorted({row.protocol for row in rows})) + "."]
    sources = sorted({row.source for row in rows if row.source})
    return [*lines, "", "Mean ± 95 % confidence interval" + "".join(f"; in brackets {source}" for source in sources) + "."]


def _beside_published(row: Row) -> str:
    return cell(row) if row.published is None else f"{cell(row)} ({row.published:g})"


def _number(value: float, *, like: float | None = None) -> str:
    """Three decimals below 10, else one; an interval has as many as its mean. Below 1e-4, powers of ten."""
    if like is None and 0 < abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value if like is None else like) < 10 else f"{value:.1f}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Make `report.md` and `learning_curves.png` beside each results file named on the command line."""
    paths = [Path(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    if not paths or any(str(path).startswith("-") for path in paths):
        print("usage: python -m mamljax.report OUT/results.json [...]", file=sys.stderr)
        return 2
    for path in paths:
        try:
            results = read_results(path)
        except ResultsError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        write_atomically(path.with_name("report.md"), markdown(results))
        learning_curves(results, path.with_name("learning_curves.png"))
        print(path.with_name("report.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
