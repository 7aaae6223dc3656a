"""What all tests of scripts need."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _compilation_cache(tmp_path_factory):
    """One cache for all runs of a file, and none of the user's."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    yield
    jax.config.update("jax_compilation_cache_dir", before)
