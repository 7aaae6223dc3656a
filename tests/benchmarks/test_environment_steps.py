"""The benchmark of environment steps at tiny size."""

import pytest

pytest.importorskip("mujoco")
pytest.importorskip("gymnasium")

import environment_steps

from mamljax import report

TINY = ["--num-tasks", "2", "--trajectories", "2", "--horizon", "3", "--repeats", "1", "--engines", "mujoco"]


def test_writes_a_row_of_each(tmp_path):
    assert environment_steps.main([*TINY, "--tasks", "half_cheetah_velocity", "--out", str(tmp_path)]) == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    assert [row.metric for row in rows] == ["environment steps per second", "environment steps per second of processor time"]
    assert all(row.tasks == 2 and row.mean > 0 for row in rows)


def test_bad_options(tmp_path, capsys):
    assert environment_steps.main([*TINY, "--tasks", "walker", "--out", str(tmp_path)]) == 2
    assert "error: task must be one of half_cheetah_velocity" in capsys.readouterr().err
    assert environment_steps.main(["--horizon", "0", "--out", str(tmp_path)]) == 2
    assert "error: --horizon must be a whole number of at least 1, got 0" in capsys.readouterr().err
