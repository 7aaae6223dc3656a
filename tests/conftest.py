"""Strictness for the whole suite: no silent broadcasting between ranks; warnings are errors (setup.cfg)."""

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
