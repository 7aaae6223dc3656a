"""How every benchmark ends when it is stopped, or cannot begin."""

import dataclasses
from pathlib import Path

import harness

from mamljax import report


@dataclasses.dataclass(frozen=True)
class Options:
    """Nothing to measure."""

    out: Path
    """Directory for results.json."""


def stopped(options):
    raise KeyboardInterrupt


def test_ctrl_c_is_one_line(tmp_path, capsys):
    assert harness.main("nothing", Options, stopped, ["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.startswith("stopped. Nothing was written")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_shown(tmp_path, capsys):
    """And not lost with all that was measured."""
    row = report.Row("a method", "a setting", "", "milliseconds", 0, 12.5, tasks=1, **harness.UNTRAINED | {"ci95": None})

    def measure(options):
        (tmp_path / "results.json").mkdir()  # a file cannot take its place
        return [row]

    assert harness.main("something", Options, measure, ["--out", str(tmp_path)]) == 2
    out, errors = capsys.readouterr()
    assert "| a method | 12.5 |" in out
    assert errors.startswith(f"error: cannot write to {tmp_path}: ")


def test_there_may_be_no_limit_of_time():
    for seconds in (0, float("inf")):
        with harness.time_limit(seconds):
            pass


def test_a_file_in_the_way_is_one_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert harness.main("nothing", Options, stopped, ["--out", str(tmp_path / "file")]) == 2
    assert "error: cannot write to" in capsys.readouterr().err
