"""The throughput benchmark at tiny size."""

import jax
import numpy as np
import problems
import pytest
import throughput

from mamljax import report
from mamljax.types import Task

TINY = ["--num-tasks", "2", "--width", "2", "--repeats", "1", "--measurements", "1", "--seconds", "0.05"]


def test_writes_throughput_share_and_waiting(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    assert throughput.main(["--problem", "sinusoid", *TINY, "--out", str(tmp_path)]) == 0
    assert jax.config.jax_compilation_cache_dir == before
    rows = report.read_results(tmp_path / "results.json")["rows"]
    assert {row.method for row in rows} == {"meta-batch 2, fixed tasks", "meta-batch 2, drawn on the device"}
    assert len([row for row in rows if row.metric == "waiting for input in %"]) == 1
    shares = [row.mean for row in rows if row.metric == "share of the product rate in %"]
    assert all(0 < share < 100 for share in shares)
    speeds = [row.mean for row in rows if row.metric == "tasks per second"]
    assert shares[0] / shares[1] == pytest.approx(speeds[0] / speeds[1])
    assert (tmp_path / "throughput.png").exists()


def test_inputs_of_images_are_alike_in_shape():
    problem = problems.PROBLEMS["omniglot-5w1s"]._replace(num_tasks=2)
    tasks = [
        jax.eval_shape(sample, jax.random.key(0))
        for sample in throughput.inputs(problem, throughput.Options(images=2)).values()
    ]
    assert len(tasks) == 3
    assert tasks[0] == tasks[1] == tasks[2]


def test_fixed_tasks_are_all_of_the_meta_batch():
    tasks = Task(*(problems.weights_and_tasks(problems.PROBLEMS["sinusoid"]._replace(num_tasks=3))[1]))
    keys = jax.random.split(jax.random.key(0), 30)
    drawn = jax.vmap(lambda key: throughput._one_of(jax.device_put(tasks), key))(keys)
    assert {leaf.tobytes() for leaf in np.asarray(drawn.query.x)} == {leaf.tobytes() for leaf in tasks.query.x}


def test_times_are_of_single_updates(monkeypatch):
    def fit(learner, sample, *, num_updates, log_every, directory, **others):
        assert (num_updates, log_every) == (30, 10)
        lines = (f'{{"update": {10 * n}, "seconds": {seconds}}}\n' for n, seconds in ((1, 9.0), (2, 9.5), (3, 10.5)))
        (throughput.Path(directory) / "metrics.jsonl").write_text("".join(lines))

    monkeypatch.setattr(throughput, "fit", fit)
    problem = problems.PROBLEMS["sinusoid"]
    assert throughput.seconds_per_update(None, None, problem, updates=10, count=2) == pytest.approx([0.05, 0.1])


@pytest.mark.parametrize(("option", "message"), [("--num-tasks", "a whole number"), ("--seconds", "0.05 or more")])
def test_bad_input(tmp_path, capsys, option, message):
    assert throughput.main([*TINY, option, "0", "--out", str(tmp_path)]) == 2
    assert f"error: {option} must be {message}" in capsys.readouterr().err
