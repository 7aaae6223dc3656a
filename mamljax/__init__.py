"""Model-agnostic meta-learning in JAX.

Start with `types.py`, `inner.py` and `maml.py`.
"""
