"""The comparison with PyTorch at tiny size, with and without PyTorch."""

import sys

import numpy as np
import peers
import pytest

from mamljax import report

TINY = ["--num-tasks", "2", "--filters", "2", "--chunk-size", "1", "--repeats", "1"]


def test_all_methods_compute_the_same_and_are_timed(tmp_path, capsys):
    """That they agree, in float64 too, is checked by the benchmark itself."""
    pytest.importorskip("torch")
    assert peers.main([*TINY, "--out", str(tmp_path)]) == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    assert len(rows) == 3 * 2 * 2
    assert all(row.mean > 0 for row in rows)
    assert [row.mean for row in rows if row.method == "PyTorch, torch.func" and "relative" in row.metric] == [1.0, 1.0]
    assert capsys.readouterr().err.count("differ by") == 2 * 2 * 2


def test_without_pytorch_the_library_alone_is_timed(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # not through main(): tyro trips over it
    rows = peers.measure(peers.Options(num_tasks=2, filters=2, chunk_size=1, repeats=1))
    assert [(row.method, row.metric) for row in rows] == [
        ("mamljax, reverse", "milliseconds per meta-update"),
        ("mamljax, first_order", "milliseconds per meta-update"),
    ]
    message = 'skipped PyTorch, torch.func and PyTorch, loop over tasks: PyTorch is not installed. pip install "mamljax[bench]"'
    assert message in capsys.readouterr().err


def test_disagreement_is_an_error():
    def method(loss, *moments):
        return peers.Method(lambda: loss, lambda: {"kernel": np.array(moments)})

    reference = method(1.0, 3.0, 4.0)
    peers.check_agreement({"a": reference, "b": method(1.00001, 3.0, 4.0)}, tolerance=1e-4)
    for other in (method(1.001, 3.0, 4.0), method(1.0, 3.0, 4.001), method(1.0, 3.0, float("nan"))):
        with pytest.raises(ValueError, match="b and a do not compute the same within 0.0001"):
            peers.check_agreement({"a": reference, "b": other}, tolerance=1e-4)


@pytest.mark.parametrize("option", ["--num-tasks", "--filters", "--chunk-size", "--repeats"])
def test_counts_are_positive(tmp_path, capsys, option):
    assert peers.main([*TINY, option, "0", "--out", str(tmp_path / "run")]) == 2
    assert f"error: {option} must be a whole number of at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_chunks_divide_the_meta_batch(tmp_path, capsys):
    assert peers.main([*TINY, "--num-tasks", "3", "--chunk-size", "2", "--out", str(tmp_path)]) == 2
    assert "error: chunk_size must divide the number of tasks in a meta-batch, 3, got 2" in capsys.readouterr().err
