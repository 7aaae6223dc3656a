"""The inner-steps benchmark at tiny size."""

import inner_steps
import pytest

from mamljax import report

TINY = ["--inner-steps", "1", "3", "--shots", "5", "--num-tasks", "2", "--hidden-sizes", "4", "--repeats", "1"]


def test_writes_time_and_memory_of_every_mode(tmp_path, capsys):
    assert inner_steps.main([*TINY, "--out", str(tmp_path)]) == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    assert {(row.method, row.step) for row in rows} == {(mode, steps) for mode in inner_steps.MODES for steps in (1, 3)}
    assert all(row.mean > 0 for row in rows)
    ratios = [row.mean for row in rows if row.method == "first_order" and "relative" in row.metric]
    assert ratios == [1.0] * 4
    assert (tmp_path / "inner_steps.png").exists()
    assert "time relative to first order" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--inner-steps", "--shots", "--num-tasks", "--repeats"])
def test_counts_are_positive(tmp_path, capsys, option):
    assert inner_steps.main([*TINY, option, "0", "--out", str(tmp_path / "run")]) == 2
    assert f"error: {option} must be a whole number of at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
