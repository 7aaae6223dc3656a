"""For the whole suite: no silent broadcasting between ranks; four CPU devices; programs compiled fast rather than to be fast.

Warnings are errors (setup.cfg).
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"  # half the time of the suite

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 4)
