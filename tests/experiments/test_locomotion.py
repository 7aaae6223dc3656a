"""The locomotion experiment at tiny size."""

import json
import sys

import jax
import jax.numpy as jnp
import locomotion
import numpy as np
import pytest
import reinforcement
import runner

from mamljax import report
from mamljax.rl.locomotion import TASKS
from mamljax.rl.rendering import RenderingError
from mamljax.run_directory import CheckpointError
from mamljax.types import State

TINY = (
    "--steps 1 --num-tasks 2 --trajectories 2 --horizon 3 --hidden-sizes 4 "
    "--eval-tasks 2 --eval-steps 1 --eval-trajectories 2 --tuning-lrs 0.1"
)


def main(*argv):
    return runner.main("locomotion", locomotion.PRESETS, locomotion.execute, [*TINY.split(), *map(str, argv)])


def test_an_untrained_policy(tmp_path, capsys, monkeypatch):
    pytest.importorskip("mujoco")
    monkeypatch.setattr(locomotion.Options, "horizon", 3)  # published returns are of so many steps
    assert main("--out", tmp_path, "--method", "random") == 0
    assert "no strip of frames: it has 8, and --horizon is 3" in capsys.readouterr().err
    rows = report.read_results(tmp_path / "results.json")["rows"]
    assert [(row.method, row.setting, row.step) for row in rows] == [
        ("random", "half_cheetah_velocity", step) for step in (0, 1)
    ]
    assert rows[0].published == -254.83
    assert all(-3 * 6 < row.mean < 0 for row in rows)  # a step costs the distance to at most 2 m/s, and the torque


def test_where_nothing_can_render_it_says_so(tmp_path, capsys, monkeypatch):
    pytest.importorskip("mujoco")
    drawn = []

    def render(task, positions, *, frames):
        drawn.append(np.asarray(positions))
        raise RenderingError("cannot render: tried nothing")

    monkeypatch.setattr(locomotion, "render_strip", render)
    options = runner.parse(locomotion.PRESETS, TINY.split())
    env = locomotion.locomotion(options.task)
    params = reinforcement.collector_of("maml", options, env)[0].init(jax.random.key(0))
    states = State(jax.tree.map(lambda leaf: leaf[None], params), ())
    trained = reinforcement.Trained(states, {}, 0.1, None, None, None)
    locomotion.draw_strip(options, env, "maml", trained, tmp_path / "strip.png")
    assert "no strip of frames: cannot render: tried nothing" in capsys.readouterr().err
    assert drawn[0].shape == (3, 9)  # horizon, and the positions of a half-cheetah
    assert jnp.isfinite(drawn[0]).all()


def test_without_mujoco(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    assert main("--out", tmp_path / "run") == 2
    assert 'pip install "mamljax[rl]"' in capsys.readouterr().err


def test_presets():
    assert locomotion.PRESETS.keys() == TASKS.keys() == locomotion.PUBLISHED.keys()
    for task, options in locomotion.PRESETS.items():
        assert (options.preset, options.task, options.out.name) == (task, task, task)
        assert (options.num_tasks, options.horizon, options.inner_lr, options.eval_steps) == (40, 200, 0.1, 3)
        gae_lambda = 0.95 if task == "half_cheetah_direction" else 0.98
        assert (options.gae_lambda, options.inner_objective, options.max_kl) == (gae_lambda, "likelihood_ratio", 0.02)
    assert runner.parse(locomotion.PRESETS, ["--preset", "ant_direction"]).trajectories == 40


@pytest.mark.parametrize(("task", "normalised"), list(zip(TASKS, (0.92, 0.70, 0.93, 0.95), strict=True)))
def test_published_numbers(task, normalised):
    assert reinforcement.normalised_published("maml", locomotion.PUBLISHED[task])[3] == normalised


def test_a_run_from_before_the_inner_objective_goes_on_as_it_began(tmp_path):
    options = runner.parse(locomotion.PRESETS, ["--out", str(tmp_path), "--inner-objective", "log_prob"])
    runner.Run("locomotion", options)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["inner_objective"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoints" / "maml" / "steps" / "5").mkdir(parents=True)  # it has trained
    runner.Run("locomotion", options)
    with pytest.raises(CheckpointError, match="inner_objective"):
        runner.Run("locomotion", runner.parse(locomotion.PRESETS, ["--out", str(tmp_path)]))


def test_an_unknown_task(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main("--out", tmp_path / "run", "--preset", "humanoid")
    assert stop.value.code == 2
    assert "humanoid" in capsys.readouterr().err
