"""Meta-gradients of programs compiled to be fast, as users have them: the rest of the suite has its own compiled in a hurry."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OURS = ("XLA_FLAGS", "PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS")  # what the suite has set for itself


def test_meta_gradients_of_optimised_programs():
    tests = [
        HERE / "test_meta_gradients.py",
        f"{HERE / 'test_image_models.py'}::test_second_derivatives_of_pooling_survive_compilation",
        f"{HERE / 'test_image_models.py'}::test_mixed_mode_and_reverse_mode_agree_on_the_meta_gradient",
    ]
    environment = {name: value for name, value in os.environ.items() if name not in OURS} | {"MAMLJAX_TESTS_OPTIMISED": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *map(str, tests)]
    run = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]
