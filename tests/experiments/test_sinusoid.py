"""The sinusoid experiment as a user runs it, at tiny size."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import runner
import sinusoid

from mamljax import report
from mamljax.record import read_metrics

SCRIPT = Path(__file__).parents[2] / "experiments" / "sinusoid.py"
COUNTS = ["steps", "seeds", "num-tasks", "shots", "queries", "inner-steps", "eval-shots", "eval-steps", "hidden-sizes"]
TINY = [
    "--steps",
    "20",
    "--num-tasks",
    "2",
    "--hidden-sizes",
    "4",
    "--eval-tasks",
    "4",
    "--eval-queries",
    "3",
    "--eval-steps",
    "2",
    "--eval-shots",
    "5",
    "--tuning-lrs",
    "0.001",
    "0.01",
    "--log-every",
    "10",
    "--validate-every",
    "10",
]


def main(*argv):
    return runner.main("sinusoid", sinusoid.PRESETS, sinusoid.execute, [*TINY, *map(str, argv)])


def results_of(out):
    """The results file without its times and place."""
    results = json.loads((out / "results.json").read_text())
    del results["seconds"], results["config"]["out"]
    for row in results["rows"]:
        del row["seconds"]
    return results


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    assert main("--out", out) == 0
    return out


def test_reptile_has_a_tuned_step_size_in_evaluation(tmp_path):
    assert main("--preset", "reptile", "--inner-steps", 3, "--batch-size", 2, "--out", tmp_path) == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    assert {row.method for row in rows} == {"reptile"}
    assert all(row.note.startswith("step size 0.0") and row.mean > 0 for row in rows)


def test_step_sizes_with_which_everything_diverges_are_refused(tmp_path, capsys):
    assert main("--method", "random", "--tuning-lrs", 1e30, 1e32, "--out", tmp_path) == 2
    assert "none of --tuning-lrs, (1e+30, 1e+32), has finite errors. Give smaller ones." in capsys.readouterr().err


def test_a_run_of_a_version_with_fewer_options_goes_on(tmp_path, capsys):
    assert main("--out", tmp_path, "--method", "pretrained") == 0
    config = json.loads((tmp_path / "config.json").read_text())
    older = {name: value for name, value in config.items() if name not in ("batch_size", "task_steps", "penalty")}
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert main("--out", tmp_path, "--method", "pretrained") == 0
    assert main("--out", tmp_path, "--method", "pretrained", "--penalty", 0.3) == 2
    assert "it has {'penalty': 0.1}, this one {'penalty': 0.3}" in capsys.readouterr().err


def test_the_multi_task_baselines(tmp_path):
    assert main("--preset", "multi_task", "--task-steps", 3, "--out", tmp_path) == 0
    rows = {(row.method, row.step): row for row in report.read_results(tmp_path / "results.json")["rows"]}
    assert {method for method, _ in rows} == {"multi_task", "multi_task_norm", "multi_task_mean"}
    assert rows["multi_task_mean", 1].published == 2.91
    assert len({row.mean for row in rows.values()}) == len(rows)
    height = int.from_bytes((tmp_path / "fits.png").read_bytes()[20:24])
    assert height == 1000  # of three rows of curves


def test_writes_what_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {"checkpoints", "config.json", "fits.png", "learning_curves.png", "lock", "report.md", "results.json"}
    results = report.read_results(finished / "results.json")
    assert results["experiment"] == "sinusoid"
    rows = {(row.method, row.step): row for row in results["rows"]}
    adapting = ("maml", "fomaml", "pretrained", "random")
    assert rows.keys() == {(method, step) for method in adapting for step in range(3)} | {("oracle", 0)}
    assert rows["maml", 1].published == 0.67
    assert rows["pretrained", 1].published == 2.41
    assert rows["random", 1].note in ("step size 0.001", "step size 0.01")
    assert {row.meta_updates for row in results["rows"]} == {0, 20}
    assert all(row.seconds is None if row.method == "random" else row.seconds > 0 for row in results["rows"])
    assert all(np.isfinite(row.mean) and row.tasks == 4 and row.seeds == 1 for row in results["rows"])
    for name in ("fits.png", "learning_curves.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert [line["update"] for line in read_metrics(finished / "checkpoints" / "maml" / "metrics.jsonl")] == [10, 20]


def test_first_order_learns_something_else_than_maml(finished):
    rows = {(row.method, row.step): row.mean for row in report.read_results(finished / "results.json")["rows"]}
    assert rows["maml", 0] != rows["fomaml", 0]


def test_same_seed_same_results_another_seed_others(finished, tmp_path):
    assert main("--out", tmp_path / "same") == 0
    assert results_of(tmp_path / "same") == results_of(finished)
    assert main("--out", tmp_path / "other", "--seed", 1, "--method", "maml") == 0
    other = results_of(tmp_path / "other")
    assert other["config"]["seed"] == 1
    means = [row["mean"] for row in results_of(finished)["rows"] if row["method"] == "maml"]
    assert [row["mean"] for row in other["rows"]] != means


def test_the_same_command_again_trains_nothing_more(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("checkpoints/*/steps/*")}
    results = results_of(finished)
    assert main("--out", finished) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("checkpoints/*/steps/*")} == before
    assert results_of(finished) == results


def test_several_seeds(tmp_path):
    assert main("--out", tmp_path, "--seeds", 3, "--method", "maml", "oracle") == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    assert {row.method for row in rows} == {"maml", "oracle"}
    assert all(row.seeds == 3 and row.ci95 > 0 for row in rows)


def test_protocols_differ_in_how_weights_begin(tmp_path):
    """The authors' begin with outputs of next to nothing: 0.01^3 times sizes of about 5, 40 and 40."""
    task = sinusoid.sinusoid(shots=1, queries=50)(jax.random.key(0))
    largest = {}
    for protocol in ("paper", "corrected"):
        model = sinusoid.network(dataclasses.replace(sinusoid.PRESETS["paper"], protocol=protocol))
        largest[protocol] = float(np.abs(model.apply(model.init(jax.random.key(1)), task.query.x)).max())
    assert largest["paper"] < 0.01
    assert largest["corrected"] > 0.1
    assert main("--out", tmp_path, "--protocol", "paper", "--method", "random") == 0
    assert {row.protocol for row in report.read_results(tmp_path / "results.json")["rows"]} == {"paper"}


