"""Model-agnostic meta-learning in JAX.

Start with `types.py`, `inner.py` and `maml.py`; `experiments/sinusoid.py` puts them to use.
"""

from importlib.metadata import version as _version

__version__ = _version("mamljax")
