"""The benchmark of reinforcement learning's meta-updates at tiny size."""

import pytest
import rl_update

from mamljax import report

TINY = ["--tasks", "navigation", "--num-tasks", "2", "--trajectories", "3", "--horizon", "2", "--repeats", "1"]


def test_writes_time_and_gain_of_each(tmp_path):
    assert rl_update.main([*TINY, "--cg-steps", "2", "1", "--devices", "1", "--out", str(tmp_path)]) == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    two, one = ({row.metric: row.mean for row in rows if row.method.startswith(steps)} for steps in "21")
    assert two.keys() == one.keys() == {"seconds per meta-update", "fall of the loss in the first meta-update"}
    assert two["seconds per meta-update"] > 0
    alone = {row.method: row.mean for row in rows if row.method.endswith("alone")}
    assert alone.keys() == {"the environment alone", *(f"the products of {number} iterations alone" for number in (1, 2))}
    assert all(seconds > 0 for seconds in alone.values())
    assert two["fall of the loss in the first meta-update"] != one["fall of the loss in the first meta-update"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cg-steps", "0"], "--cg-steps must be a whole number of at least 1, got 0"),
        (["--devices", "99"], "99"),
        (["--num-tasks", "3", "--devices", "2"], "--num-tasks must be a multiple of --devices, got 3 tasks and 2 devices"),
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
