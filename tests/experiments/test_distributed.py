"""An experiment in several processes: one that does not come, and one that is lost."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runner
import sinusoid

SCRIPT = Path(sinusoid.__file__)
TINY = ["--steps", "200000", "--log-every", "20", "--num-tasks", "2", "--hidden-sizes", "4", "--method", "maml"]
TINY += ["--eval-tasks", "4", "--checkpoint-seconds", "0.5", "--validate-every", "200000"]


@pytest.fixture
def start(tmp_path):
    """Start process number n of two; all are killed at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []

    def start(number, join_seconds):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(number),
            "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path]),
        }
        command = [sys.executable, SCRIPT, *TINY, "--distributed", "--join-seconds", join_seconds, "--out", tmp_path / "run"]
        command = [str(word) for word in command]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.stderr.close()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_never_joins(start, tmp_path, number):
    alone, started = start(number, join_seconds=3), time.monotonic()
    errors = alone.communicate(timeout=120)[1]
    assert alone.returncode == 2
    assert time.monotonic() - started < 60
    assert "error: the other processes could not be joined at 127.0.0.1:" in errors
    assert "within 3 s. Start as many as JAX_NUM_PROCESSES says" in errors
    assert "stack trace" not in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_is_lost(start, tmp_path):
    """The other one ends and says why, and its checkpoint serves a run in a single process."""
    first, second = start(0, join_seconds=60), start(1, join_seconds=60)
    checkpoints = tmp_path / "run" / "checkpoints" / "maml" / "steps"
    deadline = time.monotonic() + 120
    while not (checkpoints.is_dir() and any(entry.name.isdigit() for entry in checkpoints.iterdir())):
        assert time.monotonic() < deadline, "no checkpoint"
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.2)
    second.send_signal(signal.SIGKILL)
    errors = first.communicate(timeout=120)[1]
    assert first.returncode == 2, errors
    assert "error: another process was lost (" in errors
    assert "Start all of them again: the same command goes on from the last checkpoint." in errors
    done = max(int(entry.name) for entry in checkpoints.iterdir() if entry.name.isdigit())
    steps = str(done + 20)
    assert (
        runner.main("sinusoid", sinusoid.PRESETS, sinusoid.execute, [*TINY, "--steps", steps, "--out", str(tmp_path / "run")])
        == 0
    )


def test_numbers_of_processes_that_are_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    argv = [*TINY, "--distributed", "--out", str(tmp_path / "run")]
    assert runner.main("sinusoid", sinusoid.PRESETS, sinusoid.execute, argv) == 2
    errors = capsys.readouterr().err
    assert "error: JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers, got ['two', '0']." in errors
    assert not (tmp_path / "run").exists()
