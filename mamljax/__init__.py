"""Model-agnostic meta-learning in JAX.

Everything is in its module: `from mamljax.maml import maml`, `from mamljax.train import fit`, `from mamljax.evaluate import
evaluate`. Start with `types.py`, `inner.py` and `maml.py`; `experiments/sinusoid.py` puts them to use.
"""

from importlib.metadata import version as _version

__version__ = _version("mamljax")
