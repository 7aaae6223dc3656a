"""Results files and reports."""

import json

import numpy as np
import pytest

from mamljax import report
from mamljax.figures import new_figure
from mamljax.report import (
    ResultsError,
    Row,
    learning_curves,
    markdown,
    read_results,
    rows_over_steps,
    training_curves,
    write_results,
)

FIELDS = {"setting": "5-shot", "protocol": "paper", "metric": "mse", "tasks": 600, "seeds": 2, "meta_updates": 70_000}
SOURCE = "Finn et al. 2017, table 2"


def make_rows():
    maml = rows_over_steps([3.0, 0.5, 0.25], [0.1, 0.05, 0.01], published={1: 0.67}, source=SOURCE, method="maml", **FIELDS)
    oracle = rows_over_steps([0.002], [0.001], method="oracle", **FIELDS)
    lost = rows_over_steps([3.0, float("nan"), float("inf")], [0.1, float("nan"), float("nan")], method="lost", **FIELDS)
    return maml + oracle + lost


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "results.json"
    write_results(
        path,
        experiment="sinusoid",
        config={"limit": float("inf"), "lr": 0.1, "lrs": (0.1, float("nan"))},
        rows=make_rows(),
        seconds=12.345,
    )
    return path


def test_rows_of_each_step():
    first, second, third = make_rows()[:3]
    assert (first.step, second.step, third.step) == (0, 1, 2)
    assert (second.mean, second.ci95, second.published, second.source) == (0.5, 0.05, 0.67, SOURCE)
    assert (first.published, first.source) == (None, "")


def test_the_schema(path):
    text = path.read_text()
    results = json.loads(text, parse_constant=pytest.fail)  # no NaN or Infinity: those are not JSON
    assert set(results) == {"experiment", "config", "environment", "seconds", "rows"}
    assert set(results["environment"]) == {"device", "versions", "git"}
    assert {"jax", "python", "mamljax"} <= set(results["environment"]["versions"])
    assert results["config"] == {"limit": None, "lr": 0.1, "lrs": [0.1, None]}
    assert results["seconds"] == 12.3
    assert results["rows"][1] == {
        "method": "maml", "setting": "5-shot", "protocol": "paper", "metric": "mse", "step": 1, "mean": 0.5, "ci95": 0.05,
        "tasks": 600, "seeds": 2, "meta_updates": 70_000, "published": 0.67, "source": SOURCE, "note": "", "seconds": None,
        "best_update": None,
    }  # fmt: skip


def test_reads_files_of_earlier_versions(path):
    """Which lack what has come to the rows since."""
    results = json.loads(path.read_text())
    for row in results["rows"]:
        del row["seconds"], row["note"]
    path.write_text(json.dumps(results))
    assert read_results(path)["rows"][:4] == make_rows()[:4]


def test_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert report.environment()["git"] == ""


def test_round_trip(path):
    rows = read_results(path)["rows"]
    assert rows[:4] == make_rows()[:4]
    assert [row.mean for row in rows[4:]] == [3.0, None, None]


def test_table(path):
    text = markdown(read_results(path))
    assert "## 5-shot: mse by number of adaptation steps" in text
    assert "| method | 0 | 1 | 2 | trained for | evaluated on |" in text
    scope = "| 70,000 meta-updates, 2 seeds | 600 tasks, paper protocol |"
    assert f"| maml | 3.000 ± 0.100 | 0.500 ± 0.050 (0.67) | 0.250 ± 0.010 {scope}" in text
    assert f"| oracle | 0.002 ± 0.001 |  |  {scope}" in text
    assert f"| lost | 3.000 ± 0.100 | diverged | diverged {scope}" in text
    assert f"in brackets {SOURCE}." in text


def test_a_table_tells_the_time_of_training():
    row = Row("maml", **FIELDS, step=0, mean=1.0, ci95=0.1, seconds=1234.5)
    results = {"experiment": "x", "environment": {"device": "", "versions": {}, "git": ""}, "seconds": 1.0, "rows": [row]}
    assert "| 70,000 meta-updates, 2 seeds, 1,234 s |" in markdown(results)


