"""The benchmark of reinforcement learning's meta-updates at tiny size."""

import arithmetic
import optax
import pytest
import rl_update

from mamljax import report
from mamljax.rl.navigation import navigation

TINY = ["--tasks", "navigation", "--num-tasks", "2", "--trajectories", "3", "--horizon", "2", "--repeats", "1"]


def test_writes_time_and_gain_of_each(tmp_path):
    assert rl_update.main([*TINY, "--cg-steps", "2", "1", "--devices", "1", "--out", str(tmp_path)]) == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    two, one = ({row.metric: row.mean for row in rows if row.method.startswith(steps)} for steps in "21")
    assert two.keys() == one.keys() == {"seconds per meta-update", "fall of the loss in the first meta-update"}
    assert two["seconds per meta-update"] > 0
    alone = {row.method: row.mean for row in rows if row.method.endswith("alone")}
    products = {f"the products of {method} alone" for method in ("1 iterations", "2 iterations", "ProMP")}
    assert alone.keys() == {"the environment alone", *products}
    assert all(seconds > 0 for seconds in alone.values())
    promp = {row.metric: row.mean for row in rows if row.method == "ProMP"}
    assert promp.keys() == two.keys()
    assert promp["seconds per meta-update"] > 0
    assert two["fall of the loss in the first meta-update"] != one["fall of the loss in the first meta-update"]


def test_it_counts_the_products_of_each_iteration_and_one_evaluation_of_the_line_search():
    """Without iterations they are those of any optimiser, after which the learner itself evaluates the loss once."""
    sizes = {"trajectories": 3, "horizon": 2}
    one, two, three = (
        arithmetic.flops(rl_update.products_of_trpo(navigation(), cg_steps=steps, num_tasks=2, **sizes)) for steps in (1, 2, 3)
    )
    assert three - two == two - one > 0
    learner = rl_update.build_maml(navigation(), optax.sgd(0.1), **sizes)
    plain = arithmetic.flops(arithmetic.products(learner.update, *rl_update.first_update(learner, navigation(), 2)))
    assert one - (two - one) == plain


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
