"""The benchmark of reinforcement learning's meta-updates at tiny size."""

import pytest
import rl_update

from mamljax import report

TINY = ["--tasks", "navigation", "--num-tasks", "2", "--trajectories", "3", "--horizon", "2", "--repeats", "1"]


def test_writes_time_and_gain_of_each_share(tmp_path):
    assert rl_update.main([*TINY, "--curvature-every", "1", "2", "--devices", "1", "--out", str(tmp_path)]) == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    of_all, of_one = (
        {row.metric: row.mean for row in rows if share in row.method} for share in ("of all tasks", "of a task in 2")
    )
    assert of_all.keys() == of_one.keys() == {"seconds per meta-update", "fall of the loss in the first meta-update"}
    assert of_all["seconds per meta-update"] > 0
    assert of_all["fall of the loss in the first meta-update"] != of_one["fall of the loss in the first meta-update"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--curvature-every", "0"], "--curvature-every must be a whole number of at least 1, got 0"),
        (["--devices", "99"], "99"),
    ],
)
def test_bad_options(tmp_path, capsys, arguments, message):
    assert rl_update.main([*TINY, *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_simulator_is_one_error(tmp_path, capsys, monkeypatch):
    def locomotion(name):
        raise ImportError("MuJoCo is not installed")

    monkeypatch.setattr(rl_update, "locomotion", locomotion)
    assert rl_update.main(["--tasks", "ant_velocity", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: MuJoCo is not installed\n"