def test_presets_do_not_share_a_directory():
    assert len({options.out for options in sinusoid.PRESETS.values()}) == len(sinusoid.PRESETS)


def test_what_is_wrong_with_one_method_is_said_before_another_is_trained(tmp_path, capsys):
    assert main("--out", tmp_path, "--method", "maml", "reptile") == 2
    assert "error: inner_steps must be a whole number of at least 2, got 1" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "lock"}
    assert main("--out", tmp_path, "--method", "random", "reptile", "--inner-steps", 2, "--steps", 10) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "random", "random"], "--method must not have the same value twice, got random random."),
        (["--eval-shots", 5, 5], "--eval-shots must not have the same value twice, got 5 5."),
        (["--num-tasks", 10**20], f"--num-tasks must be below 2**31, got {10**20}."),
    ],
)
def test_options_out_of_range_leave_nothing(tmp_path, capsys, arguments, message):
    assert main("--out", tmp_path / "run", *arguments) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_seeds_are_31_bits(tmp_path, capsys):
    for seed, message in ((-1, "must be a whole number of at least 0, got -1"), (2**31, f"must be below 2**31, got {2**31}")):
        assert main("--out", tmp_path / "run", "--seed", seed) == 2
        assert f"error: --seed {message}" in capsys.readouterr().err
    run = runner.Run("sinusoid", dataclasses.replace(sinusoid.PRESETS["paper"], out=tmp_path / "run", seed=2**31 - 1, seeds=2))
    assert (run.keys == jax.vmap(jax.random.key)(np.array([2**31 - 1, 2**31], np.uint32))).all()


