"""The navigation experiment as a user runs it, at tiny size."""

import dataclasses
import json
from typing import get_args

import jax
import jax.numpy as jnp
import navigation
import numpy as np
import orbax.checkpoint as ocp
import pytest
import reinforcement
import runner

from mamljax import report
from mamljax.figures import new_figure
from mamljax.record import read_metrics

TINY = {
    "--steps": "4",
    "--num-tasks": "3",
    "--trajectories": "2",
    "--horizon": "4",
    "--hidden-sizes": "4",
    "--eval-tasks": "5",
    "--eval-steps": "2",
    "--eval-trajectories": "3",
    "--log-every": "2",
    "--validate-every": "2",
}
ARGUMENTS = [word for option in TINY.items() for word in option] + ["--tuning-lrs", "0.01", "0.1"]


def main(*argv):
    return runner.main("navigation", navigation.PRESETS, navigation.execute, [*ARGUMENTS, *map(str, argv)])


def checkpoint(out, method):
    """All that the newest checkpoint holds, as bytes."""
    newest = max((out / "checkpoints" / method / "steps").iterdir(), key=lambda path: int(path.name))
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(newest.resolve() / "tree")
    return int(newest.name), [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    assert main("--out", out, "--seeds", 2, "--method", "maml", "promp", "random", "pretrained", "oracle") == 0
    return out


def test_writes_what_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    figures = {"learning_curves.png", "training_curves.png", "paths.png"}
    assert names == {"checkpoints", "config.json", "lock", "report.md", "results.json"} | figures
    for name in figures:
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    log = read_metrics(finished / "checkpoints" / "maml" / "metrics.jsonl")
    assert [line["update"] for line in log] == [2, 4]
    assert {"return_before", "return_after", "kl", "unstable"} <= log[0].keys()
    assert all(line["validation_error"] > 0 for line in log)  # minus a return


def test_rows(finished):
    rows = report.read_results(finished / "results.json")["rows"]
    returns = {(row.method, row.step): row for row in rows if row.metric == "return"}
    adapting = {(method, step) for method in ("maml", "promp", "random", "pretrained") for step in range(3)}
    assert returns.keys() == {*adapting, ("oracle", 0)}
    assert {row.metric for row in rows} == {"return"}  # nothing was unstable, and the oracle has not learned anything yet
    assert {row.published for row in rows} == {None}  # of returns over so few steps
    assert all(returns[method, 1].note in ("step size 0.01", "step size 0.1") for method in ("random", "pretrained"))
    assert returns["maml", 1].note == ""
    assert [returns[method, 0].meta_updates for method in ("maml", "random", "oracle")] == [4, 0, 4]
    assert [returns[method, 0].seconds is None for method in ("maml", "random")] == [False, True]
    assert all(row.tasks == 5 and row.seeds == 2 for row in rows)


def test_step_sizes_are_halved_after_the_first():
    rule, steps = reinforcement.rule_of("maml", 0.5), []
    state = rule.init(np.float32(0))
    for _ in range(3):
        step, state = rule.update(np.float32(1), state)
        steps.append(float(step))
    assert steps == [-0.5, -0.25, -0.25]


@pytest.mark.parametrize("name", ["gae_lambda", "discount", "promp_kl_weight"])
def test_factors_and_weights_may_be_zero_but_nothing_else(name):
    dataclasses.replace(navigation.PRESETS["paper"], **{name: 0.0}).check()
    with pytest.raises(ValueError, match="--max-kl must be positive"):
        dataclasses.replace(navigation.PRESETS["paper"], max_kl=0.0).check()


def trained(method, returns, unstable=0.0):
    """A method as if trained from two seeds, with these returns [S + 1] on all of three tasks, and 1 more from the second."""
    values = np.broadcast_to(np.array(returns), (2, 3, len(returns))) + np.array([0.0, 1.0])[:, None, None]
    return {
        method: reinforcement.Trained(
            states=(),
            effort={"seeds": 2, "meta_updates": 10},
            lr=0.5,
            returns=values,
            first_returns=values - 1 if unstable else values,
            unstable=np.full_like(values, unstable),
        )
    }


def test_normalised_returns_and_unstable_trajectories():
    methods = {**trained("maml", [0.0, 6.0], 0.25), **trained("pretrained", [0.0, 2.0]), **trained("oracle", [10.0])}
    fields = {"setting": "s", "protocol": "p", "tasks": 3}
    rows = reinforcement.rows_of(methods, navigation.PUBLISHED, source="a paper", **fields)
    mean = {(row.method, row.metric, row.step): row.mean for row in rows}
    assert mean["maml", "return", 1] == 6.5
    assert mean["maml", "normalised return", 0] == 0
    assert mean["maml", "normalised return", 1] == 0.5
    assert mean["maml", "share of unstable trajectories", 1] == 0.25
    assert mean["maml", reinforcement.FIRST, 1] == 5.5  # only where some trajectories end early
    assert len(rows) == 2 + 2 + 1 + 2 + 2 + 2
    published = [row.published for row in rows if row.metric == "normalised return"]
    np.testing.assert_allclose(published, [0.01, 0.46])  # of the paper's -11.68, -19.73 and -2.29 after one step
    assert reinforcement.normalised_published("maml", navigation.PUBLISHED)[3] == 0.85
    assert reinforcement.normalised_published("fomaml", navigation.PUBLISHED) == {}


@pytest.mark.parametrize("method", get_args(reinforcement.Method))
def test_every_method_can_be_built(method):
    options = runner.parse(navigation.PRESETS, ARGUMENTS)
    env = navigation.navigation()
    learner = reinforcement.build_learner(method, options, env)
    key = jax.random.key(0)
    state = jax.eval_shape(learner.init, key)
    policy = state.params["network"] if method == "context" else state.params
    seen = {"oracle": 4, "context": 2 + options.context_size}.get(method, 2)
    assert policy["MLP_0"]["Dense_0"]["kernel"].shape == (seen, 4)
    after, _ = jax.eval_shape(learner.update, key, state, jax.ShapeDtypeStruct((3, 2), "float32"))
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_options_of_promp_reach_it(monkeypatch):
    monkeypatch.setattr(reinforcement, "promp", lambda collector, **settings: settings)
    flags = ["--promp-steps", "7", "--promp-clip", "0.1", "--promp-kl-weight", "0", "--inner-steps", "2", "--meta-lr", "0.5"]
    flags += ["--multi-step-loss"]
    monkeypatch.setattr(reinforcement.optax, "adam", lambda step_size: step_size)
    options = runner.parse(navigation.PRESETS, ARGUMENTS + flags)
    settings = reinforcement.build_learner("promp", options, navigation.navigation())
    expected = {"outer_steps": 7, "clip": 0.1, "kl_weight": 0.0, "inner_steps": 2, "eval_steps": 2, "multi_step_loss": True}
    assert settings["tx"] == 0.5
    assert settings.items() >= expected.items()


def test_without_a_step_size_of_finite_returns_it_says_so(tmp_path, capsys):
    assert main("--out", tmp_path, "--method", "random", "--tuning-lrs", 1e30, 1e20) == 2
    assert "none of --tuning-lrs, (1e+30, 1e+20), has finite returns. Give smaller ones." in capsys.readouterr().err


@pytest.mark.parametrize(("oracle", "expected"), [(-1.0, [0.25, 0.75]), (-20.0, None)])
def test_returns_are_normalised_where_the_oracle_is_better(oracle, expected):
    """One seed, two tasks, before and after one step: MAML from -7 to -3, the pretrained policy at -9 before and after."""

    def trained(*means):
        returns = np.array(means) + np.array([[[1.0], [-1.0]]])
        return reinforcement.Trained(None, {"seeds": 1, "meta_updates": 1}, 0.1, returns, returns, np.zeros_like(returns))

    methods = {"maml": trained(-7.0, -3.0), "pretrained": trained(-9.0, -9.0), "oracle": trained(oracle, oracle)}
    rows = reinforcement.rows_of(methods, {}, setting="navigation", protocol="paper", source="", tasks=2)
    found = [row.mean for row in rows if row.metric == "normalised return"]
    assert found == ([] if expected is None else pytest.approx(expected))


def test_a_bad_option_of_the_last_method_is_said_before_the_first_is_trained(tmp_path, capsys):
    assert main("--out", tmp_path, "--method", "maml", "promp", "--promp-clip", 1.5) == 2
    assert "clip must lie strictly between 0 and 1, got 1.5" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_a_context_is_adapted_and_the_network_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(navigation.Options, "horizon", 4)  # published returns are of so many steps
    assert main("--out", tmp_path, "--method", "context", "--context-size", 3) == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    assert [row.published for row in rows if row.metric == "return"] == [-42.42, -13.9, -5.17]
    options = runner.parse(navigation.PRESETS, ARGUMENTS)
    model, _ = reinforcement.collector_of("context", options, navigation.navigation())
    params = model.init(jax.random.key(0))
    rule = reinforcement.rule_of("context", 0.5)
    changes, _ = rule.update(jax.tree.map(jnp.ones_like, params), rule.init(params), params)
    np.testing.assert_allclose(changes["context"], -0.5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(changes["network"]))


def test_returns_are_no_better_than_the_shortest_way(finished):
    """From the centre of the square a goal is 0.38 away in the mean, 0.1 of it covered by the first of four steps."""
    rows = report.read_results(finished / "results.json")["rows"]
    assert all(-4 * 1.2 < row.mean < -0.2 for row in rows if row.metric == "return")


def test_stopped_it_goes_on_to_the_bit(finished, tmp_path):
    def train(steps, **changes):
        words = [*ARGUMENTS, "--seeds", "2", "--out", str(tmp_path), "--steps", str(steps)]
        options = dataclasses.replace(runner.parse(navigation.PRESETS, words), **changes)
        env, run = navigation.navigation(), runner.Run("navigation", options)
        return reinforcement.train("maml", reinforcement.build_learner("maml", options, env), options, run, env)[1]

    assert train(4, max_minutes=1e-9) == 0
    assert train(2) == 2
    assert checkpoint(tmp_path, "maml")[0] == 2
    assert train(4) == 4
    assert checkpoint(tmp_path, "maml") == checkpoint(finished, "maml")


def test_the_corrected_protocol_has_nothing_published(tmp_path):
    assert main("--out", tmp_path, "--method", "random", "--protocol", "corrected") == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    assert {(row.method, row.protocol, row.published) for row in rows} == {("random", "corrected", None)}
    assert {path.name for path in tmp_path.glob("*.png")} == {"learning_curves.png"}


def test_a_single_line_of_a_log_is_seen(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(reinforcement, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    for method, lines in (("maml", 1), ("promp", 2)):
        (tmp_path / method).mkdir()
        text = "".join(
            json.dumps({"update": number, "seconds": 1, "return_before": -2, "return_after": -1}) + "\n"
            for number in range(lines)
        )
        (tmp_path / method / "metrics.jsonl").write_text(text)
    methods = ("maml", "random", "promp")
    reinforcement.draw_training({method: tmp_path / method for method in methods}, tmp_path / "training.png")
    assert [(line.get_marker(), line.get_color()) for line in figures[0].axes[0].lines] == [(".", "C0")] * 2 + [("", "C2")] * 2


def test_another_configurations_directory(finished, capsys):
    assert main("--out", finished, "--seeds", 2, "--inner-lr", 0.02) == 2
    assert "it has {'inner_lr': 0.5}, this one {'inner_lr': 0.02}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--horizon", "0"], "--horizon must be a whole number of at least 1, got 0."),
        (["--trajectories", "-3"], "--trajectories must be a whole number of at least 1, got -3."),
        (["--num-tasks", "0"], "--num-tasks must be a whole number of at least 1, got 0."),
        (["--max-kl", "-0.01"], "--max-kl must be positive and finite, got -0.01."),
        (["--damping", "0"], "--damping must be positive and finite, got 0.0."),
        (["--discount", "-1"], "--discount must be at least 0 and finite, got -1.0."),
        (["--gae-lambda", "1.5"], "gae_lambda must lie in [0, 1], got 1.5."),
    ],
)
def test_bad_options(tmp_path, capsys, arguments, message):
    assert main("--out", tmp_path / "run", *arguments) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_the_learner_gets_the_inner_objective(monkeypatch):
    given = {}
    monkeypatch.setattr(reinforcement, "maml_rl", lambda *arguments, **settings: given.update(settings))
    options = runner.parse(navigation.PRESETS, ["--inner-objective", "likelihood_ratio"])
    reinforcement.build_learner("maml", options, navigation.navigation())
    assert given["inner_objective"] == "likelihood_ratio"