@pytest.mark.parametrize(("best", "text"), [(None, ""), (60_000, " (best at 60,000)"), (70_000, "")])
def test_when_the_best_state_was(best, text):
    row = Row("maml", **FIELDS, step=0, mean=1.0, ci95=0.1, best_update=best)
    assert report.trained_for(row) == f"70,000 meta-updates{text}, 2 seeds"


def test_long_tables_show_the_ends_and_what_was_published():
    rows = rows_over_steps(np.arange(11.0), np.ones(11), published={5: 1.0}, source=SOURCE, method="maml", **FIELDS)
    results = {"experiment": "x", "environment": {"device": "", "versions": {}, "git": ""}, "seconds": 1.0, "rows": rows}
    assert "| method | 0 | 1 | 5 | 10 | trained for" in markdown(results)


def test_a_benchmark_trains_nothing():
    row = Row("mixed", "10 points", "median of 7", "ms", 1, 2.0, None, 25, seeds=0, meta_updates=0)
    results = {"experiment": "x", "environment": {"device": "", "versions": {}, "git": ""}, "seconds": 1.0, "rows": [row]}
    text = markdown(results)
    assert "## 10 points: ms\n\n| method | ms |\n|---|---|\n| mixed | 2.000 |\n\nmedian of 7." in text
    assert "1 s of measuring" in text
    assert "| mixed | 2.5e-12 |" in markdown({**results, "rows": [row._replace(mean=2.5e-12)]})


def test_figure(path, tmp_path):
    learning_curves(read_results(path), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_method_has_one_colour_in_all_figures(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    methods = ("maml", "random", "oracle")
    rows = [row for method in methods for row in rows_over_steps([1.0, 2.0], [0.1, 0.1], method=method, **FIELDS)]
    learning_curves({"rows": rows}, tmp_path / "learning.png")
    for method in ("maml", "oracle"):  # an untrained network leaves no log
        (tmp_path / method).mkdir()
        (tmp_path / method / "metrics.jsonl").write_text('{"update": 1, "loss": 2.0, "seconds": 1.0}\n')
    training_curves({method: tmp_path / method for method in methods}, tmp_path / "training.png")
    learning, training = ({line.get_label(): line.get_color() for line in figure.axes[0].lines} for figure in figures)
    assert training == {method: learning[method] for method in ("maml", "oracle")}
    assert len(set(learning.values())) == 3
    assert {line.get_marker() for line in figures[1].axes[0].lines} == {"."}  # or a single point would not be seen


def test_without_steps_there_is_no_figure(tmp_path):
    learning_curves({"rows": []}, tmp_path / "curves.png")
    learning_curves({"rows": rows_over_steps([1.0], [0.1], method="prototypical", **FIELDS)}, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*: No such file.*Run the experiment first"),
        ('{"experiment": ', "is not JSON"),
        ("[1, 2]", "no results file of this version.*found \\[\\]"),
        ('{"experiment": "x", "numbers": []}', "expected the keys .*'rows'.*found \\['experiment', 'numbers'\\]"),
        (
            '{"experiment": "x", "config": {}, "environment": {}, "seconds": 1, "rows": [{"method": "maml", "score": 1}]}',
            "a row of another schema: expected the fields .*found \\['method', 'score'\\]",
        ),
    ],
)
def test_another_schema(tmp_path, capsys, content, message):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ResultsError, match=message):
        read_results(path)
    assert report.main([str(path)]) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()


def test_command_line(path, tmp_path, capsys):
    assert report.main([str(path)]) == 0
    assert (tmp_path / "report.md").read_text() == markdown(read_results(path))
    assert (tmp_path / "learning_curves.png").exists()
    assert report.main([]) == 2
    assert "usage: python -m mamljax.report" in capsys.readouterr().err