def test_errors_of_the_runtime(tmp_path, capsys):
    """To run out of memory is told in a line; what nothing is known of, by its traceback."""

    def run(message):
        def execute(options, run):
            raise jax.errors.JaxRuntimeError(message)

        return runner.main("sinusoid", sinusoid.PRESETS, execute, ["--out", str(tmp_path)])

    assert run("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nand more") == 2
    expected = (
        "error: out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.). Lower --chunk-size, where there is one"
    )
    assert expected in capsys.readouterr().err
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run("INTERNAL: something")


def test_time_limit_reports_what_there_is(tmp_path, capsys):
    assert main("--out", tmp_path, "--method", "maml", "fomaml", "--steps", 10**8, "--max-minutes", 0.05) == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    assert {row.method for row in rows} == {"maml"}
    assert 0 < rows[0].meta_updates < 10**8
    output = capsys.readouterr().out
    assert f"maml: time ran out after {rows[0].meta_updates:,} of 100,000,000 meta-updates" in output
    assert "fomaml: time ran out after 0 of 100,000,000 meta-updates" in output


def test_preset():
    assert runner.parse(sinusoid.PRESETS, []) == sinusoid.PRESETS["paper"]
    assert runner.parse(sinusoid.PRESETS, ["--preset", "quick"]) == sinusoid.PRESETS["quick"]
    assert runner.parse(sinusoid.PRESETS, ["--preset=quick", "--steps", "7"]).steps == 7
    paper = sinusoid.PRESETS["paper"]
    settings = (paper.steps, paper.num_tasks, paper.shots, paper.queries, paper.inner_steps, paper.meta_lr, paper.hidden_sizes)
    assert settings == (70_000, 25, 10, 10, 1, 1e-3, (40, 40))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "protonet"], "protonet"),
        (["--preset", "best"], "best"),
        (["--inner-rate", "0.1"], "--inner-rate"),
        (["--steps", "many"], "many"),
    ],
)
def test_malformed_command_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main("--out", tmp_path / "run", *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_positive(tmp_path, capsys, name):
    assert main("--out", tmp_path / "run", f"--{name}", 0) == 2
    assert f"error: --{name} must be a whole number of at least 1, got 0." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["inner-lr", "meta-lr", "tuning-lrs", "max-minutes"])
@pytest.mark.parametrize("value", ["-0.1", "nan"])
def test_sizes_are_positive(tmp_path, capsys, name, value):
    assert main("--out", tmp_path / "run", f"--{name}", value) == 2
    assert f"error: --{name} must be positive" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_devices_share_the_tasks(finished, tmp_path):
    """The same up to rounding, and a directory goes on with another number of devices."""
    out = tmp_path / "run"
    assert main("--out", out, "--method", "maml", "--devices", 2, "--steps", 10) == 0
    assert main("--out", out, "--method", "maml") == 0
    alone = {(row.method, row.step): row.mean for row in report.read_results(finished / "results.json")["rows"]}
    for row in report.read_results(out / "results.json")["rows"]:
        np.testing.assert_allclose(row.mean, alone[row.method, row.step], rtol=1e-3)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (0, "--devices must be a whole number of at least 1"),
        (9, "9 devices were asked for"),
        (4, "--num-tasks must be a multiple of the 4 devices, got"),
    ],
)
def test_devices_that_cannot_be(tmp_path, capsys, devices, message):
    assert main("--out", tmp_path / "run", "--devices", devices) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_another_configurations_directory(finished, capsys):
    results = results_of(finished)
    assert main("--out", finished, "--inner-lr", 0.02) == 2
    error = capsys.readouterr().err
    assert "holds a run of another configuration: it has {'inner_lr': 0.001}, this one {'inner_lr': 0.02}" in error
    assert results_of(finished) == results


def test_a_directory_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main("--out", tmp_path / "file" / "run") == 2
    assert "error: cannot write to" in capsys.readouterr().err


@pytest.mark.parametrize("slip", [lambda: dict([(1,)]), lambda: open("nowhere")])  # noqa: SIM115
def test_a_slip_in_the_code_keeps_its_traceback(tmp_path, slip):
    """What no option is to blame for is not made one line."""
    with pytest.raises((ValueError, FileNotFoundError)):
        runner.main("sinusoid", sinusoid.PRESETS, lambda options, run: slip(), ["--out", str(tmp_path)])


