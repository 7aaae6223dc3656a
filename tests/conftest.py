"""For the whole suite: no silent broadcasting between ranks; four CPU devices; programs compiled fast rather than to be fast.

What one test compiled, the next one and the scripts that tests start read from a cache of the suite's own. Warnings are errors
(setup.cfg).
"""

import gc
import os
import subprocess
import sys
import tempfile

# The workers inherit the environment. And `test_optimised.py` wants none of it.
if not {"PYTEST_XDIST_WORKER", "MAMLJAX_TESTS_OPTIMISED"} & os.environ.keys():
    # Programs compile in a fraction of the usual time, to which most of the suite's time goes; those that differ in length may
    # round differently.
    _FLAGS = [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",  # not in jaxlib 0.12
        "--xla_cpu_parallel_codegen_split_count=1",  # the two workers keep two cores busy
    ]
    # jaxlib ends a process that has flags which it does not know, and names them.
    _TRIAL = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": " ".join(_FLAGS), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    _KNOWN = [flag for flag in _FLAGS if flag not in _TRIAL.stderr]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_KNOWN])
    _CACHE = tempfile.TemporaryDirectory(prefix="mamljax-tests-", ignore_cleanup_errors=True)  # goes when the suite ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 4)
gc.set_threshold(100_000, 50, 100)  # tracing makes many objects and little garbage: looking for it took a fifth of its time


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Programs of one file are of no use to the next, and took gigabytes in the end."""
    yield
    jax.clear_caches()
