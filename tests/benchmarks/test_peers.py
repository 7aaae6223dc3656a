"""The comparison with PyTorch at tiny size, with and without PyTorch."""

import sys
import time

import few_shot
import few_shot_presets
import numpy as np
import peers
import problems
import pytest
import runner
import sinusoid

from mamljax import report

TINY = ["--problem", "sinusoid", "--num-tasks", "2", "--width", "4", "--chunk-size", "1", "--repeats", "1"]
TINY += ["--compile-seconds", "0"]


def test_all_methods_compute_the_same_and_are_timed(tmp_path, capsys):
    """That they agree, in float64 too, is checked by the benchmark itself."""
    pytest.importorskip("torch")
    assert peers.main([*TINY, "--out", str(tmp_path)]) == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    installed = peers.available(compile_seconds=0)
    assert [row.method for row in rows[::2]] == ["mamljax, reverse", *installed, "mamljax, first_order", *installed]
    assert all(row.mean > 0 for row in rows)
    relative = [row.mean for row in rows if "relative" in row.metric and "mamljax" not in row.method]
    assert sorted(relative, reverse=True)[:2] == [1.0, 1.0]  # the fastest peer in each order
    assert capsys.readouterr().err.count("differ by") == 2 * 2 * len(installed)
    assert (tmp_path / "peers.png").exists()


@pytest.mark.parametrize("name", ["omniglot-5w1s", "miniimagenet-5w1s"])
def test_networks_of_images_are_alike(name):
    pytest.importorskip("torch")
    size = {"image": (8, 8, 3), "queries": 1} if name == "omniglot-5w1s" else {"image": (18, 18, 3), "queries": 2}
    problem = problems.PROBLEMS[name]._replace(width=2, num_tasks=2, chunk_size=1, inner_steps=2, **size)
    installed = peers.available(compile_seconds=0)
    settings = {"second_order": name != "omniglot-5w1s", "compile_seconds": 0}  # one of each order
    found = peers.methods(problem, *problems.weights_and_tasks(problem), installed, **settings)
    peers.check_agreement(found, tolerance=1e-3)


def test_problems_are_those_of_the_experiments():
    for name, problem in problems.PROBLEMS.items():
        options = sinusoid.PRESETS["paper"] if name == "sinusoid" else few_shot.PRESETS[name]
        names = ("num_tasks", "shots", "queries", "inner_lr", "inner_steps", "differentiation", "meta_lr")
        ours = problem._asdict() | {"meta_lr": problems.META_LR}
        assert {name: ours[name] for name in names} == {name: getattr(options, name) for name in names}
        if name == "sinusoid":
            assert (problem.width, problem.width) == options.hidden_sizes
        else:
            assert (problem.network, problem.width) == (options.network, options.filters)
            assert (problem.ways, problem.chunk_size) == (options.ways, runner.tasks_at_a_time(options))
            assert (1, *problem.image) == few_shot_presets.image_shape(options)


def test_options_change_the_problem():
    problem = peers.problems_of(peers.Options(problem=("omniglot-5w1s",), devices=2, chunk_size=8))[0]
    assert problem == problems.PROBLEMS["omniglot-5w1s"]._replace(devices=2, chunk_size=8)


def test_without_peers_the_library_alone_is_timed(capsys, monkeypatch):
    for package in set(peers.PEERS.values()):
        monkeypatch.setitem(sys.modules, package, None)  # not through main(): tyro trips over it
    rows = peers.measure(peers.Options(problem=("sinusoid",), num_tasks=2, width=2, chunk_size=1, repeats=1))
    assert [(row.method, row.metric) for row in rows] == [
        ("mamljax, reverse", "milliseconds per meta-update"),
        ("mamljax, first_order", "milliseconds per meta-update"),
    ]
    errors = capsys.readouterr().err
    for name, package in peers.PEERS.items():
        assert f"skipped {name}: {package} cannot be imported" in errors
    assert 'pip install "mamljax[bench]"' in errors


def test_what_compiles_for_too_long_is_left_out(capsys, monkeypatch):
    def build(name, *arguments, **keywords):
        time.sleep(10)

    monkeypatch.setattr(peers, "by_peer", build)
    problem = problems.PROBLEMS["sinusoid"]._replace(num_tasks=2, width=2)
    settings = {"second_order": True, "compile_seconds": 0.1}
    found = peers.methods(problem, *problems.weights_and_tasks(problem), ["torch.compile"], **settings)
    assert list(found) == ["mamljax, reverse"]
    assert "skipped torch.compile: TimeoutError: took more than 0.1 s to compile" in capsys.readouterr().err


def test_disagreement_is_an_error():
    def method(loss, *moments):
        return peers.Method(lambda count: loss, lambda: {"kernel": np.array(moments)})

    reference = method(1.0, 3.0, 4.0)
    peers.check_agreement({"a": reference, "b": method(1.00001, 3.0, 4.0)}, tolerance=1e-4)
    for other in (method(1.001, 3.0, 4.0), method(1.0, 3.0, 4.001), method(1.0, 3.0, float("nan"))):
        with pytest.raises(peers.DisagreementError, match="b and a do not compute the same within 0.0001"):
            peers.check_agreement({"a": reference, "b": other}, tolerance=1e-4)


def test_a_peer_that_cannot_run_here_is_left_out(capsys):
    def fail(count):
        raise RuntimeError("tensor does not have a device\nand more")

    method = peers.Method(lambda count: 1.0, lambda: {"kernel": np.ones(2)})
    found = {"a": method, "b": method._replace(update=fail), "c": method}
    assert peers.check_agreement(found, tolerance=1e-4) == ["c"]
    assert "skipped b: RuntimeError: tensor does not have a device\n" in capsys.readouterr().err


def test_a_gpu_that_pytorch_does_not_find_is_an_error(monkeypatch):
    torch = pytest.importorskip("torch")
    import torch_maml

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ImportError, match="JAX runs on a GPU, but this PyTorch finds none. Install one with CUDA"):
        torch_maml.build(None, None, {}, (), meta_lr=1e-3, device="cuda")


def test_what_disagrees_is_not_timed_and_the_rest_is(capsys, monkeypatch):
    def check(problem, *arguments, second_order, **keywords):
        if second_order:
            raise peers.DisagreementError("they differ")
        return ["loop over tasks"]

    monkeypatch.setattr(peers, "available", lambda seconds: ["loop over tasks"])
    monkeypatch.setattr(peers, "by_peer", lambda *arguments, **keywords: peers.Method(lambda count: None, dict))
    monkeypatch.setattr(peers, "check_both_precisions", check)
    rows = peers.measure(peers.Options(problem=("sinusoid",), num_tasks=2, width=2, chunk_size=1, repeats=1))
    second, first = (
        [row for row in rows if row.setting == f"sinusoid, {order} order" and "milliseconds" in row.metric]
        for order in ("second", "first")
    )
    assert [(row.method, row.note) for row in second] == [
        ("mamljax", "they differ"),
        ("loop over tasks", "they differ"),
    ]
    assert all(np.isnan(row.mean) for row in second)
    assert [row.mean > 0 for row in first] == [True, True]
    assert "sinusoid, second order: not timed. they differ" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--num-tasks", "--width", "--chunk-size", "--repeats"])
def test_counts_are_positive(tmp_path, capsys, option):
    assert peers.main([*TINY, option, "0", "--out", str(tmp_path / "run")]) == 2
    assert f"error: {option} must be a whole number of at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