def test_divergence(tmp_path, capsys):
    assert main("--out", tmp_path, "--inner-lr", 1e30, "--method", "maml") == 2
    assert "at meta-update" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def parameters(out, method="maml"):
    """All that the newest checkpoint holds, as bytes."""
    (newest, *_) = sorted((out / "checkpoints" / method / "steps").iterdir(), key=lambda path: -int(path.name))
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(newest.resolve() / "tree")
    return int(newest.name), [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_undisturbed(tmp_path):
    arguments = [*TINY, "--method", "maml", "--steps", "20000", "--log-every", "500"]
    arguments += ["--validate-every", "5000", "--checkpoint-seconds", "0.1"]
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def start(out):
        command = [sys.executable, SCRIPT, *arguments, "--out", out]
        with (tmp_path / "stderr").open("a") as stderr:
            return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)

    assert start(tmp_path / "straight").wait() == 0
    generator = random.Random(0)
    log = tmp_path / "killed" / "checkpoints" / "maml" / "metrics.jsonl"
    for earliest in (1_000, 10_000):
        process = start(tmp_path / "killed")
        while process.poll() is None and not any(line["update"] >= earliest for line in read_metrics(log)):
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    process = start(tmp_path / "killed")
    assert process.wait() == 0, (tmp_path / "stderr").read_text()
    assert parameters(tmp_path / "killed") == parameters(tmp_path / "straight")
    assert results_of(tmp_path / "killed") == results_of(tmp_path / "straight")


def test_ctrl_c_outside_of_training_ends_in_good_order(tmp_path):
    """While it evaluates, in a process of its own: JAX may crash when it is left in the middle of a program."""
    command = [sys.executable, SCRIPT, *TINY, "--method", "random", "--eval-tasks", "300000", "--out", tmp_path / "run"]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a script ignores it
    try:
        with (tmp_path / "stderr").open("w") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    finally:
        signal.signal(signal.SIGINT, handler)
    while process.poll() is None and not (tmp_path / "run" / "config.json").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    seen, deadline = -1, time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        swallowed = (tmp_path / "stderr").read_text().count("Exception ignored")  # by JAX's callback of the garbage collector
        if swallowed > seen:
            process.send_signal(signal.SIGINT)
            seen = swallowed
        time.sleep(0.1)
    process.kill()
    assert process.wait() == 130
    assert "The same command goes on from there." in (tmp_path / "stderr").read_text()


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        runner.parse(sinusoid.PRESETS, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in sinusoid.Options.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text
    assert text.count("(default:") >= len(sinusoid.Options.__dataclass_fields__)


def test_another_command_is_kept_out_from_the_beginning(tmp_path, capsys):
    """Before the first has left more than its options, which would else be replaced."""

    def execute(options, run):
        assert main("--out", tmp_path, "--inner-lr", 0.05) == 2
        assert f"error: another process is training in {tmp_path}. Wait for it" in capsys.readouterr().err

    assert runner.main("sinusoid", sinusoid.PRESETS, execute, [*TINY, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "config.json").read_text())["inner_lr"] == 0.001
    assert runner.main("sinusoid", sinusoid.PRESETS, lambda options, run: None, [*TINY, "--out", str(tmp_path)]) == 0


def test_the_tables_are_shown_when_all_is_written(tmp_path, monkeypatch):
    """As nobody may be there to read them."""
    written = []
    monkeypatch.setattr(runner.Run, "show", lambda run: written.extend(path.name for path in tmp_path.glob("*.*")))
    assert main("--out", tmp_path, "--method", "maml") == 0
    assert {"results.json", "report.md", "learning_curves.png", "fits.png"} <= {*written}


def test_help_may_be_cut_short_by_its_reader():
    command = [sys.executable, SCRIPT, "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # as `head` does
        assert not process.stderr.read()
        assert process.wait() == 141
