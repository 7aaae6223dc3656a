"""Model-agnostic meta-learning in JAX.

Everything is in its module: `from mamljax.maml import maml`, `from mamljax.train import fit`, `from mamljax.evaluate import
evaluate`. Start with `types.py`, `inner.py` and `maml.py`; `experiments/sinusoid.py` puts them to use.
"""

from importlib import metadata as _metadata

try:
    __version__ = _metadata.version("mamljax")
except _metadata.PackageNotFoundError:  # imported from its directory
    __version__ = "0+not.installed"
