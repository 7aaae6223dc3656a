"""The start-up benchmark: on a stand-in for an experiment, and once on a real one."""

import os
import sys

import pytest
import startup

from mamljax import report
from mamljax.data.folders import split_folders
from mamljax.data.miniimagenet import miniimagenet
from mamljax.data.omniglot import omniglot

STAND_IN = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[-1])
training = out / "checkpoints" / "maml"
training.mkdir(parents=True)
print("Finished tracing f for jit in 0.25 sec")
print("Finished jaxpr to MLIR module conversion jit(f) in 5e-01 sec")
print("Finished XLA compilation of jit(f) in 1.5 sec", flush=True)
(out / "config.json").write_text("{}")
time.sleep(0.1)
(training / "config.json").write_text("{}")
time.sleep(0.2)
(training / "metrics.jsonl").write_text("{}")
time.sleep(60)
"""


def test_parts_add_up(tmp_path):
    found = startup.start((sys.executable, "-c", STAND_IN), tmp_path, dict(os.environ), timeout=30)
    assert 0 < found.configured < found.loaded < found.updated
    assert found.updated >= 0.3  # what the stand-in sleeps; on a busy machine each part may be longer or shorter
    assert 0 < found.processor < found.updated
    assert found.parts == {"of which tracing": 0.75, "of which compiling": 1.5}
    rows = startup.rows_of("stand-in", "cold", [found] * 3)
    seconds = {row.method: row.mean for row in rows}
    assert seconds["cold: command to first meta-update"] == found.updated
    parts = [seconds[f"cold: {part}"] for part in ("imports and command line", "data and first weights", "first meta-update")]
    assert sum(parts) == pytest.approx(found.updated)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("raise SystemExit('no such data')", "ended with code 1 before it wrote config.json: no such data"),
        ("import time; time.sleep(60)", "has not written config.json after 0.5 s"),
    ],
)
def test_what_never_starts_is_an_error(tmp_path, script, message):
    with pytest.raises(ValueError, match=message):
        startup.start((sys.executable, "-c", script), tmp_path, dict(os.environ), timeout=0.5 if "sleep" in script else 30)


def test_what_cannot_start_is_left_out(tmp_path, capsys, monkeypatch):
    def starts_of(name, banks, options):
        if name == "navigation":
            raise ValueError("ended with code 2")
        return {"cold": [startup.Start(1.0, 2.0, 3.0, 2.5, dict.fromkeys(startup.LOGGED, 0.5))]}

    monkeypatch.setattr(startup, "starts_of", starts_of)
    arguments = ["--out", str(tmp_path), "--experiment", "navigation"]
    assert startup.main([*arguments, "sinusoid"]) == 0
    assert {row.setting for row in report.read_results(tmp_path / "results.json")["rows"]} == {"sinusoid"}
    assert "navigation is left out: ended with code 2" in capsys.readouterr().err
    assert startup.main(arguments) == 2
    assert "no experiment has started" in capsys.readouterr().err


def test_random_banks_are_what_the_experiments_open(tmp_path):
    startup.make_bank("omniglot-5w1s", tmp_path, images=1)
    startup.make_bank("miniimagenet-5w1s", tmp_path, images=1)
    startup.make_bank("sinusoid", tmp_path, images=1)
    bank = omniglot(None, tmp_path)
    assert bank.images.shape == (1623, 20, 28, 28, 1)
    bank = miniimagenet(None, tmp_path)
    assert {part: len(classes) for part, classes in split_folders(bank.names).items()} == {
        "train": 64,
        "val": 16,
        "test": 20,
    }


@pytest.mark.slow
def test_a_real_start(tmp_path):
    out = tmp_path / "out"
    assert startup.main(["--experiment", "sinusoid", "--repeats", "1", "--out", str(out)]) == 0
    seconds = {row.method: row.mean for row in report.read_results(out / "results.json")["rows"]}
    assert all(value > 0 for value in seconds.values())
    for kind in ("cold", "warm"):
        whole = seconds[f"{kind}: command to first meta-update"]
        assert seconds[f"{kind}: of which compiling"] + seconds[f"{kind}: of which tracing"] < whole
    assert (out / "startup.png").exists()


@pytest.mark.parametrize("option", ["--images", "--repeats"])
def test_counts_are_positive(tmp_path, capsys, option):
    assert startup.main([option, "0", "--out", str(tmp_path / "run")]) == 2
    assert f"error: {option} must be a whole number of at least 1, got 0" in capsys.readouterr().err