def test_presets_and_help(capsys):
    default = runner.parse(navigation.PRESETS, [])
    assert (default.method[0], default.inner_steps, default.gae_lambda, default.protocol) == ("promp", 2, 0.95, "paper")
    assert default.multi_step_loss
    multi_step = runner.parse(navigation.PRESETS, ["--preset", "multi_step"])
    assert (multi_step.method[0], multi_step.inner_steps, multi_step.multi_step_loss) == ("maml", 3, True)
    paper = runner.parse(navigation.PRESETS, ["--preset", "paper"])
    settings = (
        paper.inner_steps,
        paper.steps,
        paper.num_tasks,
        paper.trajectories,
        paper.horizon,
        paper.inner_lr,
        paper.max_kl,
    )
    assert settings == (1, 100, 20, 20, 100, 0.5, 0.01)
    assert (paper.multi_step_loss, paper.inner_objective, paper.gae_lambda) == (False, "log_prob", 1.0)
    assert runner.parse(navigation.PRESETS, ["--preset", "quick"]).steps < 100
    assert runner.parse(navigation.PRESETS, ["--preset", "quick", "--preset=paper"]) == paper
    assert len({options.out for options in navigation.PRESETS.values()}) == len(navigation.PRESETS)
    with pytest.raises(SystemExit) as stop:
        runner.parse(navigation.PRESETS, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(f"--{field.replace('_', '-')}" in text for field in navigation.Options.__dataclass_fields__)
